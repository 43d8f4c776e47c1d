"""The global batches of a run, and which part of each a data-parallel process sees."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megacore.checkpoint import Checkpoint
from megacore.data import DatasetDescription, IndexedDataset, SampleOrder, TokenWindows, check_token_ids
from megacore.errors import DataError
from megacore.training.instruction_batches import collated, micro_batch_lengths, open_instruction_samples
from megacore.training.run_config import RunConfig


@dataclass(frozen=True)
class Batch:
    """What one data-parallel process sees of a global batch.

    Attributes:
        tokens: token ids, ``[samples, sequence + 1]``.
        loss_mask: what each target counts for in the loss, ``[samples, sequence]``; 0 for one not to be learned.
        sample_ids: the number of each sample among all of the run, ``[samples]``.
        segments: the number of each input token's segment, ``[samples, sequence]``, int32, never falling: tokens attend
            to those of their own segment only, and their positions count from its beginning. ``None`` where each sample
            is one.
        micro_batch_lengths: how many inputs of its samples each micro-batch needs, the others being padding; ``None``
            where it needs all.
    """

    tokens: Tensor
    loss_mask: Tensor
    sample_ids: Tensor
    segments: Tensor | None = None
    micro_batch_lengths: tuple[int, ...] | None = None


def open_dataset(run: RunConfig, checkpoint: Checkpoint) -> IndexedDataset:
    """Open the run's dataset; what it was tokenized with must fit the checkpoint, where the dataset says so.

    Raises:
        DataError: when it does not fit, or cannot be read.
    """
    dataset = IndexedDataset(run.data.prefix)
    description = DatasetDescription.read(run.data.prefix)
    vocab_size = checkpoint.manifest.config["vocab_size"]
    if description is not None and description.vocab_size > vocab_size:
        raise DataError(
            f"the dataset {run.data.prefix} was made with a tokenizer of {description.vocab_size} ids, and the "
            f"checkpoint's vocabulary has {vocab_size}: tokenize with the checkpoint's own tokenizer"
        )
    return dataset


def batches(run: RunConfig, checkpoint: Checkpoint, *, dp_rank: int = 0, dp_size: int = 1) -> Iterator[Batch]:
    """What data-parallel process ``dp_rank`` of ``dp_size`` sees of the run's global batches.

    Raises:
        DataError: when a token id is beyond the vocabulary.
    """
    if run.data.kind == "instruction":
        yield from _instruction_batches(run, checkpoint, dp_rank=dp_rank, dp_size=dp_size)
        return
    windows = TokenWindows(open_dataset(run, checkpoint), run.data.seq_length)
    order = SampleOrder(len(windows), run.data.seed)
    size = run.training.global_batch_size
    share = size // dp_size
    vocab_size = checkpoint.manifest.config["vocab_size"]
    for iteration in range(run.training.train_iters):
        first = iteration * size + dp_rank * share
        numbers = range(first, first + share)
        tokens = torch.stack([torch.from_numpy(windows[order[number]]) for number in numbers])
        yield Batch(
            tokens=check_token_ids(tokens, vocab_size, str(run.data.prefix)),
            loss_mask=torch.ones(share, run.data.seq_length),
            sample_ids=torch.tensor(numbers),
        )


def _instruction_batches(run: RunConfig, checkpoint: Checkpoint, *, dp_rank: int, dp_size: int) -> Iterator[Batch]:
    """As :func:`batches`, of conversations."""
    all_samples = open_instruction_samples(run, checkpoint)
    order = SampleOrder(len(all_samples), run.data.seed)
    size = run.training.global_batch_size
    share = size // dp_size
    vocab_size = checkpoint.manifest.config["vocab_size"]
    for iteration in range(run.training.train_iters):
        first = iteration * size + dp_rank * share
        numbers = range(first, first + share)
        samples = [all_samples[order[number]] for number in numbers]
        lengths = micro_batch_lengths(run, samples) if run.data.variable_seq_lengths else None
        tokens, loss_mask, segments = collated(samples, max(lengths) if lengths else run.data.seq_length)
        yield Batch(
            tokens=check_token_ids(tokens, vocab_size, str(run.data.prefix)),
            loss_mask=loss_mask,
            sample_ids=torch.tensor(numbers),
            segments=segments,
            micro_batch_lengths=lengths,
        )
