"""The conformance kit, as any plugin uses it."""

from __future__ import annotations

from typing import Any

from megacore import ModelConfig
from megacore.config import FrequencyBandScaling
from megacore.testing import ModelFamilyTests
from megatron_llm_conformance import MegatronLlmFormatTests
from meta_conformance import MetaFormatTests

ODD: dict[str, Any] = {
    "family": "llama",
    "num_layers": 3,
    "hidden_size": 36,
    "ffn_hidden_size": 37,
    "num_attention_heads": 6,
    "num_kv_heads": 3,
    "head_dim": 6,
    "vocab_size": 99,
    "max_position_embeddings": 64,
    "norm_eps": 1e-3,
    "rope_theta": 1234.5,
}


class TestLlama(ModelFamilyTests):
    family = "llama"

    def tiny_configs(self) -> dict[str, ModelConfig]:
        return {
            "multi-head": ModelConfig(**ODD | {"num_kv_heads": 6}),
            "grouped": ModelConfig(**ODD),
            "tied, with biases, scaled": ModelConfig(
                **ODD | {"head_dim": 8, "activation": "gelu"},
                tie_embeddings=True,
                qkv_bias=True,
                attention_output_bias=True,
                mlp_bias=True,
                rope_scaling=FrequencyBandScaling(
                    factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16
                ),
            ),
        }


class TestLlamaOfMeta(MetaFormatTests):
    family = "llama"
    context_length = 2048


class TestLlamaOfMegatronLlm(MegatronLlmFormatTests):
    family = "llama"

    def tiny_configs(self) -> dict[str, ModelConfig]:
        return {
            "multi-head": ModelConfig(**ODD | {"num_kv_heads": 6}),
            "grouped": ModelConfig(**ODD),
            "tied": ModelConfig(**ODD, tie_embeddings=True),
        }
