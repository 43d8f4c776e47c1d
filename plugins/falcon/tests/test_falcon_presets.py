"""The presets are the published models: written down here once more, from the ``config.json`` of each on the hub."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from transformers import FalconConfig, FalconForCausalLM

from megacore.model import model_specs
from megacore.plugins import get_family
from megacore_falcon import config_from_source, config_to_source

COMMON = {
    "alibi": False,
    "architectures": ["FalconForCausalLM"],
    "attention_dropout": 0.0,
    "bias": False,
    "bos_token_id": 11,
    "eos_token_id": 11,
    "hidden_dropout": 0.0,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "model_type": "falcon",
    "multi_query": True,
    "parallel_attn": True,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 65024,
}

PUBLISHED: dict[str, dict[str, Any]] = {
    "1": COMMON
    | {
        "alibi": True,
        "bias": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_size": 2048,
        "multi_query": False,
        "new_decoder_architecture": False,
        "num_attention_heads": 32,
        "num_hidden_layers": 24,
        "parallel_attn": False,
        "vocab_size": 50304,
    },
    "7": COMMON
    | {
        "apply_residual_connection_post_layernorm": False,
        "hidden_size": 4544,
        "new_decoder_architecture": False,
        "num_attention_heads": 71,
        "num_hidden_layers": 32,
    },
    "11": COMMON
    | {
        "ffn_hidden_size": 16384,
        "hidden_size": 4096,
        "max_position_embeddings": 8192,
        "new_decoder_architecture": True,
        "num_attention_heads": 32,
        "num_hidden_layers": 60,
        "num_kv_heads": 8,
        "num_ln_in_parallel_attn": 1,
        "rope_scaling": None,
        "rope_theta": 500042.0,
        "tie_word_embeddings": False,
    },
    "40": COMMON
    | {
        "hidden_size": 8192,
        "new_decoder_architecture": True,
        "num_attention_heads": 128,
        "num_hidden_layers": 60,
        "num_kv_heads": 8,
    },
    "180": COMMON
    | {
        "hidden_size": 14848,
        "new_decoder_architecture": True,
        "num_attention_heads": 232,
        "num_hidden_layers": 80,
        "num_kv_heads": 8,
    },
}

PUBLISHED_PARAMETERS = {"1": 1.3e9, "7": 6.92e9, "11": 11.1e9, "40": 41.3e9, "180": 179e9}
"""As the model cards and papers put it; for the 7B, 6,921,720,704 is in many a log of fine-tuning it.

11.1 billion are told of Falcon2-11B, which has them only with a head of its own: tied, it would have 10.8.
"""


@pytest.fixture(params=PUBLISHED)
def size(request) -> str:
    return request.param


def on_meta_device(settings: dict[str, Any]) -> FalconForCausalLM:
    with torch.device("meta"):
        return FalconForCausalLM(FalconConfig(**settings))


def num_parameters(model: FalconForCausalLM) -> int:
    """A tied head counts once."""
    return sum(parameter.numel() for parameter in model.parameters())


def test_every_published_size_has_a_preset():
    assert get_family("falcon").family.presets.keys() == PUBLISHED.keys()


def test_a_preset_has_as_many_parameters_as_the_published_model_in_transformers(size):
    falcon = get_family("falcon")

    specs = model_specs(falcon.preset(size), falcon.build_layer)

    assert sum(math.prod(spec.shape) for spec in specs.values()) == num_parameters(on_meta_device(PUBLISHED[size]))


def test_a_preset_has_as_many_parameters_as_it_is_known_for(size):
    falcon = get_family("falcon")

    specs = model_specs(falcon.preset(size), falcon.build_layer)

    assert sum(math.prod(spec.shape) for spec in specs.values()) == pytest.approx(PUBLISHED_PARAMETERS[size], rel=0.01)


def test_the_7b_has_its_6921720704_parameters():
    falcon = get_family("falcon")

    specs = model_specs(falcon.preset("7"), falcon.build_layer)

    assert sum(math.prod(spec.shape) for spec in specs.values()) == 6_921_720_704


def test_a_preset_is_what_the_published_configuration_reads_as(size):
    assert get_family("falcon").preset(size) == config_from_source(PUBLISHED[size], "hf")


def test_a_preset_in_published_keys_has_the_tensors_of_the_published_model(size):
    preset = get_family("falcon").preset(size)

    ours, theirs = on_meta_device(config_to_source(preset, "hf")), on_meta_device(PUBLISHED[size])

    assert {name: parameter.shape for name, parameter in ours.named_parameters()} == {
        name: parameter.shape for name, parameter in theirs.named_parameters()
    }


def test_every_size_says_where_on_the_hub_it_is():
    assert get_family("falcon").family.hub == {
        "1": "tiiuae/falcon-rw-1b",
        "7": "tiiuae/falcon-7b",
        "11": "tiiuae/falcon-11B",
        "40": "tiiuae/falcon-40b",
        "180": "tiiuae/falcon-180B",
    }
