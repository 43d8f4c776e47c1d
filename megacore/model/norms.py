"""Normalization over the hidden axis; every rank holds the whole weight."""

from __future__ import annotations

from torch import Tensor

from megacore.config import ModelConfig
from megacore.errors import ConfigError
from megacore.model.kernels import norm_kernels
from megacore.parallel import ParallelContext, ReplicatedModule


class RMSNorm(ReplicatedModule):
    """``x / sqrt(mean(x^2) + eps) * weight``, in float32 or wider (Zhang and Sennrich, 2019, arXiv:1910.07467)."""

    def __init__(self, config: ModelConfig, parallel: ParallelContext) -> None:
        super().__init__(parallel)
        self.eps = config.norm_eps
        self.kernels = norm_kernels()
        self.declare("weight", (config.hidden_size,))

    def forward(self, hidden: Tensor) -> Tensor:
        return self.kernels.rms_norm(hidden, self.replicated("weight"), self.eps)


class LayerNorm(ReplicatedModule):
    """``(x - mean) / sqrt(variance + eps) * weight + bias`` (Ba et al., 2016, arXiv:1607.06450)."""

    def __init__(self, config: ModelConfig, parallel: ParallelContext) -> None:
        super().__init__(parallel)
        self.eps = config.norm_eps
        self.kernels = norm_kernels()
        self.declare("weight", (config.hidden_size,))
        self.declare("bias", (config.hidden_size,))

    def forward(self, hidden: Tensor) -> Tensor:
        return self.kernels.layer_norm(hidden, self.replicated("weight"), self.replicated("bias"), self.eps)


def build_norm(config: ModelConfig, parallel: ParallelContext) -> RMSNorm | LayerNorm:
    """Return the norm that ``config.norm`` names. Raise :class:`ConfigError` if it is not implemented."""
    norms: dict[str, type[RMSNorm | LayerNorm]] = {"rmsnorm": RMSNorm, "layernorm": LayerNorm}
    if config.norm not in norms:
        raise ConfigError(f"norm {config.norm!r} is not implemented; implemented: {', '.join(norms)}")
    return norms[config.norm](config, parallel)
