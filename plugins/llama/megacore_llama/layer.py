"""The Llama layer."""

from __future__ import annotations

from torch import Tensor, nn

from megacore import ModelConfig
from megacore.model import GatedMLP, HiddenDropout, Positions, RMSNorm, SelfAttention
from megacore.parallel import ParallelContext


class LlamaLayer(nn.Module):
    """Sequential attention and MLP, each with a norm before it and a residual around it."""

    def __init__(self, config: ModelConfig, parallel: ParallelContext) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config, parallel)
        self.self_attention = SelfAttention(config, parallel)
        self.post_attention_dropout = HiddenDropout(parallel)
        self.pre_mlp_layernorm = RMSNorm(config, parallel)
        self.mlp = GatedMLP(config, parallel)
        self.post_mlp_dropout = HiddenDropout(parallel)

    def forward(self, hidden: Tensor, positions: Positions) -> Tensor:
        attended = self.self_attention(self.input_layernorm(hidden), positions)
        hidden = hidden + self.post_attention_dropout(attended, positions.sample_ids)
        transformed = self.mlp(self.pre_mlp_layernorm(hidden))
        residual: Tensor = self.post_mlp_dropout(transformed, positions.sample_ids)
        return hidden + residual
