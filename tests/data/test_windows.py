"""Training samples and their order."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from megacore.data import (
    IndexedDataset,
    IndexedDatasetWriter,
    KeyedPermutation,
    SampleOrder,
    TokenWindows,
    WindowSamples,
)
from megacore.errors import DataError

SIZES = [1, 2, 3, 4, 5, 6, 7, 99, 100, 101, 1000, 4096, 65537]


def dataset_of(prefix: Path, lengths: list[int]) -> IndexedDataset:
    """Documents of these lengths; the ids count up from 0 through all of them."""
    ids = iter(range(sum(lengths)))
    with IndexedDatasetWriter(prefix, "uint16") as writer:
        for length in lengths:
            writer.add_document([next(ids) for _ in range(length)])
    return IndexedDataset(prefix)


# --- windows


def test_a_sample_is_seq_length_plus_one_tokens_and_begins_with_the_last_of_the_one_before(tmp_path):
    windows = TokenWindows(dataset_of(tmp_path / "data", [3, 0, 2, 4, 1]), seq_length=3)
    assert [windows[i].tolist() for i in range(len(windows))] == [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7, 8, 9]]


def test_samples_are_64_bit_ids_of_their_own(tmp_path):
    windows = TokenWindows(dataset_of(tmp_path / "data", [9]), seq_length=4)
    sample = windows[0]
    sample[:] = 0  # not a view of the read-only file
    assert sample.dtype == np.int64
    assert windows[0].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("seed", range(50))
def test_every_token_but_the_first_is_learned_in_one_sample_and_of_the_last_no_other_is_twice(tmp_path, seed):
    rng = np.random.default_rng(seed)
    dataset = dataset_of(tmp_path / "data", [int(length) for length in rng.integers(0, 40, 8)])
    first = int(rng.integers(0, dataset.num_tokens // 2))
    part = range(first, int(rng.integers(first + 2, dataset.num_tokens + 1)))
    samples = WindowSamples(TokenWindows(dataset, int(rng.integers(1, len(part))), tokens=part))

    learned = [sample.tokens[1:][sample.loss_mask == 1] for sample in samples]

    assert np.concatenate(learned).tolist() == list(part[1:])
    assert all(sample.loss_mask.all() for sample in list(samples)[:-1])
    for sample in samples:
        assert np.diff(sample.tokens).tolist() == [1] * (len(sample.tokens) - 1)


def test_iterating_ends_after_the_last_sample(tmp_path):
    windows = TokenWindows(dataset_of(tmp_path / "data", [10]), seq_length=3)
    assert len(list(windows)) == len(windows) == 3
    assert all(one[-1] == following[0] for one, following in pairwise(windows))


@pytest.mark.parametrize("index", [-1, 3])
def test_a_sample_that_there_is_not_is_an_index_error(tmp_path, index):
    with pytest.raises(IndexError, match="of 3"):
        TokenWindows(dataset_of(tmp_path / "data", [10]), seq_length=3)[index]


@pytest.mark.parametrize("lengths", [[], [0], [1], [2, 2]])
def test_a_dataset_too_short_for_one_sample_is_refused(tmp_path, lengths):
    with pytest.raises(DataError, match=rf"data: {sum(lengths)} tokens give no sample of sequence length 4.*takes 5"):
        TokenWindows(dataset_of(tmp_path / "data", lengths), seq_length=4)


def test_a_sequence_length_below_one_is_refused(tmp_path):
    with pytest.raises(DataError, match="a sequence length of 0"):
        TokenWindows(dataset_of(tmp_path / "data", [10]), seq_length=0)


# --- the permutation


@pytest.mark.parametrize("size", SIZES)
def test_a_permutation_reaches_every_position_once(size):
    permutation = KeyedPermutation(size, seed=1234)
    assert sorted(permutation[i] for i in range(size)) == list(range(size))


@pytest.mark.parametrize("size", [2**40, 2**40 - 1, 10**12 + 39])
def test_a_huge_permutation_is_evaluated_at_a_position_without_being_built(size):
    permutation = KeyedPermutation(size, seed=1)
    positions = [0, 1, 2, size // 2, size - 2, size - 1, *range(1000, 3000)]
    values = [permutation[i] for i in positions]
    assert len(set(values)) == len(positions)
    assert all(0 <= value < size for value in values)
    assert min(values) < size // 100 < size - size // 100 < max(values)


def test_the_same_key_gives_the_same_permutation_on_every_machine():
    # Held fixed: another order would make a resumed training repeat some samples and never see others.
    assert [KeyedPermutation(10, seed=1234)[i] for i in range(10)] == [0, 3, 2, 9, 8, 1, 6, 4, 7, 5]


def test_seeds_and_streams_give_different_permutations():
    orders = {
        tuple(KeyedPermutation(1000, seed, stream=stream)[i] for i in range(1000))
        for seed in range(3)
        for stream in range(3)
    }
    assert len(orders) == 9


def test_all_orders_of_a_few_positions_are_about_equally_frequent():
    # Chi-square with 119 degrees of freedom: mean 119, standard deviation 15.4.
    counts: dict[tuple[int, ...], int] = {}
    for seed in range(120 * 50):
        permutation = KeyedPermutation(5, seed)
        order = tuple(permutation[i] for i in range(5))
        counts[order] = counts.get(order, 0) + 1
    assert len(counts) == 120
    assert sum((count - 50) ** 2 / 50 for count in counts.values()) < 119 + 5 * 15.4


def test_neighbours_do_not_stay_neighbours():
    # The distance of two random values is uniform: chi-square with 99 degrees of freedom, standard deviation 14.1.
    size = 100_000
    permutation = KeyedPermutation(size, seed=7)
    values = np.array([permutation[i] for i in range(20_001)])
    counts, _ = np.histogram(np.diff(values) % size, bins=100, range=(0, size))
    assert ((counts - 200) ** 2 / 200).sum() < 99 + 5 * 14.1


@pytest.mark.parametrize("position", [-1, 10])
def test_a_position_outside_the_permutation_is_an_index_error(position):
    with pytest.raises(IndexError, match="of 10"):
        KeyedPermutation(10, seed=0)[position]


def test_an_empty_permutation_is_refused():
    with pytest.raises(ValueError, match="at least 1"):
        KeyedPermutation(0, seed=0)


# --- the order over epochs


@pytest.mark.parametrize("num_samples", [1, 2, 3, 99, 1000])
def test_each_epoch_visits_every_sample_once(num_samples):
    order = SampleOrder(num_samples, seed=5)
    for epoch in range(3):
        visited = [order[epoch * num_samples + i] for i in range(num_samples)]
        assert sorted(visited) == list(range(num_samples))


def test_epochs_and_seeds_differ():
    orders = {
        tuple(SampleOrder(99, seed)[epoch * 99 + i] for i in range(99)) for seed in range(3) for epoch in range(3)
    }
    assert len(orders) == 9


def test_a_position_alone_determines_the_sample_so_that_training_resumes_anywhere():
    order = SampleOrder(99, seed=5)
    whole = [order[i] for i in range(400)]
    assert [SampleOrder(99, seed=5)[i] for i in range(250, 400)] == whole[250:]


def test_positions_before_the_start_and_orders_of_nothing_are_refused():
    with pytest.raises(IndexError, match="counted from 0"):
        SampleOrder(10, seed=0)[-1]
    with pytest.raises(ValueError, match="at least 1"):
        SampleOrder(0, seed=0)
