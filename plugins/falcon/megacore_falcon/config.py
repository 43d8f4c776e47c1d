"""The configuration of a Falcon: the fields that only this family has."""

from __future__ import annotations

from dataclasses import dataclass

from megacore import ModelConfig
from megacore.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class FalconConfig(ModelConfig):
    """The configuration of a Falcon of any generation.

    Attributes:
        new_decoder_architecture: True for Falcon 40B and later, which have grouped key-value heads.
        parallel_attention: True if attention and MLP read the same residual and are added to it together.
        num_layer_norms: Number of norms in a layer: 1 that attention and MLP share, or one for each.
    """

    new_decoder_architecture: bool
    parallel_attention: bool
    num_layer_norms: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_layer_norms not in ((1, 2) if self.parallel_attention else (2,)):
            raise ConfigError(
                f"a Falcon layer with parallel_attention {self.parallel_attention} "
                f"cannot have {self.num_layer_norms} norms"
            )
