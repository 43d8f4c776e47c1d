"""A standard decoder in Meta's own format: tensor names, and the keys of ``params.json``.

The keys are those of ``ModelArgs`` in Meta's published loaders. Two sizes are not among them: the width of the MLP
follows from the hidden size, by :func:`ffn_width`; the context length is known for the family only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megacore.config import ModelConfig
from megacore.errors import ConfigError
from megacore.weights.rules import Copy, FusedQKV, Stacked, WeightMap

DEFAULT_MULTIPLE_OF = 256
DEFAULT_NORM_EPS = 1e-5
DEFAULT_ROPE_THETA = 10000.0

_CONFIG_KEYS = frozenset(
    ("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of", "ffn_dim_multiplier", "norm_eps",
     "rope_theta")
)  # fmt: skip
_LOADER_KEYS = frozenset(("max_batch_size", "max_seq_len", "model_parallel_size"))  # they do not describe the model
_FFN_KEYS = ("multiple_of", "ffn_dim_multiplier")


def meta_map(config: ModelConfig) -> WeightMap:
    """Return the weight map. Raises :class:`ConfigError` if the format cannot describe the model."""
    _check_expressible(config)
    layer, source = "decoder.layers.*", "layers.*"
    query, key, value = (f"{source}.attention.w{part}.weight" for part in "qkv")
    gate, down, up = (f"{source}.feed_forward.w{number}.weight" for number in (1, 2, 3))
    return WeightMap(
        Copy("embedding.word_embeddings.weight", "tok_embeddings.weight"),
        Copy(f"{layer}.input_layernorm.weight", f"{source}.attention_norm.weight"),
        FusedQKV(f"{layer}.self_attention.linear_qkv.weight", q=query, k=key, v=value),
        Copy(f"{layer}.self_attention.linear_proj.weight", f"{source}.attention.wo.weight"),
        Copy(f"{layer}.pre_mlp_layernorm.weight", f"{source}.ffn_norm.weight"),
        Stacked(f"{layer}.mlp.linear_fc1.weight", gate=gate, up=up),
        Copy(f"{layer}.mlp.linear_fc2.weight", down),
        Copy("decoder.final_layernorm.weight", "norm.weight"),
        Copy("output_layer.weight", "output.weight"),
        ignored=("rope.freqs", "layers.*.attention.inner_attention.rope.freqs"),  # tables in older files
    )


def ffn_width(dim: int, *, multiple_of: int, ffn_dim_multiplier: float | None) -> int:
    """Return the width of the gated MLP, as ``FeedForward`` in Meta's ``model.py`` computes it.

    It is two thirds of ``4 dim``, so that three matrices have as many elements as the two of a plain MLP (Shazeer,
    2020, arXiv:2002.05202), times ``ffn_dim_multiplier``, rounded up to a multiple of ``multiple_of``.
    """
    width = int(2 * (4 * dim) / 3)
    if ffn_dim_multiplier is not None:
        width = int(ffn_dim_multiplier * width)
    return multiple_of * ((width + multiple_of - 1) // multiple_of)


def config_from_meta(published: Mapping[str, Any], *, family: str, max_position_embeddings: int) -> ModelConfig:
    """Read ``published``, a parsed ``params.json`` whose ``vocab_size`` is the true one.

    Raises :class:`ConfigError`, naming a key that is not implemented.
    """
    if unknown := [key for key, value in published.items() if key not in _CONFIG_KEYS | _LOADER_KEYS and value]:
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
        ffn_hidden_size=_ffn_width(published),
        num_attention_heads=heads,
        num_kv_heads=_or_default(published, "n_kv_heads", heads),
        head_dim=dim // heads,
        vocab_size=published["vocab_size"],
        max_position_embeddings=max_position_embeddings,
        norm_eps=_or_default(published, "norm_eps", DEFAULT_NORM_EPS),
        rope_theta=_or_default(published, "rope_theta", DEFAULT_ROPE_THETA),
    )


def config_to_meta(config: ModelConfig) -> dict[str, Any]:
    """Return the ``params.json`` of ``config``, the inverse of :func:`config_from_meta`.

    Raises :class:`ConfigError` if the format cannot describe the model.
    """
    _check_expressible(config)
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


def _check_expressible(config: ModelConfig) -> None:
    """Raise :class:`ConfigError`, listing every property that the format has no key or tensor for."""
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
    if found := [obstacle for obstacle, is_present in obstacles.items() if is_present]:
        raise ConfigError(f"Meta's format cannot hold this model: it has no way to say {', '.join(found)}")


def merged_params(original: Mapping[str, Any], params: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``params`` of :func:`config_to_meta` with the spelling and further keys of ``original``, if they agree.

    ``original`` is the file of the checkpoint that was converted, or empty. A key that the first loaders do not know is
    left out while it has the value that they assume.
    """
    merged = {**original, **params}
    if original and _ffn_width({**original, "dim": params["dim"]}) == _ffn_width(params):
        for key in _FFN_KEYS:
            merged.pop(key, None)
        merged |= {key: original[key] for key in _FFN_KEYS if key in original}
    elif "ffn_dim_multiplier" not in params:
        merged.pop("ffn_dim_multiplier", None)
    for key, assumed in {"n_kv_heads": params["n_heads"], "rope_theta": DEFAULT_ROPE_THETA}.items():
        if key not in original and merged[key] == assumed:
            del merged[key]
    return merged


def _or_default(published: Mapping[str, Any], key: str, default: Any) -> Any:
    """Return the value of ``key``, or ``default`` if it is absent or null, which Meta's loaders treat alike."""
    value = published.get(key)
    return default if value is None else value


def _ffn_width(published: Mapping[str, Any]) -> int:
    return ffn_width(
        published["dim"],
        multiple_of=_or_default(published, "multiple_of", DEFAULT_MULTIPLE_OF),
        ffn_dim_multiplier=published.get("ffn_dim_multiplier"),
    )


def _ffn_settings(dim: int, width: int) -> dict[str, Any]:
    """Return keys for which :func:`ffn_width` is ``width``: the usual ones, or the shortest multiplier."""
    if ffn_width(dim, multiple_of=DEFAULT_MULTIPLE_OF, ffn_dim_multiplier=None) == width:
        return {"multiple_of": DEFAULT_MULTIPLE_OF}
    multiple_of = width & -width  # the largest power of two that divides width
    unscaled = int(2 * (4 * dim) / 3)
    for digits in range(1, 18):
        for multiplier in (round(width / unscaled, digits), round(width / unscaled + 10**-digits, digits)):
            if ffn_width(dim, multiple_of=multiple_of, ffn_dim_multiplier=multiplier) == width:
                return {"multiple_of": multiple_of, "ffn_dim_multiplier": multiplier}
    raise AssertionError(f"no multiplier of {unscaled} gives {width}")
