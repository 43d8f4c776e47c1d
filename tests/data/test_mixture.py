"""Weighted mixtures: every dataset has its share, to one sample, at every point."""

import random
from fractions import Fraction

import pytest

from megacore.data import Mixture
from megacore.data.sampling.mixture import LONGEST_BLOCK, SHORTEST_BLOCK
from megacore.errors import DataError

WEIGHTS = {
    "one": [3],
    "equal": [1, 1, 1, 1, 1, 1, 1],
    "decimals": [0.7, 0.2, 0.1],
    "a small one": [0.999, 0.001],
    "many": [13, 1, 7, 2, 2, 5, 11, 1, 19, 3],
    "steep": [1000, 100, 10, 1],
    "many digits, 2": [0.123456789, 1],
    "many digits, 3": [0.123456789, 0.3333333333333333, 1e-4],
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


def test_so_it_is_with_many_datasets_and_weights_of_many_digits():
    draw = random.Random(0)
    for _ in range(30):
        weights = [10 ** draw.uniform(-3, 0) for _ in range(draw.randint(5, 40))]
        assert largest_deviation(Mixture(weights), weights, 400, start=draw.randint(0, 10**9)) < 1


@pytest.mark.parametrize("weights", [[0.123456789, 1, 1e-4, 2e-4, 0.35, 0.7], [3, 5, 7, 1 / 300, 2 / 7, 1 / 7, 11]])
def test_where_one_block_of_positions_goes_over_into_the_next_nothing_is_repeated_or_left_out(weights):
    mixture, seam = Mixture(weights), LONGEST_BLOCK * 12345
    turns = [mixture[position] for position in range(seam - 2 * SHORTEST_BLOCK, seam + 2 * SHORTEST_BLOCK)]
    for dataset in range(len(weights)):
        numbers = [turn.number for turn in turns if turn.dataset == dataset]
        assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    assert largest_deviation(mixture, weights, 2 * SHORTEST_BLOCK, start=seam - SHORTEST_BLOCK) < 1


def test_first_come_those_that_were_not_there_yet():
    assert [Mixture([0.5, 0.25, 0.25])[n].dataset for n in range(4)].count(0) == 2
    assert sorted(Mixture([1, 1, 1])[n].dataset for n in range(3)) == [0, 1, 2]


@pytest.mark.parametrize("weights", [[0.7, 0.2, 0.1], [0.123456789, 0.3333333333333333, 1e-4]])
def test_a_position_alone_determines_what_comes(weights):
    whole = [Mixture(weights)[n] for n in range(300)]
    mixture = Mixture(weights)
    assert [mixture[n] for n in reversed(range(300))] == whole[::-1]


def test_the_same_weights_give_the_same_sequence_on_every_machine():
    # Held fixed: another sequence would make a resumed training repeat some samples and never see others.
    assert [Mixture([0.5, 0.3, 0.2])[n].dataset for n in range(10)] == [0, 1, 0, 2, 0, 1, 0, 1, 0, 2]
    assert [Mixture([0.5123456789, 0.3, 0.2])[n].dataset for n in range(10)] == [0, 0, 1, 0, 2, 1, 0, 0, 1, 2]
    far = [Mixture([0.5123456789, 0.3, 0.2, 0.123, 0.7, 0.41])[2**52 + n] for n in range(3)]
    assert far == [(5, 822357049328144), (4, 1404024230560247), (2, 401149780160070)]


def test_what_is_kept_does_not_grow_with_the_position():
    from tracemalloc import get_traced_memory, start, stop

    mixture = Mixture([0.5, 0.5, 1e-4])
    start()
    for position in (0, 10**9, 10**15, 10**18):
        assert mixture[position].number <= position
    _, peak = get_traced_memory()
    stop()
    assert peak < 1_000_000


def test_a_dataset_that_would_hardly_ever_come_is_refused():
    with pytest.raises(DataError, match="less than one sample in 1,048,574: leave it out"):
        Mixture([1, 1e-7])


@pytest.mark.parametrize("weights", [[], [0.5, 0], [1, -1]])
def test_weights_that_are_none_are_refused(weights):
    with pytest.raises(ValueError, match="positive numbers"):
        Mixture(weights)


def test_a_position_before_the_start_is_an_index_error():
    with pytest.raises(IndexError, match="counted from 0"):
        Mixture([1, 2])[-1]
