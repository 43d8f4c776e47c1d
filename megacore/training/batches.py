"""The samples and batches of a run: opening the datasets, and the part of each global batch that a process sees."""

from __future__ import annotations

import math
import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from megacore.checkpoint import Checkpoint
from megacore.data import (
    DatasetDescription,
    IndexedDataset,
    InstructionDataset,
    InstructionDescription,
    InstructionSamples,
    MixedSamples,
    Sample,
    SampleSource,
    Split,
    TokenWindows,
    WindowSamples,
    check_token_ids,
    split_tokens,
)
from megacore.data.datasets.instruction import prefixes
from megacore.data.sampling.instruction_samples import padded
from megacore.errors import DataError
from megacore.training.config import DataSection, RunConfig
from megacore.training.schedule import START, Progress, resolve_spans

Item = TypeVar("Item")

_LENGTH_MULTIPLE = 16
"""Samples of variable length are padded to a multiple of this, as Megatron-LLM does; kernels are faster then."""


@dataclass(frozen=True)
class Batch:
    """The part of a global batch that one data-parallel process sees.

    Attributes:
        tokens: Token ids, ``[samples, sequence + 1]``.
        loss_mask: Loss weight of each target, ``[samples, sequence]``; 0 for a target that is not learned.
        sample_ids: Number of each sample among all of the run, ``[samples]``.
        segments: Segment number of each input token, ``[samples, sequence]``, int32, never falling: tokens attend only
            within their own segment, and positions count from its beginning. ``None`` if each sample is one segment.
        micro_batch_lengths: Number of inputs that each micro-batch needs, the rest being padding; ``None`` if it needs
            all.
    """

    tokens: Tensor
    loss_mask: Tensor
    sample_ids: Tensor
    segments: Tensor | None = None
    micro_batch_lengths: tuple[int, ...] | None = None


class SplitSamples:
    """The samples of each split of a run. A split is opened on first use and then kept.

    Opening may pack a whole dataset, so it is done once per process; a pickled copy opens its own.
    """

    def __init__(self, run: RunConfig, checkpoint: Checkpoint) -> None:
        self._run, self._checkpoint = run, checkpoint
        self._opened: dict[Split, MixedSamples] = {}

    def __getitem__(self, split: Split) -> MixedSamples:
        if split not in self._opened:
            self._opened[split] = open_samples(self._run, self._checkpoint, split)
        return self._opened[split]

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_opened": {}}


def open_samples(run: RunConfig, checkpoint: Checkpoint, split: Split = "train") -> MixedSamples:
    """Open the samples of a split.

    Raises:
        DataError: when a dataset cannot be read, does not fit the checkpoint, or is too short.
    """
    data = run.data
    weights = data.part_weights(split)
    sources: list[SampleSource] = []
    for entry in data.datasets(split):
        if data.kind == "instruction":
            sources.append(_open_instruction_samples(entry.prefix, data, checkpoint))
            continue
        dataset = _open_dataset(entry.prefix, checkpoint)
        tokens = None if weights is None else split_tokens(dataset, weights, data.seq_length)[split]
        windows = TokenWindows(dataset, data.seq_length, tokens=tokens)
        sources.append(
            WindowSamples(windows, resets_at_documents=data.resets_at_documents, eod_mask_loss=data.eod_mask_loss)
        )
    return MixedSamples(sources, [entry.weight for entry in data.datasets(split)], seed=data.seed)


def _open_dataset(prefix: Path, checkpoint: Checkpoint) -> IndexedDataset:
    """Open a dataset of text, whose vocabulary must fit the checkpoint where the dataset records it.

    Raises:
        DataError: when it does not fit, or cannot be read.
    """
    text_prefix, _ = prefixes(prefix)
    if not Path(f"{prefix}.idx").is_file() and Path(f"{text_prefix}.idx").is_file():
        raise DataError(f'{prefix}: holds conversations: set data.kind = "instruction" to train on them')
    dataset = IndexedDataset(prefix)
    require_rows(prefix, DatasetDescription.read(prefix), checkpoint)
    return dataset


def _open_instruction_samples(prefix: Path, data: DataSection, checkpoint: Checkpoint) -> InstructionSamples:
    """Open a dataset of conversations, whose vocabulary must fit the checkpoint where the dataset records it.

    Raises:
        DataError: when it does not fit, cannot be read, or gives no sample.
    """
    require_rows(prefix, InstructionDescription.read(prefix), checkpoint)
    return InstructionSamples(
        InstructionDataset(prefix),
        data.seq_length,
        packing=data.packing,
        scalar_loss_mask=data.scalar_loss_mask,
        overlong=data.overlong,
        pads=not data.variable_seq_lengths,
    )


def require_rows(
    prefix: Path, description: DatasetDescription | InstructionDescription | None, checkpoint: Checkpoint
) -> None:
    """Refuse a dataset with more ids than the model has rows, where the dataset records their number.

    Raises:
        DataError: says what to do.
    """
    vocab_size = checkpoint.manifest.config["vocab_size"]
    if description is not None and description.vocab_size > vocab_size:
        raise DataError(
            f"the dataset {prefix} was made with a tokenizer of {description.vocab_size} ids, and the checkpoint's "
            f"vocabulary has {vocab_size}: tokenize with the checkpoint's own tokenizer, and with --no-new-tokens or, "
            "where new tokens are wanted, give the model rows for them: "
            f"`megacore split {checkpoint.path} --out … --add-tokens {prefix}`"
        )


def batches(
    run: RunConfig,
    checkpoint: Checkpoint,
    *,
    samples: MixedSamples | None = None,
    train_iters: int | None = None,
    progress: Progress = START,
    dp_rank: int = 0,
    dp_size: int = 1,
) -> Iterator[Batch]:
    """Yield the part that data-parallel process ``dp_rank`` of ``dp_size`` sees of each global batch to train on.

    Args:
        run: The run.
        checkpoint: The checkpoint that the run starts from.
        samples: The training samples; by default they are opened.
        train_iters: The length of the run; by default it is resolved from the run file.
        progress: How far the run has come; the rest is the same at any ``dp_size``.
        dp_rank: The rank of this process.
        dp_size: The number of data-parallel processes.

    Raises:
        DataError: when a token id is beyond the vocabulary.
    """
    samples = samples or open_samples(run, checkpoint)
    if train_iters is None:
        train_iters = resolve_spans(run, samples.samples_per_epoch, progress).train_iters
    num_samples = progress.num_samples
    for _ in range(progress.iteration, train_iters):
        size = run.training.batch_sizes.at(num_samples)
        share = size // dp_size
        first = num_samples + dp_rank * share
        yield make_batch(samples, range(first, first + share), run, checkpoint)
        num_samples += size


def make_batch(
    samples: MixedSamples, numbers: Sequence[int], run: RunConfig, checkpoint: Checkpoint, split: Split = "train"
) -> Batch:
    """Put the ``samples`` of ``split`` at the positions ``numbers`` into a batch.

    Raises:
        DataError: when a token id is beyond the vocabulary.
    """
    named = " or ".join(str(entry.prefix) for entry in run.data.datasets(split))
    rows = [samples[number] for number in numbers]
    lengths = _micro_batch_lengths(run, rows) if run.data.variable_seq_lengths else None
    length = max(lengths) if lengths else run.data.seq_length
    padded_rows = [padded(row, length) for row in rows]
    segments = [row.segments for row in padded_rows if row.segments is not None]
    tokens = torch.from_numpy(np.stack([row.tokens for row in padded_rows]))
    return Batch(
        tokens=check_token_ids(tokens, checkpoint.manifest.config["vocab_size"], named),
        loss_mask=torch.from_numpy(np.stack([row.loss_mask for row in padded_rows])),
        sample_ids=torch.tensor(numbers),
        segments=torch.from_numpy(np.stack(segments)) if segments else None,
        micro_batch_lengths=lengths,
    )


def _micro_batch_lengths(run: RunConfig, samples: Sequence[Sample]) -> tuple[int, ...]:
    """Return the length that each micro-batch of ``samples`` is padded to.

    The longest sample decides: of the micro-batch or, with pipeline parallelism, of all micro-batches, since the shape
    that stages exchange is fixed for a whole step.
    """
    size = len(samples) if run.parallel.pipeline_parallel > 1 else run.training.micro_batch_size
    multiple = math.lcm(_LENGTH_MULTIPLE, run.parallel.tensor_parallel if run.parallel.sequence_parallel else 1)
    lengths = [len(sample.loss_mask) for sample in samples]
    longest = [max(lengths[first : first + size]) for first in range(0, len(lengths), size)]
    rounded = [min(-(-length // multiple) * multiple, run.data.seq_length) for length in longest]
    return tuple(rounded[first // size] for first in range(0, len(lengths), run.training.micro_batch_size))


def num_evaluation_samples(run: RunConfig, samples: MixedSamples) -> int:
    """Return the number of ``samples`` that an evaluation uses."""
    iters = run.evaluation.iters
    if iters == "all":
        return samples.samples_per_epoch
    return min(iters * run.training.global_batch_size, samples.samples_per_epoch)


def prefetched(items: Iterator[Item], depth: int) -> Iterator[Item]:
    """Yield ``items``, with up to ``depth`` of them prepared ahead of time by a thread; 0 means no thread.

    An exception of ``items`` is raised in the place of its item. The thread ends with ``items``, or when the iterator
    is closed or collected, and is waited for. torch's DataLoader prefetches in processes, which would open the datasets
    once more each, and concurrent.futures waits for its threads when the interpreter exits, even if one hangs.
    """
    if depth == 0:
        yield from items
        return
    ready: queue.Queue[tuple[bool, object]] = queue.Queue()
    room = threading.Semaphore(depth)
    stopped = threading.Event()

    def prepare() -> None:
        try:
            # Wait for room before the next item, so that no more than ``depth`` items are in memory at a time.
            while room.acquire() and not stopped.is_set():
                try:
                    item = next(items)
                except StopIteration:
                    break
                ready.put((True, item))
        except BaseException as error:
            ready.put((False, error))
        else:
            ready.put((False, None))

    thread = threading.Thread(target=prepare, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            is_item, content = ready.get()
            if not is_item:
                if content is not None:
                    raise cast(BaseException, content)
                return
            room.release()
            yield cast(Item, content)
    finally:
        stopped.set()
        room.release()
        thread.join()
