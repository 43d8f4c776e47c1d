"""The model configuration: sizes, heads, norm, activation, rotary embedding and biases of any decoder."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from megacore.errors import ConfigError


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


MAX_SIZE = 2**31
"""The upper bound of every size. Real models are far below; a larger value would overflow in some later place."""

POSITION_EMBEDDINGS = ("rotary", "alibi")


@dataclass(frozen=True, kw_only=True)
class RotaryScaling:
    """A method that extends the rotary embedding to contexts longer than in training. Each method is a subclass."""

    method: ClassVar[str]

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if value is not None and not _is_number(value) and not isinstance(value, bool):
                raise ConfigError(f"{name} of {self.method} rotary scaling must be a number, not {value!r}")
            if name == "factor" and not value > 0:
                raise ConfigError(f"factor of {self.method} rotary scaling must be above 0; it is {value!r}")

    def to_dict(self) -> dict[str, Any]:
        return {"method": self.method, **dataclasses.asdict(self)}


@dataclass(frozen=True, kw_only=True)
class LinearScaling(RotaryScaling):
    """Linear scaling: positions are divided by ``factor`` (kaiokendev, 2023)."""

    method = "linear"
    factor: float


@dataclass(frozen=True, kw_only=True)
class DynamicNtkScaling(RotaryScaling):
    """Dynamic NTK: the base grows with sequences over ``max_position_embeddings`` (bloc97, emozilla, 2023)."""

    method = "dynamic_ntk"
    factor: float


@dataclass(frozen=True, kw_only=True)
class YarnScaling(RotaryScaling):
    """YaRN: NTK-by-parts interpolation and a softer attention (Peng et al., 2023, arXiv:2309.00071)."""

    method = "yarn"
    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


@dataclass(frozen=True, kw_only=True)
class FrequencyBandScaling(RotaryScaling):
    """Scaling by frequency band: low frequencies are divided by ``factor``, high ones kept, those between blended.

    From Grattafiori et al., 2024, arXiv:2407.21783.
    """

    method = "frequency_band"
    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


SCALING_METHODS: dict[str, type[RotaryScaling]] = {
    scaling.method: scaling for scaling in (LinearScaling, DynamicNtkScaling, YarnScaling, FrequencyBandScaling)
}


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The architecture of one model. A family that needs more subclasses it in its plugin.

    ``head_dim`` need not be ``hidden_size / num_attention_heads``. ``num_kv_heads`` key-value heads each serve
    ``num_attention_heads / num_kv_heads`` query heads: equal numbers are multi-head attention, 1 is multi-query.

    Raises:
        ConfigError: if no decoder can have these sizes.
    """

    family: str
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    norm_eps: float
    norm: str = "rmsnorm"
    activation: str = "silu"
    position_embedding: str = "rotary"
    rope_theta: float = 10000.0
    rope_scaling: RotaryScaling | None = None
    tie_embeddings: bool = False
    qkv_bias: bool = False
    attention_output_bias: bool = False
    mlp_bias: bool = False

    def __post_init__(self) -> None:
        for name in ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_kv_heads",
                     "head_dim", "vocab_size", "max_position_embeddings"):  # fmt: skip
            size = getattr(self, name)
            if not isinstance(size, int) or isinstance(size, bool) or not 0 < size < MAX_SIZE:
                raise ConfigError(f"{name} must be a whole number above 0 and below {MAX_SIZE}, not {size!r}")
        for name in ("norm_eps", "rope_theta"):
            value = getattr(self, name)
            if not _is_number(value) or not 0 < value < math.inf:
                raise ConfigError(f"{name} must be a number above 0, not {value!r}")
        if self.position_embedding not in POSITION_EMBEDDINGS:
            raise ConfigError(
                f"position_embedding {self.position_embedding!r} is not implemented; "
                f"implemented: {', '.join(POSITION_EMBEDDINGS)}"
            )
        if self.num_attention_heads % self.num_kv_heads:
            raise ConfigError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"num_kv_heads ({self.num_kv_heads})"
            )
        if self.position_embedding == "rotary" and self.head_dim % 2:
            raise ConfigError(f"head_dim must be even, since the rotary embedding rotates pairs; it is {self.head_dim}")

    @property
    def queries_per_kv(self) -> int:
        """Number of query heads that share one key-value head."""
        return self.num_attention_heads // self.num_kv_heads

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON values; :meth:`from_dict` is the inverse."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        if self.rope_scaling is not None:
            fields["rope_scaling"] = self.rope_scaling.to_dict()
        return fields

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Self:
        """Return the configuration that :meth:`to_dict` wrote. Raises :class:`ConfigError` for an unknown field."""
        fields = dict(fields)
        scaling = fields.get("rope_scaling")
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(fields) - known):
            raise ConfigError(
                f"{cls.__name__} has no {', '.join(unknown)}: was this written by a newer version of the plugin?"
            )
        if missing := sorted(
            field.name
            for field in dataclasses.fields(cls)
            if field.default is dataclasses.MISSING and field.name not in fields
        ):
            raise ConfigError(f"the model configuration lacks {', '.join(missing)}")
        if scaling is not None:
            scaling = dict(scaling)
            method = scaling.pop("method", None)
            if method not in SCALING_METHODS:
                raise ConfigError(f"unknown rope_scaling method {method!r}; known: {', '.join(SCALING_METHODS)}")
            try:
                fields["rope_scaling"] = SCALING_METHODS[method](**scaling)
            except TypeError as error:
                raise ConfigError(f"rope_scaling does not fit method {method!r}: {error}") from error
        return cls(**fields)
