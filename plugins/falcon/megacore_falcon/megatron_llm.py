"""Falcon in the format megatron-llm, which has two of its styles: that of 7B and that of 40B and 180B."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megacore.errors import ConfigError
from megacore.weights import Copy, Rule, WeightMap
from megacore.weights.standard_decoder.megatron_llm import (
    common_args,
    common_config_fields,
    common_rules,
    require_arg,
)
from megacore_falcon.config import FalconConfig


def megatron_llm_weight_map(config: FalconConfig) -> WeightMap:
    """Return the weight map of the format megatron-llm. Raises :class:`ConfigError` for a style it does not have."""
    _check_style(config)
    norms = {"decoder.final_layernorm": "encoder.final_layernorm"}
    norms["decoder.layers.*.input_layernorm"] = "encoder.layers.*.input_layernorm"
    rules: list[Rule] = [
        *common_rules(config),
        Copy("decoder.layers.*.mlp.linear_fc1.weight", "encoder.layers.*.mlp.dense_h_to_4h.weight"),
    ]
    if config.num_layer_norms == 2:
        norms["decoder.layers.*.pre_mlp_layernorm"] = "encoder.layers.*.mlp_layernorm"
        rules.append(Copy("decoder.layers.*.pre_mlp_layernorm.weight", "encoder.layers.*.mlp_layernorm.weight"))
    rules += [Copy(f"{native}.bias", f"{source}.bias") for native, source in norms.items()]
    return WeightMap(*rules)


def config_from_args(args: Mapping[str, Any]) -> FalconConfig:
    """Read the saved arguments. Raises :class:`ConfigError`, naming an argument that is not implemented."""
    require_arg(args, "parallel_attn", True, default=False)
    require_arg(args, "use_rms_norm", False)
    require_arg(args, "glu_activation", None)
    require_arg(args, "tie_embed_logits", True, default=True)
    two_norms = bool(args.get("parallel_layernorm"))
    config = FalconConfig(
        family="falcon",
        norm="layernorm",
        activation="gelu",
        new_decoder_architecture=two_norms,
        parallel_attention=True,
        num_layer_norms=2 if two_norms else 1,
        **common_config_fields(args),
    )
    _check_style(config)
    return config


def config_to_args(config: FalconConfig) -> dict[str, Any]:
    """Return the saved arguments of ``config``, the inverse of :func:`config_from_args`."""
    _check_style(config)
    return {
        **common_args(config),
        "glu_activation": None,
        "use_rms_norm": False,
        "parallel_attn": True,
        "parallel_layernorm": config.num_layer_norms == 2,
        "tokenizer_type": "FalconTokenizer",
    }


def _check_style(config: FalconConfig) -> None:
    """Refuse the styles that the format does not have."""
    style = None
    if not config.parallel_attention:
        style = "attention and MLP one after the other, as in falcon-rw"
    elif config.new_decoder_architecture and config.num_layer_norms == 1:
        style = "Falcon2 11B (grouped key-value heads with one norm)"
    elif not config.new_decoder_architecture and config.num_kv_heads not in (1, config.num_attention_heads):
        style = "grouped key-value heads with one norm"
    elif not config.tie_embeddings:
        style = "a head of its own"
    elif config.activation != "gelu":
        style = f"the activation {config.activation}"
    if style is not None:
        raise ConfigError(
            f"the format megatron-llm has Falcons in the style of 7B and of 40B, and this one is of another: {style}"
        )
