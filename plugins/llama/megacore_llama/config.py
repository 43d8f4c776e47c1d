"""Reading and writing the configuration of a published Llama."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megacore import ModelConfig
from megacore.config import FrequencyBandScaling

CONTEXT_LENGTH = 2048
"""What Llama was trained on, which Meta's ``params.json`` does not say."""

OWN_ROTARY_METHODS = {"llama3": FrequencyBandScaling}


def config_from_source(published: Mapping[str, Any], source: str) -> ModelConfig:
    """Read a parsed ``config.json`` or ``params.json``. Raises :class:`ConfigError` for what is not implemented."""
    from megacore.weights import ROTARY_METHODS, config_from_meta, standard_config_from_hf
    from megacore.weights.formats.megatron_llm.weight_map import gated_config_from_args

    if source == "megatron-llm":
        return gated_config_from_args(published, family="llama")
    if source == "meta":
        return config_from_meta(published, family="llama", max_position_embeddings=CONTEXT_LENGTH)
    return standard_config_from_hf(published, family="llama", rotary_methods={**ROTARY_METHODS, **OWN_ROTARY_METHODS})


def config_to_source(config: ModelConfig, source: str) -> dict[str, Any]:
    """The configuration file of ``config``, the inverse of :func:`config_from_source`."""
    from megacore.weights import ROTARY_METHODS, config_to_meta, standard_config_to_hf
    from megacore.weights.formats.megatron_llm.weight_map import gated_config_to_args

    if source == "megatron-llm":
        return gated_config_to_args(config)
    if source == "meta":
        return config_to_meta(config)
    return standard_config_to_hf(
        config,
        architecture="LlamaForCausalLM",
        model_type="llama",
        rotary_methods={**ROTARY_METHODS, **OWN_ROTARY_METHODS},
    )
