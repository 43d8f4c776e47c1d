"""Llamas in Meta's own format: what Meta's implementation wrote is read, computed alike, and written back as it was."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM

import megacore
from megacore.checkpoint import Checkpoint
from megacore.cli import cli
from megacore.errors import CheckpointError, ConfigError, CorruptCheckpointError, LayoutError, WeightMapError
from megacore.model import load_model
from megacore.parallel import ParallelContext
from megacore.verification import meta_reference
from megacore.verification.meta_reference import _model_parallel_group_of_this_rank
from megacore.weights import config_to_meta, convert, export, translate
from meta_files import CASES, INPUT_IDS, MODELS, in_hugging_face_names, read_shards

FP32 = {"rtol": 1.3e-6, "atol": 1e-5}


def convert_and_load(directory: Path, tmp_path: Path):
    """Our model of a published directory, through a native checkpoint."""
    convert("llama", directory, tmp_path / "ckpt")
    return load_model(Checkpoint(tmp_path / "ckpt"), ParallelContext.single(), dtype=torch.float32)


def message(error, call, *arguments, **options) -> str:
    with pytest.raises(error) as caught:
        call(*arguments, **options)
    return str(caught.value)


def assert_same_shards(found, expected):
    """Same number of files; in each the same names, dtypes, shapes and bits."""
    assert len(found) == len(expected)
    for found_shard, expected_shard in zip(found, expected, strict=True):
        assert found_shard.keys() == expected_shard.keys()
        for name, tensor in expected_shard.items():
            assert found_shard[name].dtype == tensor.dtype, name
            assert torch.equal(found_shard[name], tensor), name


def cut_evenly(weights, num_ranks):
    """The files of ``num_ranks`` ranks of the first generation, written down by hand."""
    shards = [{} for _ in range(num_ranks)]
    for name, tensor in weights.items():
        for rank, shard in enumerate(shards):
            if "norm" in name:
                shard[name] = tensor
            elif any(part in name for part in (".wo.", ".w2.", "tok_embeddings")):
                shard[name] = tensor.chunk(num_ranks, dim=1)[rank].clone()
            else:
                shard[name] = tensor.chunk(num_ranks, dim=0)[rank].clone()
    return shards


@pytest.fixture
def copied(meta_files, tmp_path):
    """A copy of one of Meta's checkpoints, to be changed: ``copied("multi-head", 2)``."""

    def copy(model: str, num_ranks: int, embedding: str = "vocabulary") -> Path:
        source = meta_files[model, num_ranks, embedding].directory
        return Path(shutil.copytree(source, tmp_path / "published"))

    return copy


def edit_params(directory: Path, **changes) -> None:
    """Change keys of ``params.json``; those that become ``None`` are removed."""
    params = json.loads((directory / "params.json").read_text()) | changes
    kept = {key: value for key, value in params.items() if value is not None}
    (directory / "params.json").write_text(json.dumps(kept))


def edit_tensors(path: Path, change) -> None:
    tensors = torch.load(path, weights_only=True)
    change(tensors)
    torch.save(tensors, path)


# What is computed


@pytest.mark.parametrize("case", CASES, ids=str)
def test_logits_are_those_of_metas_own_implementation(meta_files, tmp_path, case):
    files = meta_files[case]

    ours = convert_and_load(files.directory, tmp_path)(INPUT_IDS)

    assert 0.3 < files.logits.std() < 3
    assert_close(ours, files.logits, **FP32)


@pytest.mark.parametrize("model", MODELS)
def test_logits_are_those_of_transformers_with_the_same_weights(meta_files, tmp_path, model):
    files = meta_files[model, 1, "vocabulary"]
    ours = convert_and_load(files.directory, tmp_path)
    theirs = transformers_model(files)

    assert_close(ours(INPUT_IDS), theirs(INPUT_IDS).logits, **FP32)


def transformers_model(files) -> LlamaForCausalLM:
    params, weights = files.params, files.weights
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=params["dim"],
            intermediate_size=len(weights["layers.0.feed_forward.w1.weight"]),
            num_hidden_layers=params["n_layers"],
            num_attention_heads=params["n_heads"],
            num_key_value_heads=params.get("n_kv_heads", params["n_heads"]),
            vocab_size=params["vocab_size"],
            rms_norm_eps=params["norm_eps"],
            rope_parameters={"rope_type": "default", "rope_theta": params.get("rope_theta", 10000.0)},
        )
    )
    model.load_state_dict(in_hugging_face_names(weights, params))
    return model.eval()


# There and back


@pytest.mark.parametrize("case", [case for case in CASES if case[1] == 1 or case[2] == "width"], ids=str)
def test_every_tensor_comes_back_as_it_was(meta_files, tmp_path, case):
    files = meta_files[case]

    convert("llama", files.directory, tmp_path / "ckpt")
    export(tmp_path / "ckpt", tmp_path / "exported", format="meta", tp=case[1])

    assert_same_shards(read_shards(tmp_path / "exported"), files.shards())
    assert json.loads((tmp_path / "exported" / "params.json").read_text()) == files.params


@pytest.mark.parametrize("written_by, read_by", [(1, 2), (2, 1), (1, 3), (2, 6), (3, 2)])
def test_files_of_any_number_of_ranks_become_files_of_any_other(meta_files, tmp_path, written_by, read_by):
    files = meta_files["multi-head", 1, "vocabulary"]
    (tmp_path / "published").mkdir()
    shutil.copy(files.directory / "params.json", tmp_path / "published")
    for rank, shard in enumerate(cut_evenly(files.weights, written_by)):
        torch.save(shard, tmp_path / "published" / f"consolidated.{rank:02d}.pth")

    convert("llama", tmp_path / "published", tmp_path / "ckpt", tp=2, pp=3)
    export(tmp_path / "ckpt", tmp_path / "exported", format="meta", tp=read_by)

    assert_same_shards(read_shards(tmp_path / "exported"), cut_evenly(files.weights, read_by))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_every_dtype_is_kept(copied, tmp_path, dtype):
    directory = copied("multi-head", 2, "width")
    for path in directory.glob("*.pth"):
        edit_tensors(path, lambda tensors: tensors.update({name: t.to(dtype) for name, t in tensors.items()}))

    convert("llama", directory, tmp_path / "ckpt")
    export(tmp_path / "ckpt", tmp_path / "exported", format="meta", tp=2)

    assert_same_shards(read_shards(tmp_path / "exported"), read_shards(directory))


def test_the_embedding_may_be_cut_either_way(meta_files, tmp_path):
    for cut in ("vocabulary", "width"):
        convert("llama", meta_files["multi-head", 2, cut].directory, tmp_path / cut)
    width, vocabulary = ((meta_files["multi-head", 2, cut].shards()[0]["tok_embeddings.weight"].shape)
                         for cut in ("width", "vocabulary"))  # fmt: skip

    assert (width, vocabulary) == ((102, 30), (51, 60))
    name = "embedding.word_embeddings.weight"
    one, other = (Checkpoint(tmp_path / cut).matrix(name) for cut in ("vocabulary", "width"))
    everything = slice(0, 102), slice(0, 60)
    assert torch.equal(one.read(*everything), other.read(*everything))
    assert torch.equal(
        one.read(*everything), meta_files["multi-head", 1, "vocabulary"].weights["tok_embeddings.weight"]
    )


@pytest.mark.parametrize("said", [-1, None], ids=["-1", "absent"])
@pytest.mark.parametrize("case", [("multi-head", 2, "width"), ("odd", 1, "vocabulary")], ids=str)
def test_a_vocabulary_that_is_left_to_the_tokenizer_is_told_from_the_head(meta_files, copied, tmp_path, said, case):
    directory = copied(*case)
    edit_params(directory, vocab_size=said)

    model = convert_and_load(directory, tmp_path)
    export(tmp_path / "ckpt", tmp_path / "exported", format="meta", tp=case[1])

    assert model.config.vocab_size == meta_files[case].params["vocab_size"]
    assert_same_shards(read_shards(tmp_path / "exported"), meta_files[case].shards())


def test_rotary_tables_are_ignored(meta_files, copied, tmp_path):
    directory = copied("multi-head", 2)
    table = torch.ones(5)
    for path in directory.glob("*.pth"):
        edit_tensors(
            path, lambda t: t.update({"rope.freqs": table, "layers.0.attention.inner_attention.rope.freqs": table})
        )

    ours = convert_and_load(directory, tmp_path)(INPUT_IDS)

    assert_close(ours, meta_files["multi-head", 2, "vocabulary"].logits, **FP32)


@pytest.mark.parametrize("place", [".", ".."], ids=["beside the weights", "beside the directories of all sizes"])
def test_the_tokenizer_is_carried(copied, tmp_path, place):
    directory = copied("multi-head", 1)
    (directory / place / "tokenizer.model").write_bytes(b"sentencepiece's own bytes")

    convert("llama", directory, tmp_path / "ckpt")
    export(tmp_path / "ckpt", tmp_path / "exported", format="meta")

    assert (tmp_path / "exported" / "tokenizer.model").read_bytes() == b"sentencepiece's own bytes"


def test_a_tokenizer_from_beside_the_directory_is_told(copied, tmp_path):
    directory, notes = copied("multi-head", 1), []
    (tmp_path / "tokenizer.model").write_bytes(b"sentencepiece's own bytes")

    convert("llama", directory, tmp_path / "ckpt", report=notes.append)

    [note] = notes
    assert f"the tokenizer is {tmp_path / 'tokenizer.model'}, from beside the checkpoint's directory" in note


def test_a_tokenizer_that_is_in_the_directory_needs_no_note(copied, tmp_path):
    directory, notes = copied("multi-head", 1), []
    for place in (directory, tmp_path):
        (place / "tokenizer.model").write_bytes(b"sentencepiece's own bytes")

    convert("llama", directory, tmp_path / "ckpt", report=notes.append)

    assert notes == []


@pytest.mark.parametrize("names", [(), ("tokenizer_config.json",)], ids=["alone", "with its settings"])
def test_a_tokenizer_that_transformers_does_not_load_is_told(copied, tmp_path, names):
    directory, notes = copied("multi-head", 1), []
    for name in ("tokenizer.model", *names):
        (directory / name).write_text("{}")

    translate("llama", directory, tmp_path / "hf", report=notes.append)

    assert ["transformers needs tokenizer_config.json" in note for note in notes] == ([] if names else [True])


@pytest.mark.parametrize(
    "dim, width, settings",
    [
        (4096, 11008, {"multiple_of": 256}),
        (8192, 22016, {"multiple_of": 256}),
        (8192, 28672, {"multiple_of": 4096, "ffn_dim_multiplier": 1.3}),
        (32, 57, None),
        (48, 1, None),
        (8192, 28673, None),
    ],
)
def test_the_width_of_the_mlp_is_written_so_that_metas_formula_gives_it(meta_files, dim, width, settings):
    from llama_models.llama3.args import ModelArgs
    from llama_models.llama3.model import FeedForward

    config = megacore.ModelConfig(
        family="llama", num_layers=1, hidden_size=dim, ffn_hidden_size=width, num_attention_heads=1, num_kv_heads=1,
        head_dim=dim, vocab_size=9, max_position_embeddings=16, norm_eps=1e-5,
    )  # fmt: skip

    params = config_to_meta(config)

    args = ModelArgs(**params)
    with _model_parallel_group_of_this_rank(), torch.device("meta"):
        layer = FeedForward(dim, 4 * dim, args.multiple_of, args.ffn_dim_multiplier)
    assert layer.w1.weight.shape == (width, dim)
    if settings is not None:
        assert {key: params[key] for key in params if key in ("multiple_of", "ffn_dim_multiplier")} == settings


# Between formats


@pytest.mark.parametrize("case", [("multi-head", 1, "vocabulary"), ("2 key-value heads", 2, "width")], ids=str)
@pytest.mark.parametrize("way", ["in one command", "in two"])
def test_metas_files_become_a_directory_that_transformers_loads(meta_files, tmp_path, case, way):
    files = meta_files[case]
    source, out = str(files.directory), str(tmp_path / "hf")

    if way == "in one command":
        done = CliRunner().invoke(cli, ["translate", "--model", "llama", "--from", source, "--out", out])
        assert done.exit_code == 0, done.output
        assert done.output == f"Translated {source} to {out} (hf).\n"
    else:
        convert("llama", source, tmp_path / "ckpt")
        export(tmp_path / "ckpt", out)

    loaded, loading = LlamaForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not loading["missing_keys"] | loading["unexpected_keys"] | loading["mismatched_keys"]
    assert_close(loaded(INPUT_IDS).logits, files.logits, **FP32)
    expected = in_hugging_face_names(files.weights, files.params)
    found = load_file(tmp_path / "hf" / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert loaded.config.max_position_embeddings == 2048


def test_a_translation_leaves_no_native_files(meta_files, tmp_path):
    translate("llama", meta_files["multi-head", 2, "width"].directory, tmp_path / "hf")

    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]
    assert sorted(path.name for path in (tmp_path / "hf").iterdir()) == ["config.json", "model.safetensors"]


def test_a_translation_converts_the_dtype_as_torch_does(meta_files, tmp_path):
    files = meta_files["multi-head", 2, "width"]

    megacore.translate("llama", files.directory, tmp_path / "hf", dtype=torch.bfloat16)

    found = load_file(tmp_path / "hf" / "model.safetensors")
    for name, tensor in in_hugging_face_names(files.weights, files.params).items():
        assert torch.equal(found[name], tensor.to(torch.bfloat16)), name
    assert LlamaConfig.from_pretrained(tmp_path / "hf").dtype == torch.bfloat16


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_a_hugging_face_directory_becomes_metas_files(meta_files, tmp_path, num_ranks):
    files = meta_files["multi-head", 1, "vocabulary"]
    transformers_model(files).save_pretrained(tmp_path / "hf")

    translate("llama", tmp_path / "hf", tmp_path / "meta", format="meta", tp=num_ranks)

    assert_same_shards(read_shards(tmp_path / "meta"), cut_evenly(files.weights, num_ranks))
    params = json.loads((tmp_path / "meta" / "params.json").read_text())
    assert params.items() >= {k: v for k, v in files.params.items() if k != "multiple_of"}.items()
    assert not params.keys() & {"n_kv_heads", "rope_theta"}  # which the first loaders do not know


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"attention_bias": True, "mlp_bias": True}, "biases"),
        ({"tie_word_embeddings": True}, "head tied to the embedding"),
        ({"head_dim": 20}, "4 heads of 20 in a hidden size of 32"),
        ({"hidden_act": "gelu"}, "activation gelu"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}, "scaled rotary embedding"),
    ],
    ids=["biases", "tied", "head_dim", "activation", "scaling"],
)
@pytest.mark.parametrize("verb", ["export", "translate"])
def test_what_metas_format_cannot_say_is_refused_by_name(publish, tmp_path, shapes, settings, said, verb):
    published = publish(**shapes["multi-head"] | settings)

    if verb == "export":
        convert("llama", published.directory, tmp_path / "ckpt")
        refusal = message(ConfigError, export, tmp_path / "ckpt", tmp_path / "out", format="meta")
    else:
        refusal = message(ConfigError, translate, "llama", published.directory, tmp_path / "out", format="meta")

    assert refusal == f"Meta's format cannot hold this model: it has no way to say {said}"
    assert not (tmp_path / "out").exists()


# Numbers of ranks


def test_a_number_of_ranks_that_does_not_divide_is_refused_with_those_that_do(meta_files, tmp_path):
    convert("llama", meta_files["multi-head", 1, "vocabulary"].directory, tmp_path / "ckpt")

    refusal = message(LayoutError, export, tmp_path / "ckpt", tmp_path / "out", format="meta", tp=4)

    assert refusal == (
        "Meta's format is cut evenly, and 4 ranks do not divide the 6 of n_heads. "
        "Numbers of ranks that work: 1, 2, 3, 6"
    )
    assert not (tmp_path / "out").exists()


def test_the_key_value_heads_limit_the_number_of_ranks(meta_files, tmp_path):
    convert("llama", meta_files["2 key-value heads", 1, "vocabulary"].directory, tmp_path / "ckpt")

    refusal = message(LayoutError, export, tmp_path / "ckpt", tmp_path / "out", format="meta", tp=3)

    assert "do not divide the 2 of n_kv_heads. Numbers of ranks that work: 1, 2" in refusal


def test_pipeline_stages_are_refused(meta_files, tmp_path):
    convert("llama", meta_files["multi-head", 1, "vocabulary"].directory, tmp_path / "ckpt")

    refusal = message(ConfigError, export, tmp_path / "ckpt", tmp_path / "out", format="meta", pp=3)

    assert refusal == "the format meta is not cut over pipeline stages: leave out --pp"


def test_the_command_line_cuts_over_ranks(meta_files, tmp_path):
    files = meta_files["multi-head", 1, "vocabulary"]
    ckpt, out = str(tmp_path / "ckpt"), str(tmp_path / "out")
    convert("llama", files.directory, ckpt)

    done = CliRunner().invoke(cli, ["export", ckpt, "--out", out, "--format", "meta", "--tp", "2"])

    assert done.exit_code == 0, done.output
    assert_same_shards(read_shards(tmp_path / "out"), cut_evenly(files.weights, 2))


# Files that do not fit


def test_a_gap_in_the_numbering_is_named(copied, tmp_path):
    directory = copied("multi-head", 2)
    (directory / "consolidated.00.pth").rename(directory / "consolidated.03.pth")

    refusal = message(CheckpointError, convert, "llama", directory, tmp_path / "ckpt")

    assert refusal == f"{directory} has consolidated.03.pth, but consolidated.00.pth, consolidated.02.pth missing"


def test_a_long_list_of_missing_files_is_cut_short(copied, tmp_path):
    directory = copied("multi-head", 1)
    (directory / "consolidated.00.pth").rename(directory / "consolidated.09.pth")

    refusal = message(CheckpointError, convert, "llama", directory, tmp_path / "ckpt")

    assert refusal.endswith("consolidated.06.pth, consolidated.07.pth and more missing")


def test_two_files_of_one_rank_are_refused(copied, tmp_path):
    directory = copied("multi-head", 1)
    shutil.copy(directory / "consolidated.00.pth", directory / "consolidated.0.pth")

    refusal = message(CheckpointError, convert, "llama", directory, tmp_path / "ckpt")

    assert refusal == f"{directory} has two files of rank 0, consolidated.0.pth and consolidated.00.pth"


def test_a_number_that_no_rank_has_is_refused(copied, tmp_path):
    directory = copied("multi-head", 1)
    name = f"consolidated.{'9' * 30}.pth"
    (directory / "consolidated.00.pth").rename(directory / name)

    refusal = message(CheckpointError, convert, "llama", directory, tmp_path / "ckpt")

    assert refusal == f"{directory / name} has too large a number: at most 10000 files are read"


@pytest.mark.parametrize("vocab_size", [102, -1], ids=["said", "left to the tokenizer"])
@pytest.mark.parametrize("embedding", ["vocabulary", "width"])
def test_the_last_file_missing_is_told_from_the_shapes(copied, tmp_path, embedding, vocab_size):
    directory = copied("multi-head", 2, embedding)
    edit_params(directory, vocab_size=vocab_size)
    (directory / "consolidated.01.pth").unlink()

    refusal = message(CheckpointError, convert, "llama", directory, tmp_path / "ckpt")

    assert refusal == (
        f"the tensors in {directory} are cut over 2 ranks, and there are 1 files: consolidated.01.pth missing"
    )


def test_a_file_too_many_is_told_from_the_shapes(copied, tmp_path):
    directory = copied("multi-head", 2)
    shutil.copy(directory / "consolidated.01.pth", directory / "consolidated.02.pth")

    refusal = message(CheckpointError, convert, "llama", directory, tmp_path / "ckpt")

    assert refusal == f"the tensors in {directory} are cut over 2 ranks, and there are 3 files"


def test_no_weights_at_all_are_said_to_be_missing(copied, tmp_path):
    directory = copied("multi-head", 1)
    (directory / "consolidated.00.pth").unlink()

    assert "no consolidated.00.pth" in message(CheckpointError, convert, "llama", directory, tmp_path / "ckpt")


@pytest.mark.parametrize("length", [0, 1000, -1000])
def test_a_truncated_file_is_named(copied, tmp_path, length):
    directory = copied("multi-head", 2)
    path = directory / "consolidated.01.pth"
    path.write_bytes(path.read_bytes()[:length])

    refusal = message(CorruptCheckpointError, convert, "llama", directory, tmp_path / "ckpt")

    assert str(path) in refusal
    assert not (tmp_path / "ckpt").exists()


def test_files_with_different_names_are_refused(copied, tmp_path):
    directory = copied("multi-head", 2)
    edit_tensors(directory / "consolidated.01.pth", lambda tensors: tensors.pop("layers.1.attention.wq.weight"))

    refusal = message(CorruptCheckpointError, convert, "llama", directory, tmp_path / "ckpt")

    assert "do not hold the same tensors: only one of them has layers.1.attention.wq.weight" in refusal


def test_files_that_disagree_about_what_both_have_are_refused(copied, tmp_path):
    directory = copied("multi-head", 2)
    edit_tensors(directory / "consolidated.01.pth", lambda tensors: tensors["norm.weight"][3].add_(1e-3))

    refusal = message(CorruptCheckpointError, convert, "llama", directory, tmp_path / "ckpt")

    assert "each have the whole of norm.weight, and differ" in refusal


def test_a_tensor_of_different_dtypes_is_refused(copied, tmp_path):
    directory = copied("multi-head", 2)
    name = "layers.1.attention.wq.weight"
    edit_tensors(directory / "consolidated.01.pth", lambda tensors: tensors.update({name: tensors[name].bfloat16()}))

    refusal = message(CorruptCheckpointError, convert, "llama", directory, tmp_path / "ckpt")

    assert f"{name} has different dtypes in the files of {directory}: torch.bfloat16, torch.float32" in refusal


def test_a_dtype_that_no_parameter_has_is_refused_by_name(copied, tmp_path):
    directory = copied("multi-head", 1)
    name = "layers.1.attention.wq.weight"
    edit_tensors(
        directory / "consolidated.00.pth", lambda tensors: tensors.update({name: tensors[name].to(torch.int8)})
    )

    assert f"{name} has dtype int8" in message(CheckpointError, convert, "llama", directory, tmp_path / "ckpt")


class Harmful:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_a_file_that_would_run_something_is_refused_and_runs_nothing(copied, tmp_path):
    directory = copied("multi-head", 1)
    edit_tensors(
        directory / "consolidated.00.pth", lambda tensors: tensors.update({"x": Harmful(tmp_path / "executed")})
    )

    refusal = message(CheckpointError, convert, "llama", directory, tmp_path / "ckpt")

    assert "nothing in it was executed" in refusal
    assert sorted(path.name for path in tmp_path.iterdir()) == ["published"]


@pytest.mark.parametrize("content", [[1, 2], {"a": 1}, torch.zeros(3)], ids=["list", "numbers", "tensor"])
def test_a_file_of_something_else_is_refused(copied, tmp_path, content):
    directory = copied("multi-head", 1)
    torch.save(content, directory / "consolidated.00.pth")

    assert "is not in Meta's format" in message(CorruptCheckpointError, convert, "llama", directory, tmp_path / "ckpt")


def test_all_tensors_that_do_not_fit_are_listed_at_once(copied, tmp_path):
    directory = copied("multi-head", 2)
    for path in directory.glob("*.pth"):
        edit_tensors(
            path,
            lambda tensors: (
                tensors.pop("layers.1.attention.wq.weight"),
                tensors.update({"layers.0.attention.bias": torch.ones(60)}),
                tensors.update({"layers.0.feed_forward.w2.weight": torch.ones(60, 80)}),
                tensors.update({"norm.weight": torch.ones(61)}),
            ),
        )

    refusal = message(WeightMapError, convert, "llama", directory, tmp_path / "ckpt")

    heading, missing, unknown, shaped = refusal.splitlines()
    assert heading == f"{directory} does not hold the tensors of this model:"
    assert missing == "  missing: layers.1.attention.wq.weight"
    assert unknown == "  unknown to the weight map: layers.0.attention.bias"
    assert "layers.0.feed_forward.w2.weight [60, 160] instead of [60, 168]" in shaped
    assert "norm.weight [61] instead of [60]" in shaped


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"use_scaled_rope": True}, "asks for use_scaled_rope, which llama in Meta's format does not implement"),
        ({"lora_args": {"rank": 4}, "sliding_window": 5}, "asks for lora_args, sliding_window"),
        ({"n_layers": None}, "lacks 'n_layers'"),
        ({"n_heads": 7}, "dim 60 is not a multiple of n_heads 7"),
        ({"n_heads": 0}, "does not describe a model"),
        ({"dim": "60"}, "does not describe a model"),
        ({"norm_eps": "small"}, "norm_eps must be a number"),
        ({"vocab_size": 10.5}, "vocab_size must be a whole number"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_configuration_of_no_use_is_refused_by_key(copied, tmp_path, changes, said):
    directory = copied("multi-head", 1)
    edit_params(directory, **changes)

    assert said in message(ConfigError, convert, "llama", directory, tmp_path / "ckpt")


def test_settings_without_effect_are_accepted(copied, tmp_path):
    directory = copied("multi-head", 1)
    edit_params(directory, use_scaled_rope=False, max_batch_size=32, max_seq_len=512)

    convert("llama", directory, tmp_path / "ckpt")


@pytest.mark.parametrize("text", ["", "[1]", "{"])
def test_a_damaged_configuration_file_is_named(copied, tmp_path, text):
    directory = copied("multi-head", 1)
    (directory / "params.json").write_text(text)

    refusal = message(CorruptCheckpointError, convert, "llama", directory, tmp_path / "ckpt")

    assert f"{directory / 'params.json'} is damaged" in refusal


def test_a_vocabulary_that_nothing_tells_is_said_to_be_unknown(copied, tmp_path):
    directory = copied("multi-head", 1)
    edit_params(directory, vocab_size=-1)
    edit_tensors(directory / "consolidated.00.pth", lambda tensors: tensors.pop("output.weight"))

    refusal = message(CheckpointError, convert, "llama", directory, tmp_path / "ckpt")

    assert "does not say the size of the vocabulary, and consolidated.00.pth has no output.weight" in refusal


# Sizes


PUBLISHED = {
    "7": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "13": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40},
    "30": {"hidden_size": 6656, "intermediate_size": 17920, "num_hidden_layers": 60, "num_attention_heads": 52},
    "65": {"hidden_size": 8192, "intermediate_size": 22016, "num_hidden_layers": 80, "num_attention_heads": 64},
}
"""From the ``config.json`` of each size in the Hugging Face format; the vocabulary is 32000 in all of them."""

PUBLISHED_PARAMS = {
    "7": {"dim": 4096, "multiple_of": 256, "n_heads": 32, "n_layers": 32, "norm_eps": 1e-06, "vocab_size": -1},
    "13": {"dim": 5120, "multiple_of": 256, "n_heads": 40, "n_layers": 40, "norm_eps": 1e-06, "vocab_size": -1},
    "30": {"dim": 6656, "multiple_of": 256, "n_heads": 52, "n_layers": 60, "norm_eps": 1e-06, "vocab_size": -1},
    "65": {"dim": 8192, "multiple_of": 256, "n_heads": 64, "n_layers": 80, "norm_eps": 1e-05, "vocab_size": -1},
}


@pytest.mark.parametrize("size", PUBLISHED)
def test_a_preset_has_the_parameters_of_the_published_size(size):
    from megacore.model import model_specs

    family = megacore.get_family("llama")
    with torch.device("meta"):
        theirs = LlamaForCausalLM(LlamaConfig(vocab_size=32000, **PUBLISHED[size]))

    ours = model_specs(family.preset(size), family.build_layer)

    assert sum(torch.Size(spec.shape).numel() for spec in ours.values()) == theirs.num_parameters()


@pytest.mark.parametrize("size", PUBLISHED)
def test_a_preset_is_what_the_published_file_says(size):
    family = megacore.get_family("llama")

    published = family.family.config_from_source(PUBLISHED_PARAMS[size] | {"vocab_size": 32000}, "meta")

    assert published == family.preset(size)
    assert {key: value for key, value in family.family.config_to_source(published, "meta").items()
            if key in PUBLISHED_PARAMS[size]} == PUBLISHED_PARAMS[size] | {"vocab_size": 32000}  # fmt: skip


def test_there_are_no_other_presets():
    assert list(megacore.get_family("llama").family.presets) == list(PUBLISHED)


def test_a_size_that_the_checkpoint_is_not_of_is_refused_with_what_differs(meta_files, tmp_path):
    directory = meta_files["multi-head", 1, "vocabulary"].directory

    done = CliRunner().invoke(
        cli, ["convert", "--model", "llama", "--size", "7", "--from", str(directory), "--out", str(tmp_path / "ckpt")]
    )

    assert done.exit_code == 2
    assert done.stderr == (
        f"Error: {directory / 'params.json'} does not describe a llama of size 7: num_layers 3 instead of 32, "
        "hidden_size 60 instead of 4096, ffn_hidden_size 168 instead of 11008, num_attention_heads 6 instead of 32, "
        "num_kv_heads 6 instead of 32, head_dim 10 instead of 128\n"
    )
    assert not (tmp_path / "ckpt").exists()


def test_a_size_that_is_not_published_is_refused_with_those_that_are(meta_files, tmp_path):
    directory = meta_files["multi-head", 1, "vocabulary"].directory

    refusal = message(ConfigError, convert, "llama", directory, tmp_path / "ckpt", size="8")

    assert refusal == "model family 'llama' has no size '8'. Known sizes: 7, 13, 30, 65."


def test_the_right_size_is_accepted_whatever_fine_tuning_changed(publish, tmp_path, shapes, monkeypatch):
    published = publish(**shapes["multi-head"] | {"vocab_size": 101, "max_position_embeddings": 128})
    family = megacore.get_family("llama")
    own = {key: value for key, value in family.family.config_from_source(
        json.loads((published.directory / "config.json").read_text()) | {"vocab_size": 99}, "hf"
    ).to_dict().items() if key != "family"}  # fmt: skip
    monkeypatch.setitem(family.family.presets, "tiny", own)

    convert(family, published.directory, tmp_path / "ckpt", size="tiny")


# The reference


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_reference_of_metas_files_is_metas_own_implementation(meta_files, case):
    files = meta_files[case]
    family = megacore.get_family("llama")
    config = family.family.config_from_source(files.params, "meta")

    reference = family.load_reference(config, files.directory, torch.float32, torch.device("cpu"))

    assert type(reference.model).__module__ == "llama_models.llama3.model"
    for input_ids, logits in ((INPUT_IDS, files.logits), (INPUT_IDS[1:, :7], files.logits[1:, :7])):
        assert_close(reference(input_ids), logits, **FP32)
    assert not torch.distributed.is_initialized()


def load_reference(directory: Path, files):
    family = megacore.get_family("llama")
    config = family.family.config_from_source(files.params, "meta")
    return family.load_reference(config, directory, torch.float32, torch.device("cpu"))


def test_a_directory_in_both_formats_is_verified_as_it_is_converted(meta_files, copied):
    files = meta_files["multi-head", 1, "vocabulary"]
    directory = copied("multi-head", 1)
    transformers_model(files).save_pretrained(directory)

    assert type(load_reference(directory, files)).__name__ == "TransformersReference"


@pytest.mark.parametrize(
    "text, said",
    [("{", "is damaged"), ("[1]", "is damaged"), ('{"n_heads": 4}', "lacks 'dim'")],
    ids=["no JSON", "a list", "no dim"],
)
def test_a_reference_with_a_configuration_of_no_use_is_refused(meta_files, copied, text, said):
    directory = copied("multi-head", 1)
    (directory / "params.json").write_text(text)

    refusal = message(CheckpointError, load_reference, directory, meta_files["multi-head", 1, "vocabulary"])

    assert f"{directory / 'params.json'} {said}" in refusal


def test_a_reference_without_a_head_is_refused(meta_files, copied):
    directory = copied("multi-head", 1)
    edit_tensors(directory / "consolidated.00.pth", lambda tensors: tensors.pop("output.weight"))

    refusal = message(CheckpointError, load_reference, directory, meta_files["multi-head", 1, "vocabulary"])

    assert refusal == f"the reference {directory} lacks output.weight"


def test_a_reference_is_not_held_twice_while_it_is_cast(meta_files, monkeypatch):
    files = meta_files["multi-head", 2, "vocabulary"]
    states = []
    merged = meta_reference._merged_state
    monkeypatch.setattr(meta_reference, "_merged_state", lambda *a: states.append(merged(*a)) or states[-1])

    load_reference(files.directory, files)

    assert states == [{}]


@pytest.mark.parametrize("tp", [1, 2])
def test_verify_compares_with_metas_own_implementation(meta_files, tmp_path, tp):
    files = meta_files["multi-head", 2, "width"]
    convert("llama", files.directory, tmp_path / "ckpt", tp=tp)

    report = megacore.verify(tmp_path / "ckpt", files.directory, INPUT_IDS, tolerance=1e-4)

    assert report.passed, report.verdict
    assert report.tp == tp


def test_verify_does_not_pass_a_wrong_model(meta_files, copied, tmp_path):
    directory = copied("multi-head", 2)
    edit_params(directory, norm_eps=1e-3)
    convert("llama", directory, tmp_path / "ckpt")

    assert not megacore.verify(tmp_path / "ckpt", meta_files["multi-head", 2, "vocabulary"].directory, INPUT_IDS).passed


def test_without_metas_implementation_it_is_said_how_to_get_it(meta_files, tmp_path):
    files = meta_files["multi-head", 1, "vocabulary"]
    convert("llama", files.directory, tmp_path / "ckpt")
    script = """
import sys
sys.modules["llama_models"] = None
from megacore.cli import main
sys.argv = ["megacore", "verify", sys.argv[1], "--reference", sys.argv[2], "--random-ids", "--seq-length", "8"]
main()
"""

    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "ckpt", files.directory], capture_output=True, text=True
    )

    assert done.returncode == 2
    assert re.fullmatch(
        rf"Error: the reference {files.directory} is in Meta's format, which needs Meta's own implementation, "
        r"but that is not installed \(.*\): pip install 'megacore-llama\[meta\]'\. Or give the same model "
        r"in the Hugging Face format as the reference\n",
        done.stderr,
    )
