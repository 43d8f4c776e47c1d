"""``params.json``, the configuration file of Meta's own format, and what it leaves to be known.

The keys are those of ``ModelArgs`` in Meta's published loaders. The width of the MLP is not among them: it follows
from the hidden size, by :func:`ffn_width`. Nor is the context length, which is the family's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megacore.config import ModelConfig
from megacore.errors import ConfigError

DEFAULT_MULTIPLE_OF = 256
DEFAULT_NORM_EPS = 1e-5
DEFAULT_ROPE_THETA = 10000.0

_READ = frozenset(
    ("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of", "ffn_dim_multiplier", "norm_eps",
     "rope_theta")
)  # fmt: skip
_OF_THE_LOADER = frozenset(("max_batch_size", "max_seq_len", "model_parallel_size"))
"""Keys that say how much memory to set aside, nothing about the model."""

_FFN_KEYS = ("multiple_of", "ffn_dim_multiplier")


def ffn_width(dim: int, *, multiple_of: int, ffn_dim_multiplier: float | None) -> int:
    """The width of the gated MLP, as ``FeedForward`` in Meta's ``model.py`` computes it.

    Two thirds of ``4 dim``, so that three matrices have as many elements as the two of a plain MLP (Shazeer, 2020,
    arXiv:2002.05202); times ``ffn_dim_multiplier``; rounded up to a multiple of ``multiple_of``.
    """
    width = int(2 * (4 * dim) / 3)
    if ffn_dim_multiplier is not None:
        width = int(ffn_dim_multiplier * width)
    return multiple_of * ((width + multiple_of - 1) // multiple_of)


def config_from_meta(published: Mapping[str, Any], *, family: str, max_position_embeddings: int) -> ModelConfig:
    """Read a parsed ``params.json`` whose ``vocab_size`` is the real one.

    Args:
        published: the parsed file.
        family: that it is read for.
        max_position_embeddings: the family's context length, which the file does not have.

    Raises:
        ConfigError: for a key that asks for something that is not implemented, by name.
    """
    unknown = [key for key, value in published.items() if key not in _READ | _OF_THE_LOADER and value]
    if unknown:
        raise ConfigError(
            f"params.json asks for {', '.join(sorted(unknown))}, which {family} in Meta's format does not implement"
        )
    dim, heads = published["dim"], published["n_heads"]
    if dim % heads:
        raise ConfigError(f"params.json: dim {dim} is not a multiple of n_heads {heads}")
    return ModelConfig(
        family=family,
        num_layers=published["n_layers"],
        hidden_size=dim,
        ffn_hidden_size=_ffn_width_of(published),
        num_attention_heads=heads,
        num_kv_heads=_or_default(published, "n_kv_heads", heads),
        head_dim=dim // heads,
        vocab_size=published["vocab_size"],
        max_position_embeddings=max_position_embeddings,
        norm_eps=_or_default(published, "norm_eps", DEFAULT_NORM_EPS),
        rope_theta=_or_default(published, "rope_theta", DEFAULT_ROPE_THETA),
    )


def config_to_meta(config: ModelConfig) -> dict[str, Any]:
    """The ``params.json`` of ``config``, the inverse of :func:`config_from_meta`.

    Raises:
        ConfigError: when the model has something that the format cannot say.
    """
    check_expressible(config)
    return {
        "dim": config.hidden_size,
        "n_layers": config.num_layers,
        "n_heads": config.num_attention_heads,
        "n_kv_heads": config.num_kv_heads,
        "vocab_size": config.vocab_size,
        **_ffn_settings(config.hidden_size, config.ffn_hidden_size),
        "norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
    }


def check_expressible(config: ModelConfig) -> None:
    """Refuse a model that Meta's format cannot describe.

    Raises:
        ConfigError: names everything that it has no key or tensor for.
    """
    obstacles = {
        f"norm {config.norm}": config.norm != "rmsnorm",
        f"activation {config.activation}": config.activation != "silu",
        f"position embedding {config.position_embedding}": config.position_embedding != "rotary",
        "scaled rotary embedding": config.rope_scaling is not None,
        "head tied to the embedding": config.tie_embeddings,
        "biases": config.qkv_bias or config.attention_output_bias or config.mlp_bias,
        f"{config.num_attention_heads} heads of {config.head_dim} in a hidden size of {config.hidden_size}": (
            config.num_attention_heads * config.head_dim != config.hidden_size
        ),
    }
    if found := [what for what, present in obstacles.items() if present]:
        raise ConfigError(f"Meta's format cannot hold this model: it has no way to say {', '.join(found)}")


def merged_params(came_with: Mapping[str, Any], params: Mapping[str, Any]) -> dict[str, Any]:
    """What to write: ``params``, in the words of the file that the weights came with where those say the same.

    A key that the first loaders do not know is left out while its value is what they assume.
    """
    merged = {**came_with, **params}
    if came_with and _ffn_width_of({**came_with, "dim": params["dim"]}) == _ffn_width_of(params):
        for key in _FFN_KEYS:
            merged.pop(key, None)
        merged |= {key: came_with[key] for key in _FFN_KEYS if key in came_with}
    elif "ffn_dim_multiplier" not in params:
        merged.pop("ffn_dim_multiplier", None)
    for key, assumed in {"n_kv_heads": params["n_heads"], "rope_theta": DEFAULT_ROPE_THETA}.items():
        if key not in came_with and merged[key] == assumed:
            del merged[key]
    return merged


def _or_default(published: Mapping[str, Any], key: str, default: Any) -> Any:
    """The value of ``key``; Meta's loaders take ``null`` for absent."""
    value = published.get(key)
    return default if value is None else value


def _ffn_width_of(published: Mapping[str, Any]) -> int:
    return ffn_width(
        published["dim"],
        multiple_of=_or_default(published, "multiple_of", DEFAULT_MULTIPLE_OF),
        ffn_dim_multiplier=published.get("ffn_dim_multiplier"),
    )


def _ffn_settings(dim: int, width: int) -> dict[str, Any]:
    """The keys from which :func:`ffn_width` makes ``width``: the usual ones, or the shortest multiplier that does."""
    if ffn_width(dim, multiple_of=DEFAULT_MULTIPLE_OF, ffn_dim_multiplier=None) == width:
        return {"multiple_of": DEFAULT_MULTIPLE_OF}
    multiple_of = width & -width  # the largest power of two that divides it
    unscaled = int(2 * (4 * dim) / 3)
    for digits in range(1, 18):
        for multiplier in (round(width / unscaled, digits), round(width / unscaled + 10**-digits, digits)):
            if ffn_width(dim, multiple_of=multiple_of, ffn_dim_multiplier=multiplier) == width:
                return {"multiple_of": multiple_of, "ffn_dim_multiplier": multiplier}
    raise AssertionError(f"no multiplier of {unscaled} gives {width}")
