"""Grouped-query self-attention with rotary positions or linear biases."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megacore.config import ModelConfig
from megacore.model.dropout import Dropout
from megacore.model.kernels import AttentionKernel, attention_kernel, compile_disabled
from megacore.model.positions import Positions, local_heads
from megacore.model.rotary import apply_rotary
from megacore.parallel import ColumnParallelLinear, ParallelContext, RowParallelLinear


@dataclass(frozen=True)
class AttentionOptions:
    """Settings of attention that do not change its mathematics.

    Attributes:
        kernel: Implementation that computes the heads' outputs.
        dropout: Dropout of the attention probabilities.
        recompute: True to recompute everything between the two projections in the backward pass instead of keeping it.
    """

    kernel: AttentionKernel = field(default_factory=attention_kernel)
    dropout: Dropout = field(default_factory=Dropout)
    recompute: bool = False


class SelfAttention(nn.Module):
    """Causal self-attention in which ``queries_per_kv`` query heads share one key-value head.

    Grouped-query attention is from Ainslie et al., 2023, arXiv:2305.13245.

    ``linear_qkv`` is ``[kv_groups, (queries_per_kv + 2) * head_dim, hidden_size]``: the query heads, the key and the
    value of each group. ``linear_proj`` is ``[hidden_size, kv_groups, queries_per_kv * head_dim]``. Tensor parallelism
    cuts both between groups. With more ranks than groups it cuts between the query heads of a group, and each rank of
    the group has a replica of its key and value.
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
            attended = self._attend_with_recomputation(qkv, positions)
        else:
            attended = self.attend(qkv, positions)
        output: Tensor = self.linear_proj(attended)
        return output

    # In a compiled layer whose parameters are DTensors a checkpoint fails in torch 2.13.
    @compile_disabled
    def _attend_with_recomputation(self, qkv: Tensor, positions: Positions) -> Tensor:
        # Dropout draws its masks from its own seeds, so no generator state has to be restored.
        attended: Tensor = checkpoint(self.attend, qkv, positions, use_reentrant=False, preserve_rng_state=False)
        return attended

    def attend(self, qkv: Tensor, positions: Positions) -> Tensor:
        """Return the outputs of this rank's heads, ``[batch, sequence, local_heads * head_dim]``."""
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
    @compile_disabled
    def _attend_with_dropout(self, query: Tensor, key: Tensor, value: Tensor, positions: Positions) -> Tensor:
        dropout = self.options.dropout
        with dropout.seeded(positions.sample_ids, self.first_head, device=query.device):
            return self.options.kernel(query, key, value, positions.mask, dropout.probability, positions.segments)

    def split_heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Split ``[batch, sequence, local_rows]`` into query, key and value, ``[batch, sequence, heads, head_dim]``."""
        groups = torch.unflatten(qkv, -1, (-1, self.queries_per_kv + 2, self.head_dim))
        return groups[..., :-2, :].flatten(2, 3), groups[..., -2, :], groups[..., -1, :]
