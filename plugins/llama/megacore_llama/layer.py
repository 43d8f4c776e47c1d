"""The Llama layer."""

from __future__ import annotations

from torch import Tensor, nn

from megacore import ModelConfig
from megacore.model import GatedMLP, Positions, RMSNorm, SelfAttention
from megacore.parallel import ParallelContext


class LlamaLayer(nn.Module):
    """Attention and MLP one after the other, each behind its norm and beside its residual."""

    def __init__(self, config: ModelConfig, parallel: ParallelContext) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config, parallel)
        self.self_attention = SelfAttention(config, parallel)
        self.pre_mlp_layernorm = RMSNorm(config, parallel)
        self.mlp = GatedMLP(config, parallel)

    def forward(self, hidden: Tensor, positions: Positions) -> Tensor:
        hidden = hidden + self.self_attention(self.input_layernorm(hidden), positions)
        return hidden + self.mlp(self.pre_mlp_layernorm(hidden))
