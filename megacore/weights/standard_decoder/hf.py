"""A standard decoder in the Hugging Face format: tensor names, and the keys of ``config.json``.

The keys' defaults are those of transformers. :func:`rotary_from_hf` and :func:`rotary_to_hf` serve any family whose
``config.json`` has transformers' rotary settings.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from megacore.config import DynamicNtkScaling, LinearScaling, ModelConfig, RotaryScaling, YarnScaling
from megacore.errors import ConfigError
from megacore.weights.rules import Copy, FusedQKV, Rule, Stacked, WeightMap

ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu"}
"""``hidden_act`` to megacore's name."""

ROTARY_METHODS: Mapping[str, type[RotaryScaling]] = {
    "linear": LinearScaling,
    "dynamic": DynamicNtkScaling,
    "yarn": YarnScaling,
}
"""``rope_type`` to the scaling class, for the methods that several families share."""


def standard_hf_map(config: ModelConfig) -> WeightMap:
    """Return the weight map of layers with two norms, separate query, key and value, and a gated MLP."""
    layer, source = "decoder.layers.*", "model.layers.*"
    rules: list[Rule] = [
        Copy("embedding.word_embeddings.weight", "model.embed_tokens.weight"),
        Copy(f"{layer}.input_layernorm.weight", f"{source}.input_layernorm.weight"),
        Copy(f"{layer}.pre_mlp_layernorm.weight", f"{source}.post_attention_layernorm.weight"),
        Copy("decoder.final_layernorm.weight", "model.norm.weight"),
    ]
    if not config.tie_embeddings:
        rules.append(Copy("output_layer.weight", "lm_head.weight"))
    for kind in ("weight", "bias") if config.qkv_bias else ("weight",):
        query, key, value = (f"{source}.self_attn.{part}_proj.{kind}" for part in "qkv")
        rules.append(FusedQKV(f"{layer}.self_attention.linear_qkv.{kind}", q=query, k=key, v=value))
    for kind in ("weight", "bias") if config.attention_output_bias else ("weight",):
        rules.append(Copy(f"{layer}.self_attention.linear_proj.{kind}", f"{source}.self_attn.o_proj.{kind}"))
    for kind in ("weight", "bias") if config.mlp_bias else ("weight",):
        gate, up, down = (f"{source}.mlp.{part}_proj.{kind}" for part in ("gate", "up", "down"))
        rules += [
            Stacked(f"{layer}.mlp.linear_fc1.{kind}", gate=gate, up=up),
            Copy(f"{layer}.mlp.linear_fc2.{kind}", down),
        ]
    return WeightMap(
        *rules,
        ignored=("model.layers.*.self_attn.rotary_emb.inv_freq",),  # a table in older checkpoints
        aliases={"lm_head.weight": "model.embed_tokens.weight"} if config.tie_embeddings else {},
    )


def standard_config_from_hf(
    published: Mapping[str, Any], *, family: str, rotary_methods: Mapping[str, type[RotaryScaling]] = ROTARY_METHODS
) -> ModelConfig:
    """Read ``published``, a parsed ``config.json``, whose scaling is one of ``rotary_methods``.

    Raises :class:`ConfigError`, naming a setting that is not implemented.
    """
    activation = published.get("hidden_act", "silu")
    if activation not in ACTIVATIONS:
        raise ConfigError(f"hidden_act {activation!r} is not implemented; implemented: {', '.join(ACTIVATIONS)}")
    heads = published["num_attention_heads"]
    theta, scaling = rotary_from_hf(published, rotary_methods)
    attention_bias = published.get("attention_bias", False)
    return ModelConfig(
        family=family,
        num_layers=published["num_hidden_layers"],
        hidden_size=published["hidden_size"],
        ffn_hidden_size=published["intermediate_size"],
        num_attention_heads=heads,
        num_kv_heads=published.get("num_key_value_heads") or heads,
        head_dim=published.get("head_dim") or published["hidden_size"] // heads,
        vocab_size=published["vocab_size"],
        max_position_embeddings=published.get("max_position_embeddings", 2048),
        norm_eps=published.get("rms_norm_eps", 1e-6),
        activation=ACTIVATIONS[activation],
        rope_theta=theta,
        rope_scaling=scaling,
        tie_embeddings=published.get("tie_word_embeddings", False),
        qkv_bias=attention_bias,
        attention_output_bias=attention_bias,
        mlp_bias=published.get("mlp_bias", False),
    )


def standard_config_to_hf(
    config: ModelConfig,
    *,
    architecture: str,
    model_type: str,
    rotary_methods: Mapping[str, type[RotaryScaling]] = ROTARY_METHODS,
) -> dict[str, Any]:
    """Return the ``config.json`` of ``config``, the inverse of :func:`standard_config_from_hf`.

    Raises :class:`ConfigError` if the keys cannot describe the model.
    """
    if config.qkv_bias != config.attention_output_bias:
        raise ConfigError("the format has one attention_bias for both projections, and this model has a bias on one")
    names = {native: published for published, native in reversed(ACTIVATIONS.items())}
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.norm_eps,
        "hidden_act": names[config.activation],
        **rotary_to_hf(config, rotary_methods),
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": config.qkv_bias,
        "mlp_bias": config.mlp_bias,
    }


def rotary_from_hf(
    published: Mapping[str, Any], methods: Mapping[str, type[RotaryScaling]] = ROTARY_METHODS
) -> tuple[float, RotaryScaling | None]:
    """Read the rotary base and its scaling from ``published``, a parsed ``config.json`` of transformers 4 or 5.

    ``methods`` has the scaling class of each ``rope_type``; a family adds its own to :data:`ROTARY_METHODS`.
    Raises :class:`ConfigError`, naming the ``rope_type`` or the setting that is not implemented.
    """
    parameters = dict(published.get("rope_scaling") or published.get("rope_parameters") or {})
    rope_type = parameters.pop("rope_type", None) or parameters.pop("type", None) or "default"
    parameters.pop("type", None)
    theta = float(parameters.pop("rope_theta", None) or published.get("rope_theta") or 10000.0)
    partial = parameters.pop("partial_rotary_factor", None) or published.get("partial_rotary_factor")
    if partial not in (None, 1.0):
        raise ConfigError(f"partial_rotary_factor {partial} is not implemented: the whole head is rotated")
    if rope_type == "default":
        return theta, None
    if rope_type not in methods:
        raise ConfigError(
            f"rope_type {rope_type!r} is not implemented; implemented: default, {', '.join(sorted(methods))}"
        )
    method = methods[rope_type]
    fields = {field.name for field in dataclasses.fields(method)}
    if "original_max_position_embeddings" in fields:
        key, longest = "original_max_position_embeddings", published.get("max_position_embeddings", 2048)
        parameters[key] = published.get(key) or parameters.get(key) or longest
        if parameters.get("factor") is None:
            parameters["factor"] = longest / parameters[key]
    parameters = {key: value for key, value in parameters.items() if value is not None}
    if unknown := sorted(set(parameters) - fields):
        raise ConfigError(f"rope_type {rope_type!r} with {', '.join(unknown)} is not implemented")
    try:
        return theta, method(**parameters)
    except TypeError as error:
        raise ConfigError(f"rope_type {rope_type!r} is incomplete in config.json: {error}") from error


def rotary_to_hf(config: ModelConfig, methods: Mapping[str, type[RotaryScaling]] = ROTARY_METHODS) -> dict[str, Any]:
    """Return the rotary settings in the spelling of transformers 4 and of 5, the inverse of :func:`rotary_from_hf`."""
    scaling: dict[str, Any] | None = None
    if config.rope_scaling is not None:
        name = next(name for name, method in methods.items() if isinstance(config.rope_scaling, method))
        settings = dataclasses.asdict(config.rope_scaling)
        scaling = {"rope_type": name, **{key: value for key, value in settings.items() if value is not None}}
    return {
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling,
        "rope_parameters": {"rope_theta": config.rope_theta, **(scaling or {"rope_type": "default"})},
    }
