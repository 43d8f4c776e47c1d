"""Weighted mixtures: every dataset has its share, to one sample, at every point."""

import random
from fractions import Fraction

import pytest

from megacore.data import Mixture
from megacore.data.mixing import LONGEST_PERIOD

WEIGHTS = {
    "one": [3],
    "equal": [1, 1, 1, 1, 1, 1, 1],
    "decimals": [0.7, 0.2, 0.1],
    "a small one": [0.999, 0.001],
    "many": [13, 1, 7, 2, 2, 5, 11, 1, 19, 3],
    "steep": [1000, 100, 10, 1],
    "many digits, 2": [0.123456789, 1],
    "many digits, 3": [0.123456789, 0.3333333333333333, 1e-7],
    "many digits, 4": [0.577215664901532, 1e-3, 2.718281828459045, 3.141592653589793],
}


def largest_deviation(mixture: Mixture, weights: list[float], length: int, *, start: int = 0) -> Fraction:
    shares = [Fraction(str(weight)) / sum(Fraction(str(w)) for w in weights) for weight in weights]
    counts: list[int | None] = [None] * len(weights)
    largest = Fraction(0)
    for position in range(start, start + length):
        dataset, number = mixture[position]
        assert counts[dataset] in (None, number)  # its own samples come one after the other
        counts[dataset] = number + 1
        for count, share in zip(counts, shares, strict=True):
            if count is not None:
                largest = max(largest, abs(count - share * (position + 1)))
    return largest


@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS.keys())
@pytest.mark.parametrize("start", [0, 10**9 + 7])
def test_each_dataset_has_its_share_to_less_than_one_sample_at_every_point(weights, start):
    assert largest_deviation(Mixture(weights), weights, 3000, start=start) < 1


def test_so_it_is_with_any_weights_of_few_digits():
    draw = random.Random(0)
    for _ in range(60):
        weights = [draw.randint(1, 50) / 10 for _ in range(draw.randint(2, 9))]
        assert largest_deviation(Mixture(weights), weights, 400) < 1


def test_many_datasets_with_weights_of_many_digits_keep_the_bound_that_the_mixture_states():
    draw = random.Random(0)
    for _ in range(30):
        weights = [10 ** draw.uniform(-6, 0) for _ in range(draw.randint(5, 12))]
        mixture = Mixture(weights)
        assert largest_deviation(mixture, weights, 400) <= mixture.bound < 1.5


def test_first_come_those_that_were_not_there_yet():
    assert [Mixture([0.5, 0.25, 0.25])[n].dataset for n in range(4)].count(0) == 2
    assert sorted(Mixture([1, 1, 1])[n].dataset for n in range(3)) == [0, 1, 2]


@pytest.mark.parametrize("weights", [[0.7, 0.2, 0.1], [0.123456789, 0.3333333333333333, 1e-7]])
def test_a_position_alone_determines_what_comes(weights):
    whole = [Mixture(weights)[n] for n in range(300)]
    mixture = Mixture(weights)
    assert [mixture[n] for n in reversed(range(300))] == whole[::-1]


def test_the_same_weights_give_the_same_sequence_on_every_machine():
    # Held fixed: another sequence would make a resumed training repeat some samples and never see others.
    assert [Mixture([0.5, 0.3, 0.2])[n].dataset for n in range(10)] == [0, 1, 0, 2, 0, 1, 0, 1, 0, 2]
    assert [Mixture([0.5123456789, 0.3, 0.2])[n].dataset for n in range(10)] == [0, 1, 0, 2, 0, 1, 0, 2, 0, 1]


def test_what_is_kept_is_bounded_whatever_the_weights():
    from tracemalloc import get_traced_memory, start, stop

    start()
    Mixture([0.5, 0.5 - 1 / LONGEST_PERIOD, 1 / LONGEST_PERIOD])
    _, peak = get_traced_memory()
    stop()
    assert peak < 10_000_000


@pytest.mark.parametrize("weights", [[], [0.5, 0], [1, -1]])
def test_weights_that_are_none_are_refused(weights):
    with pytest.raises(ValueError, match="positive numbers"):
        Mixture(weights)


def test_a_position_before_the_start_is_an_index_error():
    with pytest.raises(IndexError, match="counted from 0"):
        Mixture([1, 2])[-1]
