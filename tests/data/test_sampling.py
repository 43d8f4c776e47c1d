"""What a run trains on: splits, documents, mixtures, and going on from any point at any data-parallel size."""

import struct
import threading
import time
import tracemalloc
from itertools import chain, islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megacore.data import IndexedDataset, IndexedDatasetWriter, TokenWindows, WindowSamples, split_tokens
from megacore.errors import ConfigError, DataError
from megacore.training import RunConfig, batches, read_run_config
from megacore.training.batches import open_samples, prefetched
from megacore.training.schedule import Progress

CHECKPOINT = SimpleNamespace(manifest=SimpleNamespace(config={"vocab_size": 5000}))
"""All that sampling asks of a checkpoint."""


def dataset_of(prefix: Path, lengths: list[int], first: int = 0) -> IndexedDataset:
    """Documents of these lengths; the ids count up from ``first`` through all of them."""
    ids = iter(range(first, first + sum(lengths)))
    with IndexedDatasetWriter(prefix, "uint16") as writer:
        for length in lengths:
            writer.add_document([next(ids) for _ in range(length)])
    return IndexedDataset(prefix)


def run_of(place: Path, data: str) -> RunConfig:
    file = place / "run.toml"
    file.write_text(
        f"model.checkpoint = 'c'\n[data]\nseq_length = 7\n{data}\n[optimizer]\nlr = 0.1\n"
        "[training]\ntrain_iters = 13\nglobal_batch_size = 12\n[output]\ncheckpoint = 'o'\n"
    )
    return read_run_config(file)


@pytest.fixture
def mixture(tmp_path: Path) -> RunConfig:
    """A run on three datasets, the epochs of which are 10, 15 and 9 samples."""
    for name, lengths, first in (("a", [20, 5, 45], 0), ("b", [100], 1000), ("c", [30, 33], 2000)):
        dataset_of(tmp_path / name, lengths, first)
    entries = ", ".join(f'{{ prefix = "{tmp_path / n}", weight = {w} }}' for n, w in (("a", 0.5), ("b", 3), ("c", 1)))
    return run_of(tmp_path, f"prefix = [{entries}]\ndocument_boundaries = 'reset'\neod_mask_loss = true")


# --- documents


@pytest.mark.parametrize("lengths", [[3, 9, 1, 1, 26], [3, 0, 9, 0, 0, 1, 1, 26, 0], [40], [1] * 40])
def test_segments_are_the_documents_that_the_dataset_marks(tmp_path, lengths):
    samples = WindowSamples(TokenWindows(dataset_of(tmp_path / "d", lengths), 6), resets_at_documents=True)
    document_of = np.repeat(np.arange(len(lengths)), lengths)
    for index in range(len(samples)):
        sample = samples[index]
        documents = document_of[sample.tokens[:-1]]
        expected = np.unique(documents, return_inverse=True)[1]
        assert sample.segments.tolist() == expected.tolist()
        assert sample.segments.dtype == np.int32
        assert sample.loss_mask.tolist() == ([1] * 6 if index < 6 else [0, 0, 0, 1, 1, 1])  # the last is of 40 tokens


def test_with_eod_mask_loss_no_token_is_learned_from_the_end_of_another_document(tmp_path):
    lengths = [3, 0, 9, 1, 1, 26]
    samples = WindowSamples(TokenWindows(dataset_of(tmp_path / "d", lengths), 6), eod_mask_loss=True)
    document_of = np.repeat(np.arange(len(lengths)), lengths)
    for index in range(len(samples)):
        inputs, targets = document_of[samples[index].tokens[:-1]], document_of[samples[index].tokens[1:]]
        learned = (inputs == targets) & (np.arange(6) >= (0 if index < 6 else 3))  # of the last, 3 are learned before
        assert samples[index].loss_mask.tolist() == learned.astype(float).tolist()
        assert samples[index].segments is None


def test_an_id_that_ends_documents_elsewhere_does_not_end_one_here(tmp_path):
    with IndexedDatasetWriter(tmp_path / "d", "uint16") as writer:
        writer.add_document([7, 2, 7, 2])
        writer.add_document([2, 2, 2])
    [sample] = WindowSamples(TokenWindows(IndexedDataset(tmp_path / "d"), 6), resets_at_documents=True)
    assert sample.segments.tolist() == [0, 0, 0, 0, 1, 1]


def test_a_document_of_several_sequences_is_one_segment(tmp_path):
    with IndexedDatasetWriter(tmp_path / "d", "uint16") as writer:
        writer.add_document([1, 2], [3])
        writer.add_document([4], [5, 6, 7])
    dataset = IndexedDataset(tmp_path / "d")
    assert dataset.document_starts(0, 7) == [0, 3]
    assert [[ids.tolist() for ids in document] for document in dataset.documents()] == [[[1, 2], [3]], [[4], [5, 6, 7]]]


def test_the_originals_two_flags_mean_a_reset_and_one_of_them_is_refused(tmp_path):
    both = run_of(tmp_path, "prefix = 'x'\nreset_position_ids = true\nreset_attention_mask = true")
    assert both.data.resets_at_documents
    with pytest.raises(ConfigError, match="go together"):
        run_of(tmp_path, "prefix = 'x'\nreset_position_ids = true")


# --- splits


def test_parts_are_cut_at_document_boundaries_and_are_all_of_the_dataset(tmp_path):
    dataset = dataset_of(tmp_path / "d", [10] * 100)
    parts = split_tokens(dataset, [0.904, 0.05, 0.046], 7)
    assert parts == {"train": range(900), "valid": range(900, 950), "test": range(950, 1000)}


def test_where_no_boundary_would_do_the_cut_is_made_at_the_token(tmp_path):
    assert split_tokens(dataset_of(tmp_path / "d", [1000]), [969, 30, 1], 0) == {
        "train": range(969), "valid": range(969, 999), "test": range(999, 1000),
    }  # fmt: skip


def test_a_part_that_would_silently_be_empty_is_refused_with_what_would_do(tmp_path):
    with pytest.raises(DataError, match=r"gives 1 of its 1000 tokens to test.*takes 8.*8000 tokens or more.*test_pre"):
        split_tokens(dataset_of(tmp_path / "d", [10] * 100), [969, 30, 1], 7)


def test_the_dataset_that_would_do_is_large_enough_for_the_smallest_part(tmp_path):
    # Of 400 tokens neither of the last two parts has enough.
    with pytest.raises(DataError, match=r"use a dataset of 40761 tokens or more"):
        split_tokens(dataset_of(tmp_path / "d", [400]), [969, 0.5, 1], 20)
    assert len(split_tokens(dataset_of(tmp_path / "e", [40761]), [969, 0.5, 1], 20)) == 3


def test_a_part_of_weight_0_is_not_asked_for(tmp_path):
    assert list(split_tokens(dataset_of(tmp_path / "d", [10] * 100), [9, 0, 1], 7)) == ["train", "test"]


def test_no_token_of_one_split_is_in_another_and_every_mixed_dataset_is_split(tmp_path, mixture):
    data = mixture.data.model_copy(update={"split": (6.0, 2.0, 2.0)})
    run = mixture.model_copy(update={"data": data})
    seen = {}
    for split in ("train", "valid", "test"):
        samples = open_samples(run, CHECKPOINT, split)
        seen[split] = {int(id_) for source in samples.sources for sample in source for id_ in sample.tokens}
        assert {id_ // 1000 for id_ in seen[split]} == {0, 1, 2}
    assert not seen["train"] & seen["valid"] and not seen["valid"] & seen["test"] and not seen["train"] & seen["test"]


def test_a_dataset_of_its_own_is_validated_on(tmp_path):
    dataset_of(tmp_path / "a", [100])
    dataset_of(tmp_path / "v", [50], first=3000)
    run = run_of(tmp_path, f"prefix = '{tmp_path / 'a'}'\nvalid_prefix = '{tmp_path / 'v'}'")
    assert run.data.splits == ("train", "valid")
    samples = open_samples(run, CHECKPOINT, "valid")
    assert min(samples[position].tokens.min() for position in range(samples.samples_per_epoch)) >= 3000


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ("split = [969, 30, 1]\nvalid_prefix = 'v'", "split cuts off a part for valid"),
        ("split = [0, 1, 1]", "the first weight of split"),
        ("split = [1, 1, 1, 1]", r"data\.split"),
        ("split = [1, -1]", r"data\.split\.1"),
    ],
)
def test_splits_that_contradict_themselves_are_refused(tmp_path, keys, message):
    with pytest.raises(ConfigError, match=message):
        run_of(tmp_path, f"prefix = 'x'\n{keys}")


# --- mixtures, and going on


@pytest.mark.parametrize(
    "prefix", ["[]", "5", "[{ prefix = 'a' }]", "[{ prefix = 'a', weight = 0 }]", "[{ prefix = 'a', wieght = 1 }]"]
)
def test_a_malformed_mixture_is_refused_with_what_it_takes(tmp_path, prefix):
    with pytest.raises(ConfigError, match=r"data\.prefix: .*\{ prefix = PATH, weight = NUMBER \}"):
        run_of(tmp_path, f"prefix = {prefix}")


def test_datasets_of_the_same_length_have_orders_of_their_own(tmp_path):
    for name in ("a", "b"):
        dataset_of(tmp_path / name, [700])
    entries = ", ".join(f'{{ prefix = "{tmp_path / name}", weight = 1 }}' for name in ("a", "b"))
    samples = open_samples(run_of(tmp_path, f"prefix = [{entries}]"), CHECKPOINT)
    orders: list[list[int]] = [[], []]
    for position in range(100):
        source, sample = samples.location(position)
        orders[source].append(sample)
    assert orders[0] != orders[1]


def test_every_sample_of_each_dataset_comes_once_an_epoch_in_an_order_that_changes(mixture):
    samples = open_samples(mixture, CHECKPOINT)
    lengths = [len(source) for source in samples.sources]
    assert lengths == [10, 15, 9]
    orders: list[list[int]] = [[], [], []]
    for position in range(300):
        source, sample = samples.location(position)
        orders[source].append(sample)
    for order, length in zip(orders, lengths, strict=True):
        epochs = [order[start : start + length] for start in range(0, len(order) - length, length)]
        assert len(epochs) >= 3
        assert all(sorted(epoch) == list(range(length)) for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) == len(epochs)


def test_stopping_anywhere_and_going_on_at_another_data_parallel_size_gives_the_same_batches(mixture):
    whole = list(batches(mixture, CHECKPOINT))
    assert len(whole) == 13
    for stop, dp_size in ((0, 2), (1, 3), (5, 4), (7, 6), (11, 12), (12, 1), (13, 2)):
        shares = [
            list(
                batches(
                    mixture,
                    CHECKPOINT,
                    progress=Progress(iteration=stop, num_samples=12 * stop),
                    dp_rank=rank,
                    dp_size=dp_size,
                )
            )
            for rank in range(dp_size)
        ]
        rest = list(zip(*shares, strict=True))
        assert len(rest) == 13 - stop
        for expected, parts in zip(whole[stop:], rest, strict=True):
            for field in ("tokens", "loss_mask", "segments", "sample_ids"):
                joined = torch.cat([getattr(part, field) for part in parts])
                assert torch.equal(joined, getattr(expected, field)), field


def test_10_to_the_9_samples_are_ready_in_less_than_a_second_and_take_no_room(tmp_path):
    num_documents, length = 1_000_000, 16_001
    index = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 8, num_documents, num_documents + 1)
    index += np.full(num_documents, length, "<i4").tobytes()
    index += (np.arange(num_documents, dtype="<i8") * 2 * length).tobytes()
    index += np.arange(num_documents + 1, dtype="<i8").tobytes()
    (tmp_path / "d.idx").write_bytes(index)
    with (tmp_path / "d.bin").open("wb") as file:
        file.truncate(2 * length * num_documents)
    run = run_of(tmp_path, f"prefix = '{tmp_path / 'd'}'\nsplit = [98, 1, 1]\ndocument_boundaries = 'reset'")
    data = run.data.model_copy(update={"seq_length": 15})

    tracemalloc.start()
    started = time.process_time()
    samples = open_samples(run.model_copy(update={"data": data}), CHECKPOINT)
    sample = samples[3 * 10**9 + 7]
    seconds = time.process_time() - started
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert len(samples.sources[0]) > 10**9
    assert len(sample.tokens) == 16
    assert seconds < 1
    assert peak < 100_000_000


# --- prefetching


def test_prefetched_items_are_the_items():
    assert list(prefetched(iter(range(50)), 3)) == list(range(50)) == list(prefetched(iter(range(50)), 0))


def test_no_more_is_prepared_than_asked_for():
    taken = []
    ahead = prefetched((taken.append(n) or n for n in range(100)), 2)
    assert next(ahead) == 0
    deadline = time.monotonic() + 5
    while len(taken) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert taken == [0, 1, 2]
    ahead.close()


def test_an_error_in_preparing_comes_where_its_item_would():
    def failing():
        yield 1
        raise DataError("no more")

    ahead = prefetched(failing(), 2)
    assert next(ahead) == 1
    with pytest.raises(DataError, match="no more"):
        next(ahead)


def test_the_thread_ends_when_nobody_takes_any_more():
    ahead = prefetched(chain(range(10**9)), 2)
    assert list(islice(ahead, 3)) == [0, 1, 2]
    ahead.close()
    assert "prefetch" not in {thread.name for thread in threading.enumerate()}
