"""The layer of Llama 2 and Code Llama."""

from __future__ import annotations

from torch import Tensor, nn

from megacore import ModelConfig
from megacore.model import GatedMLP, Positions, RMSNorm, SelfAttention
from megacore.parallel import ParallelContext


class Llama2Layer(nn.Module):
    """Attention and MLP one after the other, each behind its norm and beside its residual.

    The larger sizes share a key-value head among several query heads, which is the attention's business.
    """

    def __init__(self, config: ModelConfig, parallel: ParallelContext) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config, parallel)
        self.self_attention = SelfAttention(config, parallel)
        self.pre_mlp_layernorm = RMSNorm(config, parallel)
        self.mlp = GatedMLP(config, parallel)

    def forward(self, hidden: Tensor, positions: Positions) -> Tensor:
        hidden = hidden + self.self_attention(self.input_layernorm(hidden), positions)
        return hidden + self.mlp(self.pre_mlp_layernorm(hidden))
