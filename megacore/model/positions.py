"""The positions of tokens: rotary angles or linear biases, the segments of packed rows, and the sample ids."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from megacore.config import ModelConfig
from megacore.model.alibi import alibi_mask, alibi_slopes
from megacore.model.rotary import rotary_table, segmented_rotary_table
from megacore.parallel import ParallelContext, ParameterSpec


@dataclass(frozen=True)
class Segments:
    """The segments of a micro-batch, whose tokens attend to their own segment only; the end of a row ends a segment.

    Attributes:
        lengths: Length of each segment in tokens, in the order of all rows.
        boundaries: Offset of each segment among the tokens of all rows, and the end of the last one,
            ``[segments + 1]``, int32, on the device of the model.
    """

    lengths: tuple[int, ...]
    boundaries: Tensor

    @classmethod
    def from_numbers(cls, numbers: Tensor | None, *, device: torch.device) -> Segments | None:
        """Return the segments from each token's segment number, ``[batch, sequence]``; ``None`` if each row is one."""
        if numbers is None:
            return None
        begins = torch.ones_like(numbers, dtype=torch.bool)
        begins[:, 1:] = numbers[:, 1:] != numbers[:, :-1]
        boundaries = torch.cat([begins.flatten().nonzero().squeeze(-1), torch.tensor([numbers.numel()])])
        if len(boundaries) == len(numbers) + 1:
            return None
        return cls(tuple(boundaries.diff().tolist()), boundaries.to(device, torch.int32))


class AttentionCache(Protocol):
    """The cache of keys and values as attention sees it; see :class:`~megacore.model.KeyValueCache`."""

    def attend(
        self, attention: nn.Module, query: Tensor, key: Tensor, value: Tensor, positions: Positions
    ) -> Tensor: ...


@dataclass(frozen=True)
class Positions:
    """The positions of the tokens of a micro-batch, computed once for all layers.

    Attributes:
        cos: Cosines of the rotary angles, ``[sequence, head_dim]``, with segments ``[batch, sequence, head_dim]``;
            ``None`` for a model without rotary embedding.
        sin: Sines of the rotary angles, with the shape of ``cos``.
        mask: Mask added to the scores of this rank's heads, ``[local_heads, sequence, sequence]``, with segments as
            long as the longest; ``None`` where attention is causal and nothing else.
        segments: Segments that tokens attend within; ``None`` if each row is one segment.
        sample_ids: Number of each sample in the run, ``[batch]``, on the CPU, from which dropout draws its masks;
            ``None`` outside of training.
        cache: Keys and values of earlier tokens during generation, which then defines the shapes of ``cos``, ``sin``
            and ``mask``; ``None`` if the rows are complete.
    """

    cos: Tensor | None = None
    sin: Tensor | None = None
    mask: Tensor | None = None
    segments: Segments | None = None
    sample_ids: Tensor | None = None
    cache: AttentionCache | None = None

    @classmethod
    def for_sequences(
        cls,
        config: ModelConfig,
        sequence_length: int,
        parallel: ParallelContext,
        *,
        device: torch.device,
        dtype: torch.dtype,
        segment_numbers: Tensor | None = None,
        sample_ids: Tensor | None = None,
    ) -> Positions:
        """Return the positions 0 to ``sequence_length - 1``, or positions that restart in each segment."""
        segments = Segments.from_numbers(segment_numbers, device=device)
        if config.position_embedding == "rotary":
            if segments is None:
                cos, sin = rotary_table(config, sequence_length, device=device, dtype=dtype)
            else:
                tables = segmented_rotary_table(config, segments.lengths, device=device, dtype=dtype)
                cos, sin = (table.view(-1, sequence_length, table.shape[-1]) for table in tables)
            return cls(cos=cos, sin=sin, segments=segments, sample_ids=sample_ids)
        longest = sequence_length if segments is None else max(segments.lengths)
        slopes = alibi_slopes(config.num_attention_heads)[slice(*local_heads(config, parallel))]
        mask = alibi_mask(slopes, longest, config.head_dim**-0.5, device=device, dtype=dtype)
        return cls(mask=mask, segments=segments, sample_ids=sample_ids)


def local_heads(config: ModelConfig, parallel: ParallelContext) -> tuple[int, int]:
    """Return the half-open range of query heads that this rank computes."""
    heads = ParameterSpec((config.num_kv_heads, config.queries_per_kv), 0, 1, num_subunits=config.queries_per_kv)
    return heads.subunit_bounds(parallel.tp_size, parallel.tp_rank)
