"""Llama 2 and Code Llama: both formats compute what the official implementations do, and come back as they were."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM

import megacore
from megacore.checkpoint import Checkpoint
from megacore.errors import ConfigError, PluginError
from megacore.model import load_model, model_specs
from megacore.parallel import ParallelContext
from megacore.weights import convert, export, translate
from meta_files import CASES, INPUT_IDS, in_hugging_face_names, read_shards
from reference_on_rank import logits_on_the_first_rank

FP32 = {"rtol": 1.3e-6, "atol": 1e-5}
FAMILIES = {"llama2": 4096, "codellama": 16384}
"""Family to context length."""

SIZES: dict[str, Any] = {
    "num_hidden_layers": 3,
    "hidden_size": 42,
    "intermediate_size": 37,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 10,
    "vocab_size": 99,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 64,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
}


@pytest.fixture
def published(tmp_path) -> tuple[LlamaForCausalLM, Path]:
    """A random model of transformers with grouped key-value heads, and the directory that it was saved to."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(mean=1.0 if "norm" in name else 0.0, std=0.2)
    model.save_pretrained(tmp_path / "published")
    return model, tmp_path / "published"


def convert_and_load(family: str, directory: Path, tmp_path: Path):
    convert(family, directory, tmp_path / "ckpt")
    return load_model(Checkpoint(tmp_path / "ckpt"), ParallelContext.single(), dtype=torch.float32)


# The Hugging Face format


@pytest.mark.parametrize("family", FAMILIES)
def test_the_reference_of_a_hugging_face_directory_is_transformers(published, tmp_path, family):
    _, directory = published
    convert(family, directory, tmp_path / "ckpt")

    report = megacore.verify(tmp_path / "ckpt", directory, INPUT_IDS)

    assert report.passed, report.verdict


def test_a_way_of_scaling_that_only_later_families_have_is_refused_by_name(published, tmp_path):
    _, directory = published
    config = json.loads((directory / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0}
    (directory / "config.json").write_text(json.dumps(config))

    with pytest.raises(ConfigError, match="rope_type 'llama3' is not implemented"):
        convert("llama2", directory, tmp_path / "ckpt")


# Meta's format


@pytest.mark.parametrize("case", CASES, ids=str)
def test_logits_are_those_of_metas_own_implementation(meta_files, tmp_path, case):
    files = meta_files[case]

    ours = convert_and_load("llama2", files.directory, tmp_path)(INPUT_IDS)

    assert 0.3 < files.logits.std() < 3
    assert_close(ours, files.logits, **FP32)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_context_length_that_metas_files_do_not_say_is_the_familys(meta_files, tmp_path, family):
    convert(family, meta_files["2 key-value heads", 2, "width"].directory, tmp_path / "ckpt")

    config = Checkpoint(tmp_path / "ckpt").manifest.config

    assert config["max_position_embeddings"] == FAMILIES[family]
    assert config["rope_theta"] == 1e6
    assert config["ffn_hidden_size"] == 170  # 48 · 8 / 3 = 128, · 1.3 = 166, up to a multiple of 10


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_metas_files_come_back_as_they_were(meta_files, tmp_path, num_ranks):
    files = meta_files["2 key-value heads", 2, "width"]
    one_rank = meta_files["2 key-value heads", 1, "vocabulary"]

    convert("llama2", files.directory, tmp_path / "ckpt", tp=2, pp=2)
    export(tmp_path / "ckpt", tmp_path / "exported", format="meta", tp=num_ranks)

    shards = read_shards(tmp_path / "exported")
    expected = (files if num_ranks == 2 else one_rank).shards()
    assert len(shards) == num_ranks
    for found, wanted in zip(shards, expected, strict=True):
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    assert json.loads((tmp_path / "exported" / "params.json").read_text()) == files.params


def test_metas_files_become_a_directory_that_transformers_loads(meta_files, tmp_path):
    files = meta_files["2 key-value heads", 2, "width"]

    translate("codellama", files.directory, tmp_path / "hf")

    loaded, loading = LlamaForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not loading["missing_keys"] | loading["unexpected_keys"] | loading["mismatched_keys"]
    assert_close(loaded(INPUT_IDS).logits, files.logits, **FP32)
    assert loaded.config.max_position_embeddings == 16384
    assert loaded.config.rope_parameters["rope_theta"] == 1e6
    expected = in_hugging_face_names(files.weights, files.params)
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in expected.items())


def test_a_scaled_rotary_embedding_is_refused_by_its_key(meta_files, tmp_path):
    files = meta_files["odd", 1, "vocabulary"]
    (tmp_path / "published").mkdir()
    (tmp_path / "published" / "params.json").write_text(json.dumps(files.params | {"use_scaled_rope": True}))
    (tmp_path / "published" / "consolidated.00.pth").symlink_to(files.directory / "consolidated.00.pth")

    with pytest.raises(
        ConfigError, match=r"asks for use_scaled_rope, which llama2 in Meta's format does not implement"
    ):
        convert("llama2", tmp_path / "published", tmp_path / "ckpt")


# The reference of Meta's files


def test_one_rank_of_several_loads_the_reference_alone(meta_files, ranks):
    files = meta_files["2 key-value heads", 2, "width"]

    logits, others = ranks.run(logits_on_the_first_rank, "llama2", files.directory, files.params, INPUT_IDS)

    assert others is None
    assert_close(logits, files.logits, **FP32)


def test_the_groups_of_fairscale_and_torch_are_afterwards_as_they_were(meta_files):
    from fairscale.nn.model_parallel import initialize

    files = meta_files["odd", 1, "vocabulary"]
    family = megacore.get_family("llama2")
    config = family.family.config_from_source(files.params, "meta")

    family.load_reference(config, files.directory, torch.float32, torch.device("cpu"))(INPUT_IDS)

    assert not initialize.model_parallel_is_initialized()
    assert initialize._MODEL_PARALLEL_GROUP is None
    assert not torch.distributed.is_initialized()


def test_without_metas_implementation_it_is_said_how_to_get_it(meta_files, monkeypatch):
    files = meta_files["odd", 1, "vocabulary"]
    family = megacore.get_family("llama2")
    config = family.family.config_from_source(files.params, "meta")
    for name in [name for name in sys.modules if name.startswith("llama_models")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "llama_models", None)

    with pytest.raises(PluginError) as caught:
        family.load_reference(config, files.directory, torch.float32, torch.device("cpu"))

    assert re.search(
        r"pip install 'megacore-llama2\[meta\]'\. Or give the same model in the Hugging Face", str(caught.value)
    )


# Sizes

PUBLISHED: dict[tuple[str, str], dict[str, Any]] = {
    ("llama2", "7"): {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
    },
    ("llama2", "13"): {
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "num_key_value_heads": 40,
    },
    ("llama2", "70"): {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
    ("codellama", "34"): {
        "hidden_size": 8192,
        "intermediate_size": 22016,
        "num_hidden_layers": 48,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "rope_theta": 1000000,
    },
}
"""From the ``config.json`` of each size. Code Llama is Llama 2 with another rotary base, and more tokens in some."""

for size, vocab_size in {"7": 32016, "13": 32016, "70": 32016}.items():
    PUBLISHED["codellama", size] = PUBLISHED["llama2", size] | {"rope_theta": 1000000, "vocab_size": vocab_size}

PUBLISHED = {
    (family, size): {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 32000,
        "max_position_embeddings": FAMILIES[family],
        "rms_norm_eps": 1e-05,
        **values,
    }
    for (family, size), values in PUBLISHED.items()
}

PUBLISHED_PARAMS: dict[tuple[str, str], dict[str, Any]] = {
    ("llama2", "7"): {"dim": 4096, "multiple_of": 256, "n_heads": 32, "n_layers": 32},
    ("llama2", "13"): {"dim": 5120, "multiple_of": 256, "n_heads": 40, "n_layers": 40},
    ("llama2", "70"): {
        "dim": 8192,
        "multiple_of": 4096,
        "ffn_dim_multiplier": 1.3,
        "n_heads": 64,
        "n_kv_heads": 8,
        "n_layers": 80,
    },
    ("codellama", "34"): {
        "dim": 8192,
        "multiple_of": 256,
        "ffn_dim_multiplier": 1.0,
        "n_heads": 64,
        "n_kv_heads": 8,
        "n_layers": 48,
        "rope_theta": 1000000,
    },
}
"""From ``params.json``; all have ``"norm_eps": 1e-05``, and a vocabulary that they leave to the tokenizer."""


@pytest.mark.parametrize("family_name, size", PUBLISHED, ids="-".join)
def test_a_preset_has_the_parameters_of_the_published_size(family_name, size):
    family = megacore.get_family(family_name)
    with torch.device("meta"):
        theirs = LlamaForCausalLM(LlamaConfig(**PUBLISHED[family_name, size]))

    ours = model_specs(family.preset(size), family.build_layer)

    assert sum(torch.Size(spec.shape).numel() for spec in ours.values()) == theirs.num_parameters()


@pytest.mark.parametrize("family_name, size", PUBLISHED, ids="-".join)
def test_a_preset_is_what_the_published_configuration_says(family_name, size):
    family = megacore.get_family(family_name)

    assert family.family.config_from_source(PUBLISHED[family_name, size], "hf") == family.preset(size)


@pytest.mark.parametrize("family_name, size", PUBLISHED_PARAMS, ids="-".join)
def test_a_preset_is_what_metas_own_configuration_says(family_name, size):
    family = megacore.get_family(family_name)
    params = PUBLISHED_PARAMS[family_name, size] | {"norm_eps": 1e-05, "vocab_size": 32000}

    assert family.family.config_from_source(params, "meta") == family.preset(size)


def test_there_are_no_other_presets():
    for name in FAMILIES:
        assert {(name, size) for size in megacore.get_family(name).family.presets} == {
            key for key in PUBLISHED if key[0] == name
        }


def test_a_size_that_the_checkpoint_is_not_of_is_refused_with_what_differs(published, tmp_path):
    _, directory = published

    with pytest.raises(
        ConfigError, match=r"not describe a codellama of size 34: num_layers 3 instead of 48, hidden_size"
    ):
        convert("codellama", directory, tmp_path / "ckpt", size="34")


# On its own


def test_the_plugin_works_without_the_one_for_llama(published, tmp_path):
    _, directory = published
    script = """
import sys
sys.modules["megacore_llama"] = None
import megacore
assert megacore.list_families() == ["codellama", "llama2"], megacore.list_families()
megacore.convert("llama2", sys.argv[1], sys.argv[2])
megacore.export(sys.argv[2], sys.argv[3], format="hf")
assert not any(name.split(".")[0] == "megacore_llama" and module for name, module in sys.modules.items())
"""
    environment = {
        "MEGACORE_DISABLE_PLUGINS": "megacore-llama,megacore-falcon",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }

    done = subprocess.run(
        [sys.executable, "-c", script, directory, tmp_path / "ckpt", tmp_path / "out"],
        env=environment,
        capture_output=True,
        text=True,
    )

    assert done.returncode == 0, done.stderr
