"""Falcon in the Hugging Face format: tensor names, and the keys of ``config.json``.

The keys and their defaults are those of ``transformers.FalconConfig``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megacore.errors import ConfigError
from megacore.weights import Copy, FusedQKV, Rule, WeightMap, rotary_from_hf, rotary_to_hf
from megacore_falcon.config import FalconConfig
from megacore_falcon.first_files import in_present_keys

ACTIVATIONS = {"gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu", "silu": "silu"}
"""``activation`` to megacore's name; Falcon's own is the exact GELU."""


def hf_weight_map(config: FalconConfig) -> WeightMap:
    """Return the weight map of the Hugging Face format."""
    rules: list[Rule] = [
        Copy("embedding.word_embeddings.weight", "transformer.word_embeddings.weight"),
        FusedQKV(
            "decoder.layers.*.self_attention.linear_qkv.weight",
            qkv="transformer.h.*.self_attention.query_key_value.weight",
        ),
        Copy("decoder.layers.*.self_attention.linear_proj.weight", "transformer.h.*.self_attention.dense.weight"),
        Copy("decoder.layers.*.mlp.linear_fc1.weight", "transformer.h.*.mlp.dense_h_to_4h.weight"),
        Copy("decoder.layers.*.mlp.linear_fc2.weight", "transformer.h.*.mlp.dense_4h_to_h.weight"),
        Copy("decoder.final_layernorm.weight", "transformer.ln_f.weight"),
        Copy("decoder.final_layernorm.bias", "transformer.ln_f.bias"),
    ]
    for native, published in _norms(config).items():
        rules.append(Copy(f"decoder.layers.*.{native}.weight", f"transformer.h.*.{published}.weight"))
        rules.append(Copy(f"decoder.layers.*.{native}.bias", f"transformer.h.*.{published}.bias"))
    if not config.tie_embeddings:
        rules.append(Copy("output_layer.weight", "lm_head.weight"))
    if config.qkv_bias:
        rules += [
            FusedQKV(
                "decoder.layers.*.self_attention.linear_qkv.bias",
                qkv="transformer.h.*.self_attention.query_key_value.bias",
            ),
            Copy("decoder.layers.*.self_attention.linear_proj.bias", "transformer.h.*.self_attention.dense.bias"),
            Copy("decoder.layers.*.mlp.linear_fc1.bias", "transformer.h.*.mlp.dense_h_to_4h.bias"),
            Copy("decoder.layers.*.mlp.linear_fc2.bias", "transformer.h.*.mlp.dense_4h_to_h.bias"),
        ]
    return WeightMap(
        *rules,
        ignored=("transformer.h.*.self_attention.*rotary*.inv_freq",),  # a table in older checkpoints
        aliases={"lm_head.weight": "transformer.word_embeddings.weight"} if config.tie_embeddings else {},
    )


def _norms(config: FalconConfig) -> dict[str, str]:
    """Return the published name of each norm of a layer."""
    if config.num_layer_norms == 1:
        return {"input_layernorm": "input_layernorm"}
    if config.parallel_attention:
        return {"input_layernorm": "ln_attn", "pre_mlp_layernorm": "ln_mlp"}
    return {"input_layernorm": "input_layernorm", "pre_mlp_layernorm": "post_attention_layernorm"}


def config_from_hf(published: Mapping[str, Any]) -> FalconConfig:
    """Read a parsed ``config.json``. Raises :class:`ConfigError`, naming a setting that is not implemented."""
    published = in_present_keys(published)
    activation = published.get("activation", "gelu")
    if activation not in ACTIVATIONS:
        raise ConfigError(f"activation {activation!r} is not implemented; implemented: {', '.join(ACTIVATIONS)}")
    if published.get("apply_residual_connection_post_layernorm"):
        raise ConfigError("apply_residual_connection_post_layernorm true is not implemented")
    hidden_size, heads = published["hidden_size"], published["num_attention_heads"]
    if hidden_size % heads:
        raise ConfigError(f"hidden_size ({hidden_size}) must be a multiple of num_attention_heads ({heads})")
    new_architecture = bool(published.get("new_decoder_architecture", False))
    parallel_attention = bool(published.get("parallel_attn", True))
    num_norms = published.get("num_ln_in_parallel_attn")
    if new_architecture:
        kv_heads = published.get("num_kv_heads") or heads
        num_norms = 2 if num_norms is None else num_norms
        if not parallel_attention:
            raise ConfigError("parallel_attn false with new_decoder_architecture is not implemented")
    else:
        kv_heads = 1 if published.get("multi_query", True) else heads
        if num_norms not in (None, 1):
            raise ConfigError(
                f"num_ln_in_parallel_attn {num_norms} without new_decoder_architecture is not implemented"
            )
        num_norms = 1 if parallel_attention else 2
    bias = bool(published.get("bias", False))
    alibi = bool(published.get("alibi", False))
    theta, scaling = (10000.0, None) if alibi else rotary_from_hf(published)
    return FalconConfig(
        family="falcon",
        num_layers=published["num_hidden_layers"],
        hidden_size=hidden_size,
        ffn_hidden_size=published.get("ffn_hidden_size") or 4 * hidden_size,
        num_attention_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=hidden_size // heads,
        vocab_size=published["vocab_size"],
        max_position_embeddings=published.get("max_position_embeddings", 2048),
        norm_eps=published.get("layer_norm_epsilon", 1e-5),
        norm="layernorm",
        activation=ACTIVATIONS[activation],
        position_embedding="alibi" if alibi else "rotary",
        rope_theta=theta,
        rope_scaling=scaling,
        tie_embeddings=published.get("tie_word_embeddings", True),
        qkv_bias=bias,
        attention_output_bias=bias,
        mlp_bias=bias,
        new_decoder_architecture=new_architecture,
        parallel_attention=parallel_attention,
        num_layer_norms=num_norms,
    )


def config_to_hf(config: FalconConfig) -> dict[str, Any]:
    """Return the ``config.json`` of ``config``, the inverse of :func:`config_from_hf`."""
    names = {native: published for published, native in ACTIVATIONS.items()}
    if config.new_decoder_architecture:
        heads = {"num_kv_heads": config.num_kv_heads, "num_ln_in_parallel_attn": config.num_layer_norms}
    else:  # num_kv_heads has no meaning there: the value of the published file is kept
        heads = {"multi_query": config.num_kv_heads == 1}
    return {
        "architectures": ["FalconForCausalLM"],
        "model_type": "falcon",
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": config.ffn_hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_position_embeddings,
        "layer_norm_epsilon": config.norm_eps,
        "activation": names[config.activation],
        "alibi": config.position_embedding == "alibi",
        **rotary_to_hf(config),
        "tie_word_embeddings": config.tie_embeddings,
        "bias": config.qkv_bias,
        "new_decoder_architecture": config.new_decoder_architecture,
        "parallel_attn": config.parallel_attention,
        **heads,
    }
