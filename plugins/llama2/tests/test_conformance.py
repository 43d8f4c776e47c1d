"""The conformance kit, as any plugin uses it, on both families of this plugin."""

from __future__ import annotations

from typing import Any

from megacore import ModelConfig
from megacore.testing import ModelFamilyTests
from megatron_llm_conformance import MegatronLlmFormatTests
from meta_conformance import MetaFormatTests

ODD: dict[str, Any] = {
    "num_layers": 3,
    "hidden_size": 36,
    "ffn_hidden_size": 41,
    "num_attention_heads": 6,
    "head_dim": 6,
    "vocab_size": 99,
    "max_position_embeddings": 64,
    "norm_eps": 1e-3,
    "rope_theta": 1234.5,
}


class TestLlama2(ModelFamilyTests):
    family = "llama2"

    def tiny_configs(self) -> dict[str, ModelConfig]:
        return {
            "multi-head, as 7B and 13B": ModelConfig(**ODD, family="llama2", num_kv_heads=6),
            "grouped, as 70B": ModelConfig(**ODD, family="llama2", num_kv_heads=3),
        }


class TestLlama2OfMeta(MetaFormatTests):
    family = "llama2"
    context_length = 4096


class TestCodeLlama(ModelFamilyTests):
    family = "codellama"

    def tiny_config(self) -> ModelConfig:
        return ModelConfig(**ODD, family="codellama", num_kv_heads=3)


class TestCodeLlamaOfMeta(MetaFormatTests):
    family = "codellama"
    context_length = 16384


class TestLlama2OfMegatronLlm(MegatronLlmFormatTests):
    family = "llama2"

    def tiny_config(self) -> ModelConfig:
        return ModelConfig(**ODD, family="llama2", num_kv_heads=3)


class TestCodeLlamaOfMegatronLlm(MegatronLlmFormatTests):
    family = "codellama"

    def tiny_config(self) -> ModelConfig:
        return ModelConfig(**ODD, family="codellama", num_kv_heads=3)
