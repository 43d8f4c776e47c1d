"""What decoders look like in the format megatron-llm: tensor names, the order of QKV rows, the saved arguments.

A plugin puts its weight map and its configuration together from these; those of decoders with a gated MLP and RMSNorm
are here as a whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megacore.config import LinearScaling, ModelConfig
from megacore.errors import ConfigError
from megacore.weights.rules import Copy, FusedQKV, Rule, SwappedHalves, WeightMap

GATED_ACTIVATIONS = {"swiglu": "silu", "geglu": "gelu", "reglu": "relu"}
"""``glu_activation`` to megacore's name of the gate's activation."""


def half_from_interleaved_rows(*, queries_per_kv: int, kv_heads: int, head_dim: int) -> list[int]:
    """For each row of a grouped QKV projection with rotary halves, the one with the same role in interleaved pairs.

    Both are grouped: of each key-value head its query heads, the key, the value. In a query or key head, the pair that
    is rotated together is ``(i, i + head_dim / 2)`` here and ``(2i, 2i + 1)`` there. Values are not rotated.
    """
    rotated = [*range(0, head_dim, 2), *range(1, head_dim, 2)]
    rows: list[int] = []
    for block in range(kv_heads * (queries_per_kv + 2)):
        is_value = block % (queries_per_kv + 2) == queries_per_kv + 1
        rows += (block * head_dim + row for row in (range(head_dim) if is_value else rotated))
    return rows


def interleaved_qkv_rows(config: ModelConfig) -> list[int]:
    """The ``qkv_permutation`` of the format."""
    return half_from_interleaved_rows(
        queries_per_kv=config.queries_per_kv, kv_heads=config.num_kv_heads, head_dim=config.head_dim
    )


def rules_of_every_decoder(config: ModelConfig) -> list[Rule]:
    """The rules for what does not depend on the kind of norm and MLP.

    Raises:
        ConfigError: for a model that the format cannot describe.
    """
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


def gated_weight_map(config: ModelConfig) -> WeightMap:
    """The weight map of a decoder with RMSNorm, attention and a gated MLP one after the other, and no biases."""
    layer, source = "decoder.layers.*", "encoder.layers.*"
    rules = [
        *rules_of_every_decoder(config),
        Copy(f"{layer}.pre_mlp_layernorm.weight", f"{source}.post_attention_layernorm.weight"),
        SwappedHalves(f"{layer}.mlp.linear_fc1.weight", f"{source}.mlp.dense_h_to_4h.weight"),  # [up; gate]
    ]
    if not config.tie_embeddings:
        rules.append(Copy("output_layer.weight", "lm_head"))
    return WeightMap(*rules)


def sizes_from_args(args: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of :class:`ModelConfig` that every family reads alike.

    Raises:
        ConfigError: for what no family of this format implements.
    """
    require(args, "position_embedding_type", "rotary", default="absolute")
    require(args, "use_bias", False)
    require(args, "use_post_ln", False)
    require(args, "sliding_window_size", None)
    hidden_size, heads = args["hidden_size"], args["num_attention_heads"]
    head_dim = hidden_size // heads
    require(args, "kv_channels", head_dim, default=head_dim)
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


def sizes_to_args(config: ModelConfig) -> dict[str, Any]:
    """The inverse of :func:`sizes_from_args`.

    Raises:
        ConfigError: for a model that the format cannot describe.
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
    """Refuse a model that the format cannot describe."""
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


def gated_config_from_args(args: Mapping[str, Any], family: str) -> ModelConfig:
    """The configuration of a decoder with RMSNorm and a gated MLP, from the saved arguments.

    Raises:
        ConfigError: when they describe another kind of model.
    """
    activation = args.get("glu_activation")
    if activation not in GATED_ACTIVATIONS:
        raise ConfigError(
            f"glu_activation {activation!r} is not implemented for {family}; "
            f"implemented: {', '.join(GATED_ACTIVATIONS)}"
        )
    require(args, "use_rms_norm", True, default=False)
    require(args, "parallel_attn", False)
    return ModelConfig(family=family, activation=GATED_ACTIVATIONS[activation], **sizes_from_args(args))


def gated_config_to_args(config: ModelConfig) -> dict[str, Any]:
    """The inverse of :func:`gated_config_from_args`."""
    names = {ours: theirs for theirs, ours in GATED_ACTIVATIONS.items()}
    if config.activation not in names:
        raise ConfigError(f"the format megatron-llm has no MLP gated by {config.activation}")
    return {
        **sizes_to_args(config),
        "glu_activation": names[config.activation],
        "use_rms_norm": True,
        "parallel_attn": False,
        "parallel_layernorm": False,
        "tokenizer_type": "SentencePieceTokenizer",
    }


def require(args: Mapping[str, Any], name: str, needed: Any, *, default: Any = None) -> None:
    """Refuse a saved argument that is not ``needed``; one that is missing or ``None`` has the value ``default``."""
    value = args.get(name)
    if value is None:
        value = default
    if value != needed and (value or needed):  # None and False are the same answer
        raise ConfigError(f"{name} is {value!r}, which is not implemented; implemented: {needed!r}")
