"""Grouped-query self-attention with rotary positions or linear biases."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from megacore.config import ModelConfig
from megacore.model.alibi import alibi_mask, alibi_slopes
from megacore.model.rotary import apply_rotary, rotary_table
from megacore.parallel import ColumnParallelLinear, ParallelContext, RowParallelLinear, chunk_bounds


@dataclass(frozen=True)
class Positions:
    """What attention needs to know of the positions, made once for all layers.

    Attributes:
        cos: of the rotary angles, ``[sequence, head_dim]``; ``None`` for a model without rotary embedding.
        sin: likewise.
        mask: what is added to the scores of this rank's heads, ``[local_heads, sequence, sequence]``; ``None`` where
            attention is causal and nothing else.
    """

    cos: Tensor | None = None
    sin: Tensor | None = None
    mask: Tensor | None = None

    @classmethod
    def of(
        cls,
        config: ModelConfig,
        sequence_length: int,
        parallel: ParallelContext,
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> Positions:
        """The positions 0 to ``sequence_length - 1``."""
        if config.position_embedding == "rotary":
            cos, sin = rotary_table(config, sequence_length, device=device, dtype=dtype)
            return cls(cos=cos, sin=sin)
        first, last = chunk_bounds(config.num_kv_heads, parallel.tp_size, parallel.tp_rank)
        heads = slice(first * config.queries_per_kv, last * config.queries_per_kv)
        slopes = alibi_slopes(config.num_attention_heads)[heads]
        return cls(mask=alibi_mask(slopes, sequence_length, config.head_dim**-0.5, device=device, dtype=dtype))


class SelfAttention(nn.Module):
    """Causal self-attention in which ``queries_per_kv`` query heads share one key-value head.

    Grouped-query attention is from Ainslie et al., 2023, arXiv:2305.13245.

    ``linear_qkv`` is ``[kv_groups, (queries_per_kv + 2) * head_dim, hidden_size]``: of each group the query heads, the
    key, the value. ``linear_proj`` is ``[hidden_size, kv_groups, queries_per_kv * head_dim]``. Tensor parallelism cuts
    both between groups.
    """

    def __init__(self, config: ModelConfig, parallel: ParallelContext) -> None:
        super().__init__()
        groups, queries, head_dim = config.num_kv_heads, config.queries_per_kv, config.head_dim
        self.queries_per_kv = queries
        self.head_dim = head_dim
        self.linear_qkv = ColumnParallelLinear(
            config.hidden_size, (groups, (queries + 2) * head_dim), shard_dim=0, bias=config.qkv_bias, parallel=parallel
        )
        self.linear_proj = RowParallelLinear(
            (groups, queries * head_dim), config.hidden_size, bias=config.attention_output_bias, parallel=parallel
        )

    def forward(self, hidden: Tensor, positions: Positions) -> Tensor:
        query, key, value = self.split_heads(self.linear_qkv(hidden))
        if positions.cos is not None and positions.sin is not None:
            query = apply_rotary(query, positions.cos, positions.sin)
            key = apply_rotary(key, positions.cos, positions.sin)
        attended = F.scaled_dot_product_attention(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            attn_mask=positions.mask,
            is_causal=positions.mask is None,
            enable_gqa=True,
        )
        return self.linear_proj(attended.transpose(1, 2).flatten(2))

    def split_heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Take ``[batch, sequence, local_rows]`` apart: query, key, value, ``[batch, sequence, heads, head_dim]``."""
        groups = qkv.unflatten(-1, (-1, self.queries_per_kv + 2, self.head_dim))
        return groups[..., :-2, :].flatten(2, 3), groups[..., -2, :], groups[..., -1, :]
