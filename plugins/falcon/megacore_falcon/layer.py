"""The Falcon layer in the three forms of its generations."""

from __future__ import annotations

from torch import Tensor, nn

from megacore.model import MLP, HiddenDropout, LayerNorm, Positions, SelfAttention
from megacore.parallel import ParallelContext
from megacore_falcon.config import FalconConfig


class FalconLayer(nn.Module):
    """One of three arrangements of attention and MLP::

    parallel, two norms        parallel, one norm         sequential
    (40B, 180B)                (7B, 11B)                  (RW 1B, RW 7B)

    ┌─ x ──────────┐           ┌─ x                       ┌─ x
    │  ↓           ↓           │  ↓                       │  ↓
    │  norm        norm        │  norm ────────┐          │  norm
    │  ↓           ↓           │  ↓            ↓          │  ↓
    │  attention   MLP         │  attention    MLP        │  attention
    │  ↓           ↓           │  ↓            ↓          └→ +
    └→ + ←─────────┘           └→ + ←──────────┘          ┌──┤
                                                          │  ↓
                                                          │  norm, MLP
                                                          │  ↓
                                                          └→ +
    """

    def __init__(self, config: FalconConfig, parallel: ParallelContext) -> None:
        super().__init__()
        self.is_parallel = config.parallel_attention
        self.shares_norm = config.num_layer_norms == 1
        self.input_layernorm = LayerNorm(config, parallel)
        self.self_attention = SelfAttention(config, parallel)
        self.post_attention_dropout = HiddenDropout(parallel)
        if not self.shares_norm:
            self.pre_mlp_layernorm = LayerNorm(config, parallel)
        self.mlp = MLP(config, parallel)
        self.post_mlp_dropout = HiddenDropout(parallel)

    def forward(self, hidden: Tensor, positions: Positions) -> Tensor:
        normed = self.input_layernorm(hidden)
        attended = self.self_attention(normed, positions)
        if self.is_parallel:
            transformed = self.mlp(normed if self.shares_norm else self.pre_mlp_layernorm(hidden))
            transformed = attended + transformed
        else:
            hidden = hidden + self.post_attention_dropout(attended, positions.sample_ids)
            transformed = self.mlp(self.pre_mlp_layernorm(hidden))
        residual: Tensor = self.post_mlp_dropout(transformed, positions.sample_ids)
        return hidden + residual
