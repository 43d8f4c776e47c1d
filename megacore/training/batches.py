"""The global batches of a run, and which part of each a data-parallel process sees."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megacore.checkpoint import Checkpoint
from megacore.data import (
    DatasetDescription,
    IndexedDataset,
    MixedSamples,
    SampleSource,
    Split,
    TokenWindows,
    WindowSamples,
    check_token_ids,
    split_tokens,
)
from megacore.data.datasets.instruction import prefixes
from megacore.errors import DataError
from megacore.training.config.run_config import RunConfig
from megacore.training.dataset_vocabulary import require_rows
from megacore.training.instruction_batches import collated, micro_batch_lengths, open_instruction_samples
from megacore.training.progress import Progress
from megacore.training.span import START, spans_of


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


def open_dataset(prefix: Path, checkpoint: Checkpoint) -> IndexedDataset:
    """Open a dataset of the run; what it was tokenized with must fit the checkpoint, where the dataset says so.

    Raises:
        DataError: when it does not fit, or cannot be read.
    """
    of_conversations, _ = prefixes(prefix)
    if not Path(f"{prefix}.idx").is_file() and Path(f"{of_conversations}.idx").is_file():
        raise DataError(f'{prefix}: holds conversations: set data.kind = "instruction" to train on them')
    dataset = IndexedDataset(prefix)
    require_rows(prefix, DatasetDescription.read(prefix), checkpoint)
    return dataset


def open_samples(run: RunConfig, checkpoint: Checkpoint, split: Split = "train") -> MixedSamples:
    """The samples of the run to train, to validate or to test on.

    Raises:
        DataError: a dataset cannot be read, does not fit the checkpoint, or is too short.
    """
    data = run.data
    weights = data.part_weights(split)
    sources: list[SampleSource] = []
    for entry in data.datasets(split):
        if data.kind == "instruction":
            sources.append(open_instruction_samples(entry.prefix, run, checkpoint))
            continue
        dataset = open_dataset(entry.prefix, checkpoint)
        tokens = None if weights is None else split_tokens(dataset, weights, data.seq_length)[split]
        windows = TokenWindows(dataset, data.seq_length, tokens=tokens)
        sources.append(
            WindowSamples(windows, resets_at_documents=data.resets_at_documents, eod_mask_loss=data.eod_mask_loss)
        )
    return MixedSamples(sources, [entry.weight for entry in data.datasets(split)], seed=data.seed)


def batches(
    run: RunConfig,
    checkpoint: Checkpoint,
    *,
    samples: MixedSamples | None = None,
    progress: Progress = START,
    dp_rank: int = 0,
    dp_size: int = 1,
) -> Iterator[Batch]:
    """What data-parallel process ``dp_rank`` of ``dp_size`` sees of the global batches that the run trains on.

    Args:
        samples: of the run, where they are open already.
        progress: how far the run has come; what is left is the same at any ``dp_size``.

    Raises:
        DataError: when a token id is beyond the vocabulary.
    """
    samples = samples or open_samples(run, checkpoint)
    num_samples = progress.num_samples
    for _ in range(progress.iteration, spans_of(run, samples.samples_per_epoch, progress).train_iters):
        size = run.training.batch_sizes.at(num_samples)
        share = size // dp_size
        first = num_samples + dp_rank * share
        yield batch_of(samples, range(first, first + share), run, checkpoint)
        num_samples += size


def batch_of(
    samples: MixedSamples, numbers: Sequence[int], run: RunConfig, checkpoint: Checkpoint, split: Split = "train"
) -> Batch:
    """The samples of these ``numbers``, of which ``samples`` are those of ``split``.

    Raises:
        DataError: when a token id is beyond the vocabulary.
    """
    named = " or ".join(str(entry.prefix) for entry in run.data.datasets(split))
    rows = [samples[number] for number in numbers]
    lengths = micro_batch_lengths(run, rows) if run.data.variable_seq_lengths else None
    tokens, loss_mask, segments = collated(rows, max(lengths) if lengths else run.data.seq_length)
    return Batch(
        tokens=check_token_ids(tokens, checkpoint.manifest.config["vocab_size"], named),
        loss_mask=loss_mask,
        sample_ids=torch.tensor(numbers),
        segments=segments,
        micro_batch_lengths=lengths,
    )
