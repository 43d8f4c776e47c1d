"""The global batches of a run on conversations."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from megacore.checkpoint import Checkpoint
from megacore.data import InstructionDataset, InstructionDescription, InstructionSamples, Sample
from megacore.data.sampling.instruction_samples import padded
from megacore.training.config.run_config import RunConfig
from megacore.training.dataset_vocabulary import require_rows

_STEP = 16
"""Samples of variable length are padded to a multiple of it, as Megatron-LLM does, which kernels like."""


def open_instruction_samples(prefix: Path, run: RunConfig, checkpoint: Checkpoint) -> InstructionSamples:
    """The samples of a dataset; what it was tokenized with must fit the checkpoint, where the dataset says so.

    Raises:
        DataError: when it does not fit, cannot be read, or gives no sample.
    """
    data = run.data
    require_rows(prefix, InstructionDescription.read(prefix), checkpoint)
    return InstructionSamples(
        InstructionDataset(prefix),
        data.seq_length,
        packing=data.packing,
        scalar_loss_mask=data.scalar_loss_mask,
        overlong=data.overlong,
        pads=not data.variable_seq_lengths,
    )


def instruction_notes(run: RunConfig, samples: InstructionSamples) -> Iterator[str]:
    """What a person should know of the samples before the run starts."""
    prefix, length = samples.dataset.prefix, run.data.seq_length
    unit = "packed rows" if run.data.packing else "samples"
    yield (
        f"{prefix}: {samples.num_conversations:,} conversations in {len(samples):,} {unit}, {samples.fill:.1%} of "
        f"their {length} tokens filled"
    )
    if samples.num_overlong:
        done = "truncated" if run.data.overlong == "truncate" else "dropped"
        yield f"{prefix}: {samples.num_overlong:,} conversations of more than {length + 1} tokens are {done}"
    if samples.num_cut_short:
        yield (
            f"{prefix}: {samples.num_cut_short:,} conversations are left out, of whose first {length + 1} tokens none "
            "is the assistant's"
        )
    if samples.num_short:
        yield f"{prefix}: {samples.num_short:,} conversations of less than two tokens are dropped"


def micro_batch_lengths(run: RunConfig, samples: Sequence[Sample]) -> tuple[int, ...]:
    """How long each micro-batch of a process's ``samples`` is padded to.

    The longest of the samples decides, of the micro-batch or, with pipeline parallelism, whose stages are told the
    shape of what they pass on for a whole step, of all.
    """
    size = len(samples) if run.parallel.pipeline_parallel > 1 else run.training.micro_batch_size
    step = math.lcm(_STEP, run.parallel.tensor_parallel if run.parallel.sequence_parallel else 1)
    lengths = [len(sample.loss_mask) for sample in samples]
    longest = [max(lengths[first : first + size]) for first in range(0, len(lengths), size)]
    in_steps = [min(-(-length // step) * step, run.data.seq_length) for length in longest]
    return tuple(in_steps[first // size] for first in range(0, len(lengths), run.training.micro_batch_size))


def collated(samples: Sequence[Sample], length: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The tokens, the loss masks and, where the samples have them, the segments, padded to ``length`` inputs."""
    all_padded = [padded(sample, length) for sample in samples]
    segments = [sample.segments for sample in all_padded if sample.segments is not None]
    return (
        torch.from_numpy(np.stack([sample.tokens for sample in all_padded])),
        torch.from_numpy(np.stack([sample.loss_mask for sample in all_padded])),
        torch.from_numpy(np.stack(segments)) if segments else None,
    )
