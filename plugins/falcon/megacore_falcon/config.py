"""The configuration of a Falcon, and how a published one reads.

The keys and their defaults are those of ``transformers.FalconConfig``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megacore import ModelConfig
from megacore.errors import ConfigError
from megacore_falcon.first_files import in_present_keys

ACTIVATIONS = {"gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu", "silu": "silu"}
"""``activation`` to megacore's name; Falcon's own is the exact GELU."""


@dataclass(frozen=True, kw_only=True)
class FalconConfig(ModelConfig):
    """A Falcon of any generation.

    Attributes:
        new_decoder_architecture: of Falcon 40B and later, with grouped key-value heads.
        parallel_attention: attention and MLP read the same residual and are added to it together.
        num_layer_norms: norms of a layer: 1 that attention and MLP share, or one for each.
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


def config_from_source(published: Mapping[str, Any], source: str) -> FalconConfig:
    """Read a parsed ``config.json``. Raises :class:`ConfigError` for what is not implemented, by name."""
    from megacore.weights import rotary_from_hf

    if source == "megatron-llm":
        from megacore_falcon.megatron_llm import config_from_args

        return config_from_args(published)
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


def config_to_source(config: FalconConfig, source: str) -> dict[str, Any]:
    """The ``config.json`` of ``config``, the inverse of :func:`config_from_source`."""
    from megacore.weights import rotary_to_hf

    if source == "megatron-llm":
        from megacore_falcon.megatron_llm import config_to_args

        return config_to_args(config)
    names = {ours: theirs for theirs, ours in ACTIVATIONS.items()}
    if config.new_decoder_architecture:
        heads = {"num_kv_heads": config.num_kv_heads, "num_ln_in_parallel_attn": config.num_layer_norms}
    else:  # num_kv_heads means nothing there: whatever the published file says is kept
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
