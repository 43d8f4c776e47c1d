"""Reading and writing the configuration of a published Llama 2 or Code Llama.

The two are one architecture: what Code Llama has of its own, a rotary base of a million and a vocabulary with tokens
for infilling, its files say. Its context length Meta's ``params.json`` does not have.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megacore import ModelConfig

CONTEXT_LENGTHS = {"llama2": 4096, "codellama": 16384}
"""What each family was trained on."""


def config_from_source(published: Mapping[str, Any], source: str, *, family: str) -> ModelConfig:
    """Read a parsed ``config.json`` or ``params.json``. Raises :class:`ConfigError` for what is not implemented."""
    from megacore.weights import config_from_meta, standard_config_from_hf
    from megacore.weights.formats.megatron_llm.weight_map import gated_config_from_args

    if source == "megatron-llm":
        return gated_config_from_args(published, family=family)
    if source == "meta":
        return config_from_meta(published, family=family, max_position_embeddings=CONTEXT_LENGTHS[family])
    return standard_config_from_hf(published, family=family)


def config_to_source(config: ModelConfig, source: str) -> dict[str, Any]:
    """The configuration file of ``config``, the inverse of :func:`config_from_source`."""
    from megacore.weights import config_to_meta, standard_config_to_hf
    from megacore.weights.formats.megatron_llm.weight_map import gated_config_to_args

    if source == "megatron-llm":
        return gated_config_to_args(config)
    if source == "meta":
        return config_to_meta(config)
    return standard_config_to_hf(config, architecture="LlamaForCausalLM", model_type="llama")
