"""The feed-forward branch of a layer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from megacore.config import ModelConfig
from megacore.errors import ConfigError
from megacore.parallel import ColumnParallelLinear, ParallelContext, RowParallelLinear

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}


def activation_function(name: str) -> Callable[[Tensor], Tensor]:
    """Return the activation called ``name``. Raise :class:`ConfigError` if it is not implemented."""
    if name not in ACTIVATIONS:
        raise ConfigError(f"activation {name!r} is not implemented; implemented: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


class MLP(nn.Module):
    """``W_2 activation(W_1 x + b_1) + b_2``, where ``linear_fc1`` is ``[ffn_hidden_size, hidden_size]``."""

    def __init__(self, config: ModelConfig, parallel: ParallelContext) -> None:
        super().__init__()
        self.activation = activation_function(config.activation)
        hidden, ffn, bias = config.hidden_size, config.ffn_hidden_size, config.mlp_bias
        self.linear_fc1 = ColumnParallelLinear(hidden, (ffn,), shard_dim=0, bias=bias, parallel=parallel)
        self.linear_fc2 = RowParallelLinear((ffn,), hidden, bias=bias, parallel=parallel)

    def forward(self, hidden: Tensor) -> Tensor:
        output: Tensor = self.linear_fc2(self.activation(self.linear_fc1(hidden)))
        return output


class GatedMLP(nn.Module):
    """``W_down (activation(W_gate x) * W_up x)`` (Shazeer, 2020, arXiv:2002.05202).

    Gate and up projection are one matrix, ``linear_fc1``, ``[2, ffn_hidden_size, hidden_size]``, the gate first.
    """

    def __init__(self, config: ModelConfig, parallel: ParallelContext) -> None:
        super().__init__()
        self.activation = activation_function(config.activation)
        hidden, ffn, bias = config.hidden_size, config.ffn_hidden_size, config.mlp_bias
        self.linear_fc1 = ColumnParallelLinear(hidden, (2, ffn), shard_dim=1, bias=bias, parallel=parallel)
        self.linear_fc2 = RowParallelLinear((ffn,), hidden, bias=bias, parallel=parallel)

    def forward(self, hidden: Tensor) -> Tensor:
        gate, up = self.linear_fc1(hidden).chunk(2, dim=-1)
        output: Tensor = self.linear_fc2(self.activation(gate) * up)
        return output
