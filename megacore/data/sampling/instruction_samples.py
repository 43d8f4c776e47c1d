"""Training samples of conversations, padded or packed, with the loss on the assistant's tokens."""

from __future__ import annotations

import copy
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from megacore.data.datasets.instruction import InstructionDataset, Role
from megacore.data.sampling.packing import PackedRows, pack
from megacore.data.sampling.samples import Sample
from megacore.errors import DataError

PADDING = 0
"""The token id of padding. Every vocabulary has it; it has no loss, and no target with a loss comes after it. So a
tokenizer needs no padding token."""


class InstructionSamples:
    """Conversations as samples of up to ``seq_length`` inputs.

    Without packing, a sample is one conversation; with packing it is several, each a segment. The weight of a target is
    1 if it is the assistant's, else ``scalar_loss_mask``; it is 0 for padding and for the first token of a conversation
    that follows another one. Padding stands at the end of a row; in a packed row it is a segment of its own.

    Packing keeps 4 bytes per conversation and 8 per row in memory, and is the same on every process: see
    :func:`~megacore.data.sampling.packing.pack`.

    Args:
        packing: Put several conversations into a sample.
        scalar_loss_mask: Loss weight of targets that are not the assistant's.
        overlong: Treatment of a conversation of more than ``seq_length + 1`` tokens.
        pads: Pad all samples to ``seq_length``; otherwise each is as long as its contents.

    Attributes:
        num_overlong: Number of conversations that were truncated or dropped.
        num_short: Number of dropped conversations of less than two tokens, which have nothing to predict.
        num_cut_short: Number of dropped conversations which would have no target after truncation.
        num_conversations: Number of remaining conversations.
        fill: Average share of ``seq_length`` that is not padding.

    Raises:
        DataError: No conversation is left.
    """

    def __init__(
        self,
        dataset: InstructionDataset,
        seq_length: int,
        *,
        packing: bool = False,
        scalar_loss_mask: float = 0.0,
        overlong: Literal["truncate", "drop"] = "truncate",
        pads: bool = True,
    ) -> None:
        self.dataset = dataset
        self.seq_length = seq_length
        self.scalar_loss_mask = scalar_loss_mask
        self.pads = pads
        is_overlong = dataset.lengths > seq_length + 1
        is_short = dataset.lengths < 2
        self.num_overlong, self.num_short = int(is_overlong.sum()), int(is_short.sum())
        is_kept = ~(is_short | is_overlong) if overlong == "drop" else ~is_short
        self.num_cut_short = 0
        if overlong == "truncate" and scalar_loss_mask == 0:
            for number in np.flatnonzero(is_overlong):
                _, roles = dataset[int(number)]
                is_kept[number] = (roles[1 : seq_length + 1] == Role.ASSISTANT).any()
            self.num_cut_short = int((~is_kept).sum()) - self.num_short
        numbers = np.flatnonzero(is_kept)
        if len(dataset) < 2**31:
            numbers = numbers.astype(np.int32)  # half the memory
        self.num_conversations = len(numbers)
        if not len(numbers):
            cut_short = f" ({self.num_cut_short} with none of the assistant's before that)" * bool(self.num_cut_short)
            raise DataError(
                f"{dataset.prefix}: none of its {len(dataset)} conversations can be used: {self.num_overlong} have "
                f"more than {seq_length + 1} tokens{cut_short}, {self.num_short} less than two; raise data.seq_length"
                + (', or set data.overlong = "truncate"' if overlong == "drop" else "")
            )
        lengths = np.minimum(dataset.lengths[numbers], seq_length + 1)
        self._rows = PackedRows(numbers, np.arange(len(numbers) + 1))  # one per row
        if packing:
            packed = pack(lengths, seq_length + 1)
            is_complete = numbers[-1] == len(numbers) - 1
            self._rows = packed if is_complete else PackedRows(numbers[packed.items], packed.starts)
        # All tokens of a row but the last are inputs.
        self.fill = (int(lengths.sum(dtype=np.int64)) - len(self._rows)) / (len(self._rows) * seq_length)
        self.packing = packing

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Sample:
        conversations = [self._conversation(int(number)) for number in self._rows[index]]
        tokens = np.concatenate([ids for ids, _ in conversations])
        weights = np.concatenate([weights for _, weights in conversations])
        segments = None
        if self.packing:
            lengths = [len(ids) for ids, _ in conversations]
            segments = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)[:-1]
        sample = Sample(tokens, weights[1:], segments)
        return padded(sample, self.seq_length) if self.pads else sample

    def with_scalar_loss_mask(self, scalar_loss_mask: float) -> InstructionSamples:
        """Return the same samples with another loss weight of the tokens that are not the assistant's."""
        samples = copy.copy(self)
        samples.scalar_loss_mask = scalar_loss_mask
        return samples

    def _conversation(self, number: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Return the ids of a conversation and their loss weights; the first has none, since nothing predicts it."""
        ids, roles = (part[: self.seq_length + 1] for part in self.dataset[number])
        weights = np.where(roles == Role.ASSISTANT, 1.0, self.scalar_loss_mask).astype(np.float32)
        weights[0] = 0.0
        return ids.astype(np.int64), weights


def padded(sample: Sample, length: int) -> Sample:
    """Return the sample with padding at its end, so that it has ``length`` inputs."""
    missing = length - len(sample.loss_mask)
    assert missing >= 0
    segments = sample.segments
    if segments is not None and missing:
        segments = np.pad(segments, (0, missing), constant_values=segments[-1] + 1)
    return Sample(
        np.pad(sample.tokens, (0, missing), constant_values=PADDING), np.pad(sample.loss_mask, (0, missing)), segments
    )
