"""Llama 2 and Code Llama in the format megatron-llm."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from megacore.weights import convert, export
from megatron_llm_files import assert_same_tensors, model_of, native_tensors, write_megatron_llm


@pytest.fixture
def published(tmp_path: Path) -> tuple[Path, LlamaConfig]:
    """A tiny model with grouped key-value heads and Code Llama's rotary base, as transformers saves it."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=100,
        hidden_size=96,
        intermediate_size=20,
        num_hidden_layers=4,
        num_attention_heads=12,
        num_key_value_heads=4,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "published")
    return tmp_path / "published", config


@pytest.mark.parametrize("family", ["llama2", "codellama"])
@pytest.mark.parametrize("spelling", ["converted", "trained"])
def test_a_checkpoint_converts_to_what_the_files_of_transformers_convert_to(published, tmp_path, family, spelling):
    directory, config = published
    model = model_of(load_file(directory / "model.safetensors"), config)
    write_megatron_llm(tmp_path / "meg", model, tp=2, pp=2, spelling=spelling)

    convert(family, directory, tmp_path / "expected")
    convert(family, tmp_path / "meg", tmp_path / "found")

    assert_same_tensors(native_tensors(tmp_path / "found"), native_tensors(tmp_path / "expected"))


@pytest.mark.parametrize("family", ["llama2", "codellama"])
def test_and_an_export_converts_back_to_the_same(published, tmp_path, family):
    directory, _ = published
    convert(family, directory, tmp_path / "native")

    export(tmp_path / "native", tmp_path / "meg", format="megatron-llm", tp=2, pp=2)
    convert(family, tmp_path / "meg", tmp_path / "back")

    assert_same_tensors(native_tensors(tmp_path / "back"), native_tensors(tmp_path / "native"))
