"""Which conversations share a row. The truth is best-fit decreasing, one item at a time."""

from __future__ import annotations

import time

import numpy as np
import pytest

from megacore.data.sampling.packing import pack


def rooms_left_one_at_a_time(lengths: list[int], capacity: int) -> list[int]:
    """The room left in each row, the longest item first, each into the row that it leaves the least room in."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [number for number, room in enumerate(rooms) if room >= length]
        if fitting:
            rooms[min(fitting, key=rooms.__getitem__)] -= length
        else:
            rooms.append(capacity - length)
    return sorted(rooms)


@pytest.mark.parametrize("seed", range(60))
def test_rows_are_those_of_best_fit_decreasing(seed):
    rng = np.random.default_rng(seed)
    capacity = int(rng.integers(1, 60))
    lengths = np.minimum(rng.geometric(rng.choice([0.03, 0.1, 0.5]), int(rng.integers(0, 200))), capacity)
    rows = pack(lengths, capacity)
    rooms = sorted(capacity - int(lengths[rows[number]].sum()) for number in range(len(rows)))
    assert rooms == rooms_left_one_at_a_time(lengths.tolist(), capacity)


@pytest.mark.parametrize("seed", range(20))
def test_every_item_is_in_one_row(seed):
    rng = np.random.default_rng(seed)
    rows = pack(rng.integers(1, 14, 173), 13)
    assert sorted(np.concatenate([rows[number] for number in range(len(rows))])) == list(range(173))


def test_items_of_one_length_keep_their_order():
    rows = pack(np.array([3, 2, 3, 2, 3]), 5)
    assert [rows[number].tolist() for number in range(len(rows))] == [[0, 1], [2, 3], [4]]


def test_without_items_there_is_no_row():
    assert len(pack(np.array([], np.int64), 5)) == 0


def test_a_million_items_take_a_second_or_less():
    lengths = np.clip(np.random.default_rng(0).lognormal(6, 1, 1_000_000), 2, 4097).astype(np.int32)
    started = time.perf_counter()
    rows = pack(lengths, 4097)
    assert time.perf_counter() - started < 2  # 0.1 s where nothing else runs
    assert lengths.sum() / (4097 * len(rows)) > 0.999
