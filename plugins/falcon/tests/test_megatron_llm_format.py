"""Falcons in the format megatron-llm, in the two styles that it has; the others are refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import FalconConfig, FalconForCausalLM
from transformers.utils import logging

from megacore.errors import ConfigError, CorruptCheckpointError, LayoutError
from megacore.weights import convert, export
from megacore.weights.formats.megatron_llm.rotary_update import permute_qkv
from megatron_llm_files import (
    Model,
    assert_same_tensors,
    falcon_model_of,
    flat,
    load,
    native_tensors,
    rank_file,
    rank_model,
    write_megatron_llm,
)

SIZES = {"num_hidden_layers": 4, "num_attention_heads": 6, "hidden_size": 48, "vocab_size": 100, "alibi": False}
SEVEN = SIZES | {"multi_query": True, "parallel_attn": True, "new_decoder_architecture": False, "bias": False}
FORTY = SIZES | {"num_kv_heads": 2, "new_decoder_architecture": True, "bias": False}
STYLES = {"7B": SEVEN, "40B": FORTY}
CUTS = [("7B", 1, 1), ("7B", 1, 2), ("40B", 1, 1), ("40B", 2, 1), ("40B", 1, 2), ("40B", 2, 2)]


def publish(directory: Path, settings: dict) -> Path:
    """Save a Falcon whose every parameter is random."""
    logging.disable_progress_bar()
    torch.manual_seed(0)
    model = FalconForCausalLM(FalconConfig(**settings))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    model.save_pretrained(directory)
    return directory


def as_model(directory: Path, **args) -> Model:
    """What transformers saved, taken apart."""
    tensors = load_file(directory / "model.safetensors")
    return falcon_model_of(tensors, FalconConfig.from_pretrained(directory), **args)


@pytest.fixture
def published(tmp_path):
    """``published(style)`` saves a Falcon of that style."""
    return lambda style: publish(tmp_path / "published", STYLES[style])


def config_of(directory: Path) -> dict:
    return json.loads((directory / "megacore.json").read_text())["config"]


def refusal(error, call, *arguments, **options) -> str:
    with pytest.raises(error) as caught:
        call(*arguments, **options)
    return str(caught.value)


@pytest.mark.parametrize("spelling", ["converted", "trained"])
@pytest.mark.parametrize("style, tp, pp", CUTS)
def test_it_converts_to_the_tensors_that_the_hugging_face_files_convert_to(
    published, tmp_path, style, tp, pp, spelling
):
    directory = published(style)
    convert("falcon", directory, tmp_path / "native")
    write_megatron_llm(tmp_path / "meg", as_model(directory), tp=tp, pp=pp, spelling=spelling, vocab_rows=256)

    convert("falcon", tmp_path / "meg", tmp_path / "ckpt", true_vocab_size=100)

    assert_same_tensors(native_tensors(tmp_path / "ckpt"), native_tensors(tmp_path / "native"))
    assert config_of(tmp_path / "ckpt") == config_of(tmp_path / "native")


@pytest.mark.parametrize("style, tp, pp", CUTS)
def test_what_is_written_is_what_the_format_asks_for_and_comes_back(published, tmp_path, style, tp, pp):
    directory = published(style)
    convert("falcon", directory, tmp_path / "native")

    export(tmp_path / "native", tmp_path / "out", format="megatron-llm", tp=tp, pp=pp)
    convert("falcon", tmp_path / "out", tmp_path / "back")

    for stage in range(pp):
        for rank in range(tp):
            document = load(rank_file(tmp_path / "out", rank, stage, pp))
            expected = rank_model(
                as_model(directory), rank=rank, tp=tp, stage=stage, pp=pp, spelling="trained",
                layout="interleaved", vocab_rows=128 * tp,
            )  # fmt: skip
            assert_same_tensors(flat(document["model"]), flat(expected))
            described = as_model(directory).args
            assert {name: getattr(document["args"], name) for name in described} == described
    assert_same_tensors(native_tensors(tmp_path / "back"), native_tensors(tmp_path / "native"))
    assert config_of(tmp_path / "back") == config_of(tmp_path / "native")


@pytest.mark.parametrize("spelling", ["converted", "trained"])
@pytest.mark.parametrize("style, tp, pp", CUTS)
def test_an_old_checkpoint_converts_to_the_same_once_it_is_updated(published, tmp_path, style, tp, pp, spelling):
    directory = published(style)
    convert("falcon", directory, tmp_path / "native")
    write_megatron_llm(tmp_path / "old", as_model(directory), tp=tp, pp=pp, spelling=spelling, layout="halves")

    assert permute_qkv(tmp_path / "old", tmp_path / "new", layout="halves") == 4
    convert("falcon", tmp_path / "new", tmp_path / "ckpt")

    assert_same_tensors(native_tensors(tmp_path / "ckpt"), native_tensors(tmp_path / "native"))


def test_a_head_on_the_last_stage_that_differs_is_refused(published, tmp_path):
    write_megatron_llm(tmp_path / "meg", as_model(published("40B")), tp=2, pp=2, spelling="converted")
    path = rank_file(tmp_path / "meg", 1, 1, 2)
    document = load(path)
    document["model"]["word_embeddings_for_head"]["weight"][-1, -1] += 1
    torch.save(document, path)

    assert "should be the embedding" in refusal(
        CorruptCheckpointError, convert, "falcon", tmp_path / "meg", tmp_path / "ckpt"
    )


@pytest.mark.parametrize(
    "style, tp, pp, works", [("7B", 2, 1, "tp 1; pp 1, 2, 4"), ("40B", 3, 3, "tp 1, 2; pp 1, 2, 4")]
)
def test_a_cut_that_does_not_divide_is_refused(published, tmp_path, style, tp, pp, works):
    convert("falcon", published(style), tmp_path / "native")

    said = refusal(LayoutError, export, tmp_path / "native", tmp_path / "out", format="megatron-llm", tp=tp, pp=pp)

    assert said.endswith(f"Sizes that work: {works}")


@pytest.mark.parametrize(
    "settings, style",
    [
        (FORTY | {"num_ln_in_parallel_attn": 1}, "Falcon2 11B"),
        (SIZES | {"multi_query": False, "parallel_attn": False, "alibi": True, "bias": True}, "falcon-rw"),
        (SEVEN | {"parallel_attn": False}, "one after the other"),
        (SEVEN | {"tie_word_embeddings": False}, "a head of its own"),
        (SEVEN | {"activation": "relu"}, "the activation relu"),
    ],
)
def test_other_styles_are_refused_by_name(tmp_path, settings, style):
    convert("falcon", publish(tmp_path / "published", settings), tmp_path / "native")

    said = refusal(ConfigError, export, tmp_path / "native", tmp_path / "out", format="megatron-llm")

    assert said.startswith(
        "the format megatron-llm has Falcons in the style of 7B and of 40B, and this one is of another"
    )
    assert style in said


@pytest.mark.parametrize(
    "args, answer",
    [
        ({"parallel_attn": False}, "parallel_attn is False, which is not implemented; implemented: True"),
        ({"glu_activation": "swiglu"}, "glu_activation is 'swiglu'"),
        ({"use_rms_norm": True}, "use_rms_norm is True"),
        ({"tie_embed_logits": False}, "tie_embed_logits is False"),
        ({"parallel_layernorm": False}, "grouped key-value heads with one norm"),
        ({"model_name": "llama"}, "is a llama, not a falcon; use --model llama"),
    ],
)
def test_arguments_that_ask_for_another_model_are_refused(published, tmp_path, args, answer):
    write_megatron_llm(tmp_path / "meg", as_model(published("40B"), **args))

    said = refusal(ConfigError, convert, "falcon", tmp_path / "meg", tmp_path / "ckpt")

    assert answer in said


def test_in_a_trained_checkpoint_a_head_tied_by_default_is_tied(published, tmp_path):
    write_megatron_llm(tmp_path / "meg", as_model(published("7B"), tie_embed_logits=True))

    convert("falcon", tmp_path / "meg", tmp_path / "ckpt")

    assert config_of(tmp_path / "ckpt")["tie_embeddings"] is True
