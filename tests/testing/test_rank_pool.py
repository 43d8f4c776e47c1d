"""The processes that other tests run functions on."""

from __future__ import annotations

import time

import pytest

from layer_on_rank import fail_on, multiply_over_a_mesh, rank_and_size, wait_forever_on
from megacore.testing.ranks import RankError, RankTimeoutError


def test_each_rank_answers_with_its_own_place(ranks):
    assert ranks.run(rank_and_size) == [(0, 2), (1, 2)]


def test_a_failure_on_a_rank_reaches_the_test_with_its_traceback_and_the_pool_goes_on(ranks):
    with pytest.raises(RankError, match=r"rank 1: Traceback[\s\S]*ValueError: there is something wrong with rank 1"):
        ranks.run(fail_on, 1)

    assert ranks.run(rank_and_size) == [(0, 2), (1, 2)]


def test_a_deadlock_ends_after_the_timeout_and_says_where_it_was(ranks):
    started = time.monotonic()

    with pytest.raises(RankTimeoutError, match=r"rank 0 gave no answer in 1 s[\s\S]*wait_forever_on"):
        ranks.run(wait_forever_on, 0, timeout=1)

    assert time.monotonic() - started < 10
    assert ranks.run(rank_and_size) == [(0, 2), (1, 2)]


def test_the_groups_of_one_run_are_gone_in_the_next_with_their_threads(ranks):
    num_threads = [ranks.run(multiply_over_a_mesh, name) for name in "abcdef"]

    assert num_threads[-1] == num_threads[0]
