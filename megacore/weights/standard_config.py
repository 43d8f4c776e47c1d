"""The keys that most decoders have in a Hugging Face ``config.json``, and their defaults in transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megacore.config import ModelConfig, RotaryScaling
from megacore.errors import ConfigError
from megacore.weights.rotary_settings import ROTARY_METHODS, rotary_from_hf, rotary_to_hf

ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu"}
"""``hidden_act`` to megacore's name."""


def standard_config_from_hf(
    published: Mapping[str, Any], *, family: str, rotary_methods: Mapping[str, type[RotaryScaling]] = ROTARY_METHODS
) -> ModelConfig:
    """Read a parsed ``config.json``.

    Args:
        published: the parsed file.
        family: that it is read for.
        rotary_methods: see :func:`megacore.weights.rotary_from_hf`.

    Raises:
        ConfigError: for what is not implemented, by name.
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
    """The ``config.json`` of ``config``, the inverse of :func:`standard_config_from_hf`.

    Raises:
        ConfigError: for a model that the keys cannot describe.
    """
    if config.qkv_bias != config.attention_output_bias:
        raise ConfigError("the format has one attention_bias for both projections, and this model has a bias on one")
    names = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
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
