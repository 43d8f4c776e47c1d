"""Grouped-query self-attention with rotary positions or linear biases."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megacore.config import ModelConfig
from megacore.model.alibi import alibi_mask, alibi_slopes
from megacore.model.dropout import Dropout
from megacore.model.kernels import AttentionKernel, attention_kernel
from megacore.model.rotary import apply_rotary, rotary_table, segmented_rotary_table
from megacore.model.segments import Segments
from megacore.parallel import ColumnParallelLinear, ParallelContext, ParameterSpec, RowParallelLinear

if TYPE_CHECKING:
    from megacore.model.cache import KeyValueCache


@dataclass(frozen=True)
class AttentionOptions:
    """How attention computes.

    Attributes:
        kernel: what computes the heads' outputs.
        dropout: of the attention probabilities.
        recompute: compute what lies between the two projections again in the backward pass, instead of keeping it.
    """

    kernel: AttentionKernel = field(default_factory=attention_kernel)
    dropout: Dropout = field(default_factory=Dropout)
    recompute: bool = False


@dataclass(frozen=True)
class Positions:
    """What the layers need to know of the positions of their tokens, made once for all of them.

    Attributes:
        cos: of the rotary angles, ``[sequence, head_dim]``, with segments ``[batch, sequence, head_dim]``; ``None`` for
            a model without rotary embedding.
        sin: likewise.
        mask: what is added to the scores of this rank's heads, ``[local_heads, sequence, sequence]``, with segments as
            long as the longest; ``None`` where attention is causal and nothing else.
        segments: in which tokens see each other; ``None`` where each row is one.
        sample_ids: the number of each sample among all of the run, ``[batch]``, on the CPU, which dropout draws its
            masks from; ``None`` outside of training.
        cache: of the keys and values of the tokens that came before, while text is generated; what it says of the
            shapes of ``cos``, ``sin`` and ``mask`` holds then. ``None`` where a row is all there is.
    """

    cos: Tensor | None = None
    sin: Tensor | None = None
    mask: Tensor | None = None
    segments: Segments | None = None
    sample_ids: Tensor | None = None
    cache: KeyValueCache | None = None

    @classmethod
    def of(
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
        """The positions 0 to ``sequence_length - 1``, or those in the segments that tokens have the numbers of."""
        segments = Segments.of(segment_numbers, device=device)
        if config.position_embedding == "rotary":
            if segments is None:
                cos, sin = rotary_table(config, sequence_length, device=device, dtype=dtype)
            else:
                tables = segmented_rotary_table(config, segments.lengths, device=device, dtype=dtype)
                cos, sin = (table.unflatten(0, (-1, sequence_length)) for table in tables)
            return cls(cos=cos, sin=sin, segments=segments, sample_ids=sample_ids)
        longest = sequence_length if segments is None else max(segments.lengths)
        first, last = local_heads(config, parallel)
        slopes = alibi_slopes(config.num_attention_heads)[first:last]
        mask = alibi_mask(slopes, longest, config.head_dim**-0.5, device=device, dtype=dtype)
        return cls(mask=mask, segments=segments, sample_ids=sample_ids)


class SelfAttention(nn.Module):
    """Causal self-attention in which ``queries_per_kv`` query heads share one key-value head.

    Grouped-query attention is from Ainslie et al., 2023, arXiv:2305.13245.

    ``linear_qkv`` is ``[kv_groups, (queries_per_kv + 2) * head_dim, hidden_size]``: of each group the query heads, the
    key, the value. ``linear_proj`` is ``[hidden_size, kv_groups, queries_per_kv * head_dim]``. Tensor parallelism cuts
    both between groups; over more ranks than there are groups, between the query heads of a group, and each of its
    ranks has a replica of the key and the value.
    """

    def __init__(self, config: ModelConfig, parallel: ParallelContext) -> None:
        super().__init__()
        groups, queries, head_dim = config.num_kv_heads, config.queries_per_kv, config.head_dim
        self.linear_qkv = ColumnParallelLinear(
            config.hidden_size,
            (groups, (queries + 2) * head_dim),
            shard_dim=0,
            num_subunits=queries,
            num_shared=2 * head_dim,
            bias=config.qkv_bias,
            parallel=parallel,
        )
        self.linear_proj = RowParallelLinear(
            (groups, queries * head_dim),
            config.hidden_size,
            num_subunits=queries,
            bias=config.attention_output_bias,
            parallel=parallel,
        )
        self.queries_per_kv = queries // self.linear_qkv.specs["weight"].ranks_per_unit(parallel.tp_size)
        self.head_dim = head_dim
        self.first_head, _ = local_heads(config, parallel)
        self.options = AttentionOptions()

    def forward(self, hidden: Tensor, positions: Positions) -> Tensor:
        qkv = self.linear_qkv(hidden)
        if self.options.recompute and torch.is_grad_enabled():
            attended = self._attend_twice(qkv, positions)
        else:
            attended = self.attend(qkv, positions)
        return self.linear_proj(attended)

    # In a compiled layer whose parameters are DTensors a checkpoint fails in torch 2.13.
    @torch.compiler.disable
    def _attend_twice(self, qkv: Tensor, positions: Positions) -> Tensor:
        # Dropout draws its mask from seeds of its own, so that no state of a generator has to be put back.
        return checkpoint(self.attend, qkv, positions, use_reentrant=False, preserve_rng_state=False)

    def attend(self, qkv: Tensor, positions: Positions) -> Tensor:
        """What each of this rank's heads attends to, ``[batch, sequence, local_heads * head_dim]``."""
        query, key, value = self.split_heads(qkv)
        if positions.cos is not None and positions.sin is not None:
            query = apply_rotary(query, positions.cos, positions.sin)
            key = apply_rotary(key, positions.cos, positions.sin)
        if positions.cache is not None:
            return positions.cache.attend(self, query, key, value, positions).flatten(2)
        if self.options.dropout.probability == 0.0 or not self.training:
            return self.options.kernel(query, key, value, positions.mask, 0.0, positions.segments).flatten(2)
        return self._attend_with_dropout(query, key, value, positions).flatten(2)

    # A compiled kernel would not draw from the generator that is seeded here.
    @torch.compiler.disable
    def _attend_with_dropout(self, query: Tensor, key: Tensor, value: Tensor, positions: Positions) -> Tensor:
        dropout = self.options.dropout
        with dropout.seeded(positions.sample_ids, self.first_head, device=query.device):
            return self.options.kernel(query, key, value, positions.mask, dropout.probability, positions.segments)

    def split_heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Take ``[batch, sequence, local_rows]`` apart: query, key, value, ``[batch, sequence, heads, head_dim]``."""
        groups = qkv.unflatten(-1, (-1, self.queries_per_kv + 2, self.head_dim))
        return groups[..., :-2, :].flatten(2, 3), groups[..., -2, :], groups[..., -1, :]


def local_heads(config: ModelConfig, parallel: ParallelContext) -> tuple[int, int]:
    """The half-open range of query heads that this rank computes."""
    heads = ParameterSpec((config.num_kv_heads, config.queries_per_kv), 0, 1, num_subunits=config.queries_per_kv)
    return heads.subunit_bounds(parallel.tp_size, parallel.tp_rank)
