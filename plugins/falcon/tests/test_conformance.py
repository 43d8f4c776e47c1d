"""The conformance kit, as any plugin uses it, on the four styles that Falcon has had."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from megacore import ModelConfig
from megacore.testing import ModelFamilyTests
from megacore_falcon.config import FalconConfig
from megatron_llm_conformance import MegatronLlmFormatTests, heads_in_halves
from megatron_llm_files import Model, falcon_model_of

ODD: dict[str, Any] = {
    "family": "falcon",
    "num_layers": 3,
    "hidden_size": 36,
    "ffn_hidden_size": 37,
    "num_attention_heads": 6,
    "head_dim": 6,
    "vocab_size": 99,
    "max_position_embeddings": 64,
    "norm": "layernorm",
    "norm_eps": 1e-3,
    "activation": "gelu",
    "rope_theta": 1234.5,
    "tie_embeddings": True,
}


class TestFalcon(ModelFamilyTests):
    family = "falcon"

    def tiny_configs(self) -> dict[str, ModelConfig]:
        return {
            "7B": FalconConfig(
                **ODD, num_kv_heads=1, new_decoder_architecture=False, parallel_attention=True, num_layer_norms=1
            ),
            "40B": FalconConfig(
                **ODD, num_kv_heads=3, new_decoder_architecture=True, parallel_attention=True, num_layer_norms=2
            ),
            "11B": FalconConfig(
                **ODD | {"tie_embeddings": False},
                num_kv_heads=3,
                new_decoder_architecture=True,
                parallel_attention=True,
                num_layer_norms=1,
            ),
            "RW": FalconConfig(
                **ODD | {"rope_theta": 10000.0},  # no part in linear biases, but the field has a default
                num_kv_heads=6,
                position_embedding="alibi",
                qkv_bias=True,
                attention_output_bias=True,
                mlp_bias=True,
                new_decoder_architecture=False,
                parallel_attention=False,
                num_layer_norms=2,
            ),
        }


class TestFalconOfMegatronLlm(MegatronLlmFormatTests):
    """In the two styles that the format has."""

    family = "falcon"

    def tiny_configs(self) -> dict[str, ModelConfig]:
        styles = TestFalcon().tiny_configs()
        return {name: styles[name] for name in ("7B", "40B")}

    def taken_apart(self, model: Any, config: ModelConfig) -> Model:
        return falcon_model_of(
            model.state_dict(),
            model.config,
            ffn_hidden_size=config.ffn_hidden_size,
            max_position_embeddings=config.max_position_embeddings,
            layernorm_epsilon=config.norm_eps,
            rope_theta=config.rope_theta,
        )

    def put_together(self, stored: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
        two_norms = "encoder.layers.0.mlp_layernorm.weight" in stored
        norms = {"encoder.final_layernorm": "transformer.ln_f"}
        published = {"transformer.word_embeddings.weight": stored["embedding.word_embeddings.weight"]}
        for number in range(config.num_layers):
            theirs, ours = f"transformer.h.{number}", f"encoder.layers.{number}"
            qkv = heads_in_halves(stored[f"{ours}.self_attention.query_key_value.weight"], config)
            published[f"{theirs}.self_attention.query_key_value.weight"] = qkv.flatten(0, 2)
            for name in ("self_attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"):
                published[f"{theirs}.{name}.weight"] = stored[f"{ours}.{name}.weight"]
            norms[f"{ours}.input_layernorm"] = f"{theirs}.{'ln_attn' if two_norms else 'input_layernorm'}"
            if two_norms:
                norms[f"{ours}.mlp_layernorm"] = f"{theirs}.ln_mlp"
        for ours, theirs in norms.items():
            published |= {f"{theirs}.{part}": stored[f"{ours}.{part}"] for part in ("weight", "bias")}
        return published
