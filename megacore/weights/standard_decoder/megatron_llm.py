"""A standard decoder in the format megatron-llm: tensor names, the order of QKV rows, the saved arguments.

A family with another norm or MLP builds its map from :func:`common_rules`, and its configuration from
:func:`common_config_fields` and :func:`common_args`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megacore.config import LinearScaling, ModelConfig
from megacore.errors import ConfigError
from megacore.weights.rules import Copy, FusedQKV, Rule, SwappedHalves, WeightMap, half_from_interleaved_rows

GATED_ACTIVATIONS = {"swiglu": "silu", "geglu": "gelu", "reglu": "relu"}
"""``glu_activation`` to megacore's name of the gate's activation."""


def interleaved_qkv_rows(config: ModelConfig) -> list[int]:
    """Return the ``qkv_permutation`` of the format: grouped as megacore's, with interleaved rotary pairs."""
    return half_from_interleaved_rows(
        queries_per_kv=config.queries_per_kv, kv_heads=config.num_kv_heads, head_dim=config.head_dim
    )


def common_rules(config: ModelConfig) -> list[Rule]:
    """Return the rules for any norm and MLP. Raises :class:`ConfigError` if the format cannot describe the model."""
    _check_expressible(config)
    layer, source = "decoder.layers.*", "encoder.layers.*"
    return [
        Copy("embedding.word_embeddings.weight", "embedding.word_embeddings.weight"),
        Copy(f"{layer}.input_layernorm.weight", f"{source}.input_layernorm.weight"),
        FusedQKV(f"{layer}.self_attention.linear_qkv.weight", qkv=f"{source}.self_attention.query_key_value.weight"),
        Copy(f"{layer}.self_attention.linear_proj.weight", f"{source}.self_attention.dense.weight"),
        Copy(f"{layer}.mlp.linear_fc2.weight", f"{source}.mlp.dense_4h_to_h.weight"),
        Copy("decoder.final_layernorm.weight", "encoder.final_layernorm.weight"),
    ]


def megatron_llm_map(config: ModelConfig) -> WeightMap:
    """Return the weight map of a decoder with RMSNorm, sequential attention and gated MLP, and no biases."""
    layer, source = "decoder.layers.*", "encoder.layers.*"
    rules = [
        *common_rules(config),
        Copy(f"{layer}.pre_mlp_layernorm.weight", f"{source}.post_attention_layernorm.weight"),
        SwappedHalves(f"{layer}.mlp.linear_fc1.weight", f"{source}.mlp.dense_h_to_4h.weight"),  # [up; gate]
    ]
    if not config.tie_embeddings:
        rules.append(Copy("output_layer.weight", "lm_head"))
    return WeightMap(*rules)


def common_config_fields(args: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of :class:`ModelConfig` that every family reads alike from the saved arguments.

    Raises :class:`ConfigError`, naming an argument that no family of this format implements.
    """
    require_arg(args, "position_embedding_type", "rotary", default="absolute")
    require_arg(args, "use_bias", False)
    require_arg(args, "use_post_ln", False)
    require_arg(args, "sliding_window_size", None)
    hidden_size, heads = args["hidden_size"], args["num_attention_heads"]
    head_dim = hidden_size // heads
    require_arg(args, "kv_channels", head_dim, default=head_dim)
    factor = args.get("rope_scaling_factor") or 1.0
    return {
        "num_layers": args["num_layers"],
        "hidden_size": hidden_size,
        "ffn_hidden_size": args.get("ffn_hidden_size") or 4 * hidden_size,
        "num_attention_heads": heads,
        "num_kv_heads": args.get("num_attention_heads_kv") or heads,
        "head_dim": head_dim,
        "vocab_size": args["vocab_size"],
        "max_position_embeddings": args.get("max_position_embeddings") or args["seq_length"],
        "norm_eps": args.get("layernorm_epsilon") or 1e-5,
        "rope_theta": args.get("rope_theta") or 10000.0,
        "rope_scaling": None if factor == 1.0 else LinearScaling(factor=factor),
        "tie_embeddings": True if args.get("tie_embed_logits") is None else args["tie_embed_logits"],
    }


def common_args(config: ModelConfig) -> dict[str, Any]:
    """Return the saved arguments of every family, the inverse of :func:`common_config_fields`.

    Raises :class:`ConfigError` if the format cannot describe the model.
    """
    _check_expressible(config)
    scaling = config.rope_scaling
    return {
        "num_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": config.ffn_hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "num_attention_heads_kv": config.num_kv_heads,
        "kv_channels": config.head_dim,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_position_embeddings,
        "seq_length": config.max_position_embeddings,
        "layernorm_epsilon": config.norm_eps,
        "position_embedding_type": "rotary",
        "rope_theta": config.rope_theta,
        "rope_scaling_factor": scaling.factor if isinstance(scaling, LinearScaling) else 1.0,
        "tie_embed_logits": config.tie_embeddings,
        "use_bias": False,
        "use_post_ln": False,
        "sliding_window_size": None,
    }


def _check_expressible(config: ModelConfig) -> None:
    problems = []
    if config.position_embedding != "rotary":
        problems.append(f"{config.position_embedding} positions")
    if config.rope_scaling is not None and not isinstance(config.rope_scaling, LinearScaling):
        problems.append(f"{config.rope_scaling.method} scaling of the rotary embedding")
    if config.qkv_bias or config.attention_output_bias or config.mlp_bias:
        problems.append("biases of the linear layers")
    if config.head_dim * config.num_attention_heads != config.hidden_size:
        problems.append(
            f"{config.num_attention_heads} heads of {config.head_dim} in a hidden size of {config.hidden_size}"
        )
    if problems:
        raise ConfigError(f"the format megatron-llm cannot hold this model, which has {' and '.join(problems)}")


def config_from_megatron_llm(args: Mapping[str, Any], *, family: str) -> ModelConfig:
    """Return the configuration of a decoder with RMSNorm and a gated MLP. Raises :class:`ConfigError` for any other."""
    activation = args.get("glu_activation")
    if activation not in GATED_ACTIVATIONS:
        raise ConfigError(
            f"glu_activation {activation!r} is not implemented for {family}; "
            f"implemented: {', '.join(GATED_ACTIVATIONS)}"
        )
    require_arg(args, "use_rms_norm", True, default=False)
    require_arg(args, "parallel_attn", False)
    return ModelConfig(family=family, activation=GATED_ACTIVATIONS[activation], **common_config_fields(args))


def config_to_megatron_llm(config: ModelConfig) -> dict[str, Any]:
    """Return the saved arguments of ``config``, the inverse of :func:`config_from_megatron_llm`."""
    names = {native: published for published, native in GATED_ACTIVATIONS.items()}
    if config.activation not in names:
        raise ConfigError(f"the format megatron-llm has no MLP gated by {config.activation}")
    return {
        **common_args(config),
        "glu_activation": names[config.activation],
        "use_rms_norm": True,
        "parallel_attn": False,
        "parallel_layernorm": False,
        "tokenizer_type": "SentencePieceTokenizer",
    }


def require_arg(args: Mapping[str, Any], name: str, needed: Any, *, default: Any = None) -> None:
    """Refuse a saved argument unless it is ``needed``; a missing or ``None`` one has the value ``default``."""
    value = default if args.get(name) is None else args[name]
    if value != needed and (value or needed):  # None and False mean the same
        raise ConfigError(f"{name} is {value!r}, which is not implemented; implemented: {needed!r}")
