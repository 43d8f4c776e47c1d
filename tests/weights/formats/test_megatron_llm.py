"""Llamas in the format megatron-llm: read, written, and updated from the rotary layout that it had first."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from megacore.cli import cli
from megacore.errors import ConfigError, CorruptCheckpointError, OutputError
from megacore.weights import convert, export
from megacore.weights.formats.megatron_llm.rotary_update import permute_qkv
from megatron_llm_files import (
    TRACKER,
    Model,
    assert_same_tensors,
    flat,
    load,
    model_of,
    native_tensors,
    rank_file,
    rank_model,
    write_megatron_llm,
)

SHAPE = {
    "num_hidden_layers": 4,
    "hidden_size": 96,
    "intermediate_size": 20,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "vocab_size": 100,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
    "tie_word_embeddings": False,
}
CUTS = [(1, 1), (2, 1), (1, 2), (2, 2), (4, 4)]


@pytest.fixture
def published(publish):
    return publish(**SHAPE)


def as_model(published, **args) -> Model:
    return model_of(published.tensors(), published.model.config, **args)


@pytest.fixture
def native(published, tmp_path) -> Path:
    """The model, converted from what transformers saved."""
    convert("llama", published.directory, tmp_path / "native")
    return tmp_path / "native"


def manifest(directory: Path) -> dict:
    return json.loads((directory / "megacore.json").read_text())


def message(error, call, *arguments, **options) -> str:
    with pytest.raises(error) as caught:
        call(*arguments, **options)
    return str(caught.value)


def refusal(*words: object, exit_code: int) -> str:
    result = CliRunner().invoke(cli, [str(word) for word in words])
    assert result.exit_code == exit_code, result.output
    return result.output


# Reading


@pytest.mark.parametrize("spelling", ["converted", "trained"])
@pytest.mark.parametrize("tp, pp", CUTS)
def test_it_converts_to_the_tensors_that_the_hugging_face_files_convert_to(
    published, native, tmp_path, tp, pp, spelling
):
    write_megatron_llm(tmp_path / "meg", as_model(published), tp=tp, pp=pp, spelling=spelling)

    convert("llama", tmp_path / "meg", tmp_path / "ckpt")

    assert_same_tensors(native_tensors(tmp_path / "ckpt"), native_tensors(native))
    assert manifest(tmp_path / "ckpt")["config"] == manifest(native)["config"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_dtype_is_kept(publish, tmp_path, dtype):
    published = publish(dtype=dtype, **SHAPE)
    write_megatron_llm(tmp_path / "meg", as_model(published), tp=2, pp=2)

    convert("llama", tmp_path / "meg", tmp_path / "ckpt")
    export(tmp_path / "ckpt", tmp_path / "exported")

    convert("llama", published.directory, tmp_path / "expected")
    assert_same_tensors(native_tensors(tmp_path / "ckpt"), native_tensors(tmp_path / "expected"))


def test_it_can_be_cut_on_the_way(published, native, read_tensors, tmp_path):
    write_megatron_llm(tmp_path / "meg", as_model(published), tp=2, pp=2)

    convert("llama", tmp_path / "meg", tmp_path / "ckpt", tp=4, pp=3)
    export(tmp_path / "ckpt", tmp_path / "exported")

    assert_same_tensors(read_tensors(tmp_path / "exported"), published.tensors())


@pytest.mark.parametrize("pp", [1, 2])
def test_a_tied_head_on_the_last_stage_is_the_embedding(publish, tmp_path, pp):
    published = publish(**SHAPE | {"tie_word_embeddings": True})
    write_megatron_llm(tmp_path / "meg", as_model(published), tp=2, pp=pp)

    convert("llama", tmp_path / "meg", tmp_path / "ckpt")

    convert("llama", published.directory, tmp_path / "expected")
    assert_same_tensors(native_tensors(tmp_path / "ckpt"), native_tensors(tmp_path / "expected"))


def test_a_tied_head_that_differs_from_the_embedding_is_refused(publish, tmp_path):
    published = publish(**SHAPE | {"tie_word_embeddings": True})
    write_megatron_llm(tmp_path / "meg", as_model(published), pp=2, spelling="converted")
    path = rank_file(tmp_path / "meg", 0, 1, 2)
    document = load(path)
    document["model"]["word_embeddings_for_head"]["weight"][7, 3] += 1
    torch.save(document, path)

    said = message(CorruptCheckpointError, convert, "llama", tmp_path / "meg", tmp_path / "ckpt")

    assert "the head on the last pipeline stage (word_embeddings_for_head.weight) should be the embedding" in said


def test_the_files_of_a_distributed_optimizer_are_found(published, native, tmp_path):
    write_megatron_llm(tmp_path / "meg", as_model(published), pp=2)
    for stage in range(2):
        path = rank_file(tmp_path / "meg", 0, stage, 2, folder="iter_0000040")
        path.rename(path.with_name("model_rng.pt"))
        optimizer = path.parent.with_name(f"{path.parent.name}_000") / "optim.pt"
        optimizer.parent.mkdir()
        optimizer.write_bytes(b"whatever")

    convert("llama", tmp_path / "meg", tmp_path / "ckpt")

    assert_same_tensors(native_tensors(tmp_path / "ckpt"), native_tensors(native))


def test_what_is_assumed_and_what_is_left_behind_is_said_and_recorded(published, tmp_path):
    write_megatron_llm(tmp_path / "meg", as_model(published))

    result = CliRunner().invoke(
        cli, ["convert", "--model", "llama", "--from", str(tmp_path / "meg"), "--out", str(tmp_path / "ckpt")]
    )

    assert result.exit_code == 0
    notes = [
        "all 100 rows of the vocabulary are kept, since the checkpoint does not say whether the last are padding. If "
        "they are, give the true number with --true-vocab-size",
        "the checkpoint does not record its rotary layout; interleaved pairs are assumed. If it was "
        "converted at commit 332cf3c of its system or earlier, run `megacore permute-qkv` on it first",
        "only the weights are converted; optimizer, opt_param_scheduler, rng_state are left behind",
    ]
    assert result.stderr.splitlines() == [f"Note: {note}." for note in notes]
    assert manifest(tmp_path / "ckpt")["history"][0]["notes"] == notes


def test_secrets_among_the_arguments_are_not_kept(published, tmp_path):
    write_megatron_llm(tmp_path / "meg", as_model(published), wandb_api_key="the secret key")

    convert("llama", tmp_path / "meg", tmp_path / "ckpt")
    export(tmp_path / "ckpt", tmp_path / "out", format="megatron-llm")

    for path in (tmp_path / "ckpt/megacore.json", rank_file(tmp_path / "out", 0, 0, 1)):
        assert b"the secret key" not in path.read_bytes()


def test_a_default_that_the_systems_own_tool_may_have_written_is_pointed_at(publish, tmp_path):
    published = publish(
        **SHAPE | {"rms_norm_eps": 1e-5, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    )
    write_megatron_llm(tmp_path / "meg", as_model(published), spelling="converted", micro_batch_size=1)
    notes: list[str] = []

    convert("llama", tmp_path / "meg", tmp_path / "ckpt", report=notes.append)

    assert any("layernorm_epsilon and rope_theta are the defaults" in note for note in notes)


def test_norms_that_differ_between_ranks_are_said_and_taken_from_the_first(published, native, tmp_path):
    write_megatron_llm(tmp_path / "meg", as_model(published), tp=2, spelling="converted")
    path = rank_file(tmp_path / "meg", 1, 0, 1)
    document = load(path)
    document["model"]["language_model"]["transformer"]["layers.2.input_layernorm.weight"][0] += 1e-3
    torch.save(document, path)
    notes: list[str] = []

    convert("llama", tmp_path / "meg", tmp_path / "ckpt", report=notes.append)

    assert any(note.startswith("encoder.layers.2.input_layernorm.weight should be the same on every") for note in notes)
    assert_same_tensors(native_tensors(tmp_path / "ckpt"), native_tensors(native))


# The padded vocabulary


def sentencepiece_model(path: Path, size: int) -> None:
    import sentencepiece

    text = [f"{chr(97 + a)}{chr(97 + b)}{chr(97 + c)}" for a in range(8) for b in range(8) for c in range(8)]
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(text), model_writer=file, vocab_size=size, model_type="bpe", minloglevel=2
        )


@pytest.mark.parametrize("spelling", ["converted", "trained"])
@pytest.mark.parametrize("tp, pp", [(1, 1), (2, 2)])
def test_padding_is_dropped_when_the_true_vocabulary_is_given(published, native, tmp_path, tp, pp, spelling):
    write_megatron_llm(tmp_path / "meg", as_model(published), tp=tp, pp=pp, spelling=spelling, vocab_rows=256)
    notes: list[str] = []

    convert("llama", tmp_path / "meg", tmp_path / "ckpt", true_vocab_size=100, report=notes.append)

    assert "the last 156 rows of the vocabulary are padding and were dropped" in notes
    assert_same_tensors(native_tensors(tmp_path / "ckpt"), native_tensors(native))
    assert manifest(tmp_path / "ckpt")["config"]["vocab_size"] == 100


def test_padding_that_is_not_known_is_kept_and_said(published, tmp_path):
    write_megatron_llm(tmp_path / "meg", as_model(published), tp=2, vocab_rows=256)
    sentencepiece_model(tmp_path / "meg/tokenizer.model", 97)
    notes: list[str] = []

    convert("llama", tmp_path / "meg", tmp_path / "ckpt", report=notes.append)

    assert notes[0].startswith("all 256 rows of the vocabulary are kept, although tokenizer.model has 97 tokens")
    assert manifest(tmp_path / "ckpt")["config"]["vocab_size"] == 256
    last = native_tensors(tmp_path / "ckpt")["embedding.word_embeddings.weight"][99:]
    assert torch.equal(last, last[:1].expand(157, -1))


@pytest.mark.parametrize(
    "new_tokens, extra, kept", [(False, None, 100), (False, "<|a|>,<|b|>", 128), (True, None, 128), (None, None, 128)]
)
def test_the_tokenizer_tells_when_no_tokens_were_added_to_it(published, tmp_path, new_tokens, extra, kept):
    model = as_model(published, new_tokens=new_tokens, vocab_extra_ids_list=extra)
    write_megatron_llm(tmp_path / "meg", model, vocab_rows=128)
    sentencepiece_model(tmp_path / "meg/tokenizer.model", 100)

    convert("llama", tmp_path / "meg", tmp_path / "ckpt")

    assert manifest(tmp_path / "ckpt")["config"]["vocab_size"] == kept


@pytest.mark.parametrize("size, rows", [(101, 100), (257, 256)])
def test_a_true_vocabulary_larger_than_the_embedding_is_refused(published, tmp_path, size, rows):
    write_megatron_llm(tmp_path / "meg", as_model(published), vocab_rows=rows)

    said = refusal(
        "convert", "--model", "llama", "--from", tmp_path / "meg", "--out", tmp_path / "ckpt",
        "--true-vocab-size", size, exit_code=2,
    )  # fmt: skip

    assert f"Error: the true vocabulary cannot be of {size}: " in said
    assert said.endswith(f"holds {rows} rows\n")


def test_a_true_vocabulary_for_a_format_that_does_not_pad_is_refused(published, tmp_path):
    said = message(ConfigError, convert, "llama", published.directory, tmp_path / "ckpt", true_vocab_size=9)

    assert said == "this format does not pad the vocabulary: leave out --true-vocab-size"


# Writing


@pytest.mark.parametrize("tp, pp", CUTS)
@pytest.mark.parametrize("tied", [False, True], ids=["head", "tied"])
def test_what_is_written_is_what_the_format_asks_for(publish, tmp_path, tp, pp, tied):
    published = publish(**SHAPE | {"tie_word_embeddings": tied})
    convert("llama", published.directory, tmp_path / "native")

    export(tmp_path / "native", tmp_path / "out", format="megatron-llm", tp=tp, pp=pp)

    padded = 128 * tp
    expected_files = {TRACKER}
    for stage in range(pp):
        for rank in range(tp):
            path = rank_file(tmp_path / "out", rank, stage, pp)
            expected_files.add(str(path.relative_to(tmp_path / "out")))
            document = load(path)
            expected = rank_model(
                as_model(published), rank=rank, tp=tp, stage=stage, pp=pp, spelling="trained", layout="interleaved",
                vocab_rows=padded,
            )  # fmt: skip
            assert_same_tensors(flat(document["model"]), flat(expected))
            assert document["iteration"] == "release"
            assert document["checkpoint_version"] == 3.0
            saved = vars(document["args"])
            assert saved["padded_vocab_size"] == padded
            assert (saved["tensor_model_parallel_size"], saved["pipeline_model_parallel_size"]) == (tp, pp)
            described = as_model(published).args
            assert {name: saved[name] for name in described} == described
            assert document["megacore"] == {"rotary_layout": "interleaved", "true_vocab_size": 100}
    found = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert found == expected_files
    assert (tmp_path / "out" / TRACKER).read_text() == "release"


@pytest.mark.parametrize("tp, pp", CUTS)
@pytest.mark.parametrize("cut", [(1, 1), (2, 3)], ids=["whole", "cut"])
def test_what_was_written_comes_back(published, native, tmp_path, tp, pp, cut):
    convert("llama", published.directory, tmp_path / "cut", tp=cut[0], pp=cut[1])

    export(tmp_path / "cut", tmp_path / "out", format="megatron-llm", tp=tp, pp=pp)
    convert("llama", tmp_path / "out", tmp_path / "back")

    assert_same_tensors(native_tensors(tmp_path / "back"), native_tensors(native))
    assert manifest(tmp_path / "back")["config"] == manifest(native)["config"]


def test_the_tokenizer_and_what_the_checkpoint_said_of_itself_come_back(published, tmp_path):
    model = as_model(published, make_vocab_size_divisible_by=16, seq_length=32, model_name="llama")
    write_megatron_llm(tmp_path / "meg", model, spelling="converted")
    sentencepiece_model(tmp_path / "meg/tokenizer.model", 100)

    convert("llama", tmp_path / "meg", tmp_path / "ckpt")
    export(tmp_path / "ckpt", tmp_path / "out", format="megatron-llm")

    saved = vars(load(rank_file(tmp_path / "out", 0, 0, 1))["args"])
    assert (saved["make_vocab_size_divisible_by"], saved["padded_vocab_size"]) == (16, 112)
    assert (saved["seq_length"], saved["model_name"]) == (32, "llama")
    assert (tmp_path / "out/tokenizer.model").read_bytes() == (tmp_path / "meg/tokenizer.model").read_bytes()


def test_an_argument_that_was_saved_without_a_value_has_the_default(published, native, tmp_path):
    model = as_model(published, make_vocab_size_divisible_by=None, tokenizer_type=None, seq_length=None)
    write_megatron_llm(tmp_path / "meg", model)

    convert("llama", tmp_path / "meg", tmp_path / "ckpt")
    export(tmp_path / "ckpt", tmp_path / "out", format="megatron-llm")

    saved = vars(load(rank_file(tmp_path / "out", 0, 0, 1))["args"])
    assert (saved["make_vocab_size_divisible_by"], saved["padded_vocab_size"]) == (128, 128)
    assert (saved["tokenizer_type"], saved["seq_length"]) == ("SentencePieceTokenizer", 64)


def test_embeddings_are_tied_when_it_was_saved_without_a_value(publish, tmp_path):
    published = publish(**SHAPE | {"tie_word_embeddings": True})
    write_megatron_llm(tmp_path / "meg", as_model(published, tie_embed_logits=None))

    convert("llama", tmp_path / "meg", tmp_path / "ckpt")

    assert manifest(tmp_path / "ckpt")["config"]["tie_embeddings"] is True


def test_the_padding_is_said(native, tmp_path):
    words = ["export", native, "--out", tmp_path / "out", "--format", "megatron-llm", "--tp", 2, "--pp", 4]
    result = CliRunner().invoke(cli, [str(word) for word in words])

    assert result.exit_code == 0, result.output
    assert result.stderr == (
        "Note: the vocabulary of 100 is padded to 256 rows, as the format requires at tp 2: "
        "the new rows repeat the last one.\n"
    )


def test_a_cut_that_does_not_divide_is_refused_with_the_sizes_that_work(native, tmp_path):
    said = refusal("export", native, "--out", tmp_path / "out", "--format", "megatron-llm", "--tp", 3, "--pp", 3,
                   exit_code=2)  # fmt: skip

    assert said == (
        "Error: the format megatron-llm cuts into equal parts only, and cannot divide num_attention_heads_kv 4 by tp 3 "
        "and ffn_hidden_size 20 by tp 3 and num_layers 4 by pp 3. Sizes that work: tp 1, 2, 4; pp 1, 2, 4\n"
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "changes, what",
    [
        ({"attention_bias": True}, "biases of the linear layers"),
        ({"head_dim": 20}, "12 heads of 20 in a hidden size of 96"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}, "yarn scaling"),
        ({"hidden_act": "gelu_pytorch_tanh"}, "no MLP gated by gelu_tanh"),
    ],
)
def test_a_model_that_the_format_cannot_hold_is_refused(publish, tmp_path, changes, what):
    published = publish(**SHAPE | changes)
    convert("llama", published.directory, tmp_path / "native")

    said = message(ConfigError, export, tmp_path / "native", tmp_path / "out", format="megatron-llm")

    assert what in said
    assert not (tmp_path / "out").exists()


def test_linear_scaling_of_the_rotary_embedding_goes_through(publish, tmp_path):
    rope = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
    convert("llama", publish(**SHAPE | {"rope_parameters": rope}).directory, tmp_path / "native")

    export(tmp_path / "native", tmp_path / "out", format="megatron-llm")
    convert("llama", tmp_path / "out", tmp_path / "back")

    assert manifest(tmp_path / "back")["config"]["rope_scaling"] == {"method": "linear", "factor": 2.0}


# The rotary layout that came first


@pytest.mark.parametrize("spelling", ["converted", "trained"])
@pytest.mark.parametrize("tp, pp", [(1, 1), (2, 2), (4, 1)])
def test_an_old_checkpoint_is_updated_to_what_a_later_one_would_be(published, native, tmp_path, tp, pp, spelling):
    old = write_megatron_llm(tmp_path / "old", as_model(published), tp=tp, pp=pp, spelling=spelling, layout="halves")
    new = write_megatron_llm(tmp_path / "expected", as_model(published), tp=tp, pp=pp, spelling=spelling)
    before = {path: path.read_bytes() for path in old.rglob("*") if path.is_file()}

    words = ["permute-qkv", "--input-dir", old, "--output-dir", tmp_path / "new", "--layout", "halves"]
    result = CliRunner().invoke(cli, [str(word) for word in words])

    assert result.exit_code == 0, result.output
    assert result.stdout == f"Permuted 4 QKV projections of {old} to interleaved rotary pairs in {tmp_path / 'new'}.\n"
    assert ("optimizer, rng_state" in result.stderr) == (spelling == "trained")
    names = {path.relative_to(tmp_path / "new") for path in (tmp_path / "new").rglob("*") if path.is_file()}
    assert names == {path.relative_to(old) for path in before}
    assert (tmp_path / "new" / TRACKER).read_text() == (old / TRACKER).read_text()
    for path in new.rglob("*.pt"):
        updated, expected = load(tmp_path / "new" / path.relative_to(new)), load(path)
        assert_same_tensors(flat(updated["model"]), flat(expected["model"]))
        assert repr(updated["args"]) == repr(expected["args"])
        assert updated["iteration"] == expected["iteration"]
        assert updated["megacore"] == {"rotary_layout": "interleaved"}
    assert {path: path.read_bytes() for path in old.rglob("*") if path.is_file()} == before

    convert("llama", tmp_path / "new", tmp_path / "ckpt")
    assert_same_tensors(native_tensors(tmp_path / "ckpt"), native_tensors(native))


def test_the_tokenizer_goes_along(published, tmp_path):
    old = write_megatron_llm(tmp_path / "old", as_model(published), layout="halves")
    (old / "tokenizer.model").write_bytes(b"the tokenizer")

    permute_qkv(old, tmp_path / "new", layout="halves")

    assert (tmp_path / "new/tokenizer.model").read_bytes() == b"the tokenizer"


def test_an_updated_checkpoint_is_not_updated_again(published, tmp_path):
    old = write_megatron_llm(tmp_path / "old", as_model(published), layout="halves")
    permute_qkv(old, tmp_path / "new", layout="halves")

    said = refusal("permute-qkv", "--input-dir", tmp_path / "new", "--output-dir", tmp_path / "again", "--layout",
                   "halves", exit_code=2)  # fmt: skip

    assert said == (
        f"Error: {tmp_path / 'new'} records that its rotary pairs are interleaved already: "
        "permuting again would ruin it\n"
    )
    assert not (tmp_path / "again").exists()


def test_an_export_is_not_updated_either(native, tmp_path):
    export(native, tmp_path / "out", format="megatron-llm")

    assert "interleaved already" in message(
        ConfigError, permute_qkv, tmp_path / "out", tmp_path / "new", layout="halves"
    )


def test_an_old_layout_must_be_said(published, tmp_path):
    old = write_megatron_llm(tmp_path / "old", as_model(published), layout="halves")

    said = refusal("permute-qkv", "--input-dir", old, "--output-dir", tmp_path / "new", exit_code=2)

    assert said == (
        f"Error: {old} does not record its rotary layout, and it cannot be detected. If it was converted at commit "
        "332cf3c of its system or earlier, give --layout halves; if later, it needs no update\n"
    )
    assert not (tmp_path / "new").exists()


def test_a_checkpoint_that_records_halves_is_read_as_such_and_updated_unasked(published, native, tmp_path):
    old = write_megatron_llm(tmp_path / "old", as_model(published), tp=2, pp=2, layout="halves", spelling="converted")
    for path in old.rglob("*.pt"):
        torch.save(load(path) | {"megacore": {"rotary_layout": "halves"}}, path)

    convert("llama", old, tmp_path / "ckpt")
    permute_qkv(old, tmp_path / "new")
    convert("llama", tmp_path / "new", tmp_path / "again")

    assert_same_tensors(native_tensors(tmp_path / "ckpt"), native_tensors(native))
    assert_same_tensors(native_tensors(tmp_path / "again"), native_tensors(native))


def test_an_old_checkpoint_that_was_not_updated_is_another_model(published, native, tmp_path):
    old = write_megatron_llm(tmp_path / "old", as_model(published), layout="halves")

    convert("llama", old, tmp_path / "ckpt")

    name = "decoder.layers.0.self_attention.linear_qkv.weight"
    assert not torch.equal(native_tensors(tmp_path / "ckpt")[name], native_tensors(native)[name])


@pytest.mark.parametrize(
    "args, answer",
    [
        ({"num_attention_heads": None}, "lacks 'num_attention_heads' among its args"),
        ({"num_attention_heads": 0}, ": num_attention_heads is 0 instead of a positive number"),
        ({"hidden_size": "96"}, ": hidden_size is '96' instead of a positive number"),
        ({"num_attention_heads_kv": 5}, ": num_attention_heads 12 is no multiple of num_attention_heads_kv 5"),
        ({"kv_channels": 7}, ": kv_channels is 7, and rotary pairs need an even number"),
    ],
)
def test_an_update_needs_to_know_the_heads(published, tmp_path, args, answer):
    old = write_megatron_llm(tmp_path / "old", as_model(published, **args), layout="halves", spelling="converted")

    said = message(ConfigError, permute_qkv, old, tmp_path / "new", layout="halves")

    assert said == f"{rank_file(old, 0, 0, 1)}{' ' if answer.startswith('lacks') else ''}{answer}"
    assert not (tmp_path / "new").exists()


def test_a_number_of_numpy_among_the_arguments_does_no_harm(published, native, tmp_path):
    old = write_megatron_llm(tmp_path / "old", as_model(published, lr=np.float64(0.1)), layout="halves")

    permute_qkv(old, tmp_path / "new", layout="halves")
    convert("llama", tmp_path / "new", tmp_path / "ckpt")

    assert_same_tensors(native_tensors(tmp_path / "ckpt"), native_tensors(native))
    assert load(rank_file(tmp_path / "new", 0, 0, 1, folder="iter_0000040"))["args"].lr == 0.1


def test_a_checkpoint_is_not_updated_in_place(published, tmp_path):
    old = write_megatron_llm(tmp_path / "old", as_model(published), layout="halves")

    for out in (old, old / "release"):
        assert "never changed in place" in message(OutputError, permute_qkv, old, out, layout="halves")


# What is refused


def convert_refused(directory: Path, out: Path, *, exit_code: int) -> str:
    said = refusal("convert", "--model", "llama", "--from", directory, "--out", out, exit_code=exit_code)
    assert not out.exists()
    return said


class Harmful:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("where", ["args", "model", "beside them"])
def test_a_file_that_would_run_something_is_refused_and_runs_nothing(published, tmp_path, where):
    meg = write_megatron_llm(tmp_path / "meg", as_model(published), tp=2, spelling="converted")
    path = rank_file(meg, 1, 0, 1)
    document = load(path)
    harmful = Harmful(tmp_path / "executed")
    if where == "args":
        document["args"].harmful = harmful
    else:
        (document["model"] if where == "model" else document)["harmful"] = harmful
    torch.save(document, path)

    said = convert_refused(meg, tmp_path / "ckpt", exit_code=2)
    again = refusal("permute-qkv", "--input-dir", meg, "--output-dir", tmp_path / "new", "--layout", "halves",
                    exit_code=2)  # fmt: skip

    assert f"{path} names posix.system, which a file of weights does not need" in said
    assert "posix.system" in again
    assert not (tmp_path / "executed").exists()


def test_a_truncated_file_is_damaged(published, tmp_path):
    meg = write_megatron_llm(tmp_path / "meg", as_model(published), tp=2, spelling="converted")
    path = rank_file(meg, 1, 0, 1)
    path.write_bytes(path.read_bytes()[:-1000])

    said = convert_refused(meg, tmp_path / "ckpt", exit_code=1)

    assert f"Error: {path} is incomplete (" in said


def test_a_rank_that_is_missing_is_named(published, tmp_path):
    meg = write_megatron_llm(tmp_path / "meg", as_model(published), tp=2, pp=2, spelling="converted")
    rank_file(meg, 1, 1, 2).unlink()

    said = convert_refused(meg, tmp_path / "ckpt", exit_code=2)

    assert said == f"Error: {meg / 'release'} is cut over tp 2 and pp 2 ranks, but it lacks (tp 1, pp 1)\n"


def test_files_of_two_checkpoints_are_not_mixed(published, tmp_path):
    meg = write_megatron_llm(tmp_path / "meg", as_model(published), tp=2, spelling="converted")
    path = rank_file(meg, 1, 0, 1)
    torch.save(load(path) | {"iteration": 80}, path)

    assert "are not of one checkpoint: iterations 80 and 'release'" in convert_refused(meg, tmp_path / "c", exit_code=1)


@pytest.mark.parametrize(
    "said, answer, exit_code",
    [
        ("80", "points at iter_0000080, which", 2),
        ("latest", "says 'latest' instead of an iteration or 'release'", 1),
        ("", "says '' instead of an iteration or 'release'", 1),
    ],
)
def test_a_tracker_that_points_nowhere_is_refused(published, tmp_path, said, answer, exit_code):
    meg = write_megatron_llm(tmp_path / "meg", as_model(published))
    (meg / TRACKER).write_text(said)

    assert answer in convert_refused(meg, tmp_path / "ckpt", exit_code=exit_code)


@pytest.mark.parametrize(
    "args, answer",
    [
        ({"position_embedding_type": "absolute"}, "position_embedding_type is 'absolute', which is not implemented"),
        ({"use_bias": True}, "use_bias is True"),
        ({"use_post_ln": True}, "use_post_ln is True"),
        ({"sliding_window_size": 4096}, "sliding_window_size is 4096"),
        ({"kv_channels": 16}, "kv_channels is 16, which is not implemented; implemented: 8"),
        ({"parallel_attn": True}, "parallel_attn is True"),
        ({"use_rms_norm": False}, "use_rms_norm is False, which is not implemented; implemented: True"),
        ({"glu_activation": "liglu"}, "glu_activation 'liglu' is not implemented for llama"),
        ({"num_attention_heads": None}, "does not describe a model"),
    ],
)
def test_arguments_that_ask_for_another_model_are_refused(published, tmp_path, args, answer):
    model = as_model(published, **args)
    meg = write_megatron_llm(tmp_path / "meg", model)

    assert answer in convert_refused(meg, tmp_path / "ckpt", exit_code=2)


@pytest.mark.parametrize(
    "args, answer",
    [
        ({"make_vocab_size_divisible_by": 0}, "make_vocab_size_divisible_by is 0 instead of a positive number"),
        ({"tokenizer_type": ["some"]}, "tokenizer_type is ['some'] instead of a name"),
    ],
)
def test_what_an_export_would_write_again_is_checked(published, tmp_path, args, answer):
    meg = write_megatron_llm(tmp_path / "meg", as_model(published, **args), spelling="converted")

    said = convert_refused(meg, tmp_path / "ckpt", exit_code=2)

    assert said.endswith(f"Error: {rank_file(meg, 0, 0, 1)}: {answer}\n")


def test_arguments_that_are_missing_are_named(published, tmp_path):
    model = as_model(published)
    del model.args["num_layers"]
    meg = write_megatron_llm(tmp_path / "meg", model)

    assert "lacks 'num_layers'" in convert_refused(meg, tmp_path / "ckpt", exit_code=2)


def test_an_interleaved_pipeline_is_refused(published, tmp_path):
    meg = write_megatron_llm(tmp_path / "meg", as_model(published), spelling="converted")
    path = rank_file(meg, 0, 0, 1)
    document = load(path)
    document["model0"] = document.pop("model")
    torch.save(document, path)

    assert "interleaved pipeline (virtual stages)" in convert_refused(meg, tmp_path / "ckpt", exit_code=2)


def test_a_tensor_that_the_model_does_not_have_is_listed(published, tmp_path):
    meg = write_megatron_llm(tmp_path / "meg", as_model(published), spelling="converted")
    path = rank_file(meg, 0, 0, 1)
    document = load(path)
    document["model"]["language_model"]["pooler"] = {"dense.weight": torch.zeros(2, 2)}
    torch.save(document, path)

    assert "unknown to the weight map: pooler.dense.weight" in convert_refused(meg, tmp_path / "ckpt", exit_code=2)


def test_a_directory_without_ranks_is_refused(tmp_path):
    (tmp_path / "meg/release").mkdir(parents=True)
    (tmp_path / "meg" / TRACKER).write_text("release")

    assert "has no mp_rank_* directory" in convert_refused(tmp_path / "meg", tmp_path / "ckpt", exit_code=2)


def test_another_family_is_told_by_the_name_that_was_saved(published, tmp_path):
    meg = write_megatron_llm(tmp_path / "meg", as_model(published, model_name="falcon"))

    said = convert_refused(meg, tmp_path / "ckpt", exit_code=2)

    assert said.endswith("says that it is a falcon, not a llama; use --model falcon\n")


def test_another_family_of_the_same_architecture_is_converted_as_asked_with_a_note(published, tmp_path):
    meg = write_megatron_llm(tmp_path / "meg", as_model(published, model_name="llama2"))
    notes: list[str] = []

    convert("llama", meg, tmp_path / "ckpt", report=notes.append)

    assert "the checkpoint says that it is a llama2, and is converted as a llama, as requested" in notes


# Memory

MEASURED = """
import re, sys, threading, time
from pathlib import Path
import torch
from megacore.weights import convert, export
from megacore.weights.formats.megatron_llm.rotary_update import permute_qkv

def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024

import megacore_llama.layer
peak, done = [0.0], []
def watch():
    while not done:
        peak[0] = max(peak[0], anonymous())
        time.sleep(0.002)
before = anonymous()
thread = threading.Thread(target=watch)
thread.start()
directory = Path(sys.argv[1])
permute_qkv(directory / "old", directory / "new", layout="halves")
convert("llama", directory / "new", directory / "ckpt")
export(directory / "ckpt", directory / "out", format="megatron-llm", tp=2, pp=2)
done.append(True)
thread.join()
print(peak[0] - before)
"""


def test_a_tensor_of_100_megabytes_streams_through_a_fraction_of_that(publish, tmp_path):
    published = publish(**SHAPE | {"num_hidden_layers": 2, "vocab_size": 1004, "tie_word_embeddings": True})
    model = as_model(published)
    model.embedding = torch.randn(260_000, 96)
    write_megatron_llm(tmp_path / "old", model, layout="halves", spelling="converted")
    assert model.embedding.nbytes > 99e6

    result = subprocess.run([sys.executable, "-c", MEASURED, tmp_path], capture_output=True, text=True, check=True)

    assert float(result.stdout) < 60
    found = native_tensors(tmp_path / "ckpt")["embedding.word_embeddings.weight"]
    assert torch.equal(found, model.embedding)
