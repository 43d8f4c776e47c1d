"""A model gets rows for the tokens that ``tokenize`` added. The truth is transformers' own reading of both models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
import torch
from click.testing import CliRunner

import megacore
from megacore.checkpoint import Checkpoint
from megacore.checkpoint.resized_embeddings import ExtendedTokenizer
from megacore.cli import cli
from megacore.data import IndexedDataset, load_tokenizer, tokenize
from megacore.errors import DataError, MegacoreError
from tiny_llama import VOCAB, published_model


def byte_tokenizer(directory: Path, first: str = "a", num_tokens: int = VOCAB) -> None:
    """Single characters of ASCII."""
    characters = [first, *(chr(code) for code in range(33, 132) if chr(code) != first)]
    vocabulary = {character: number for number, character in enumerate(characters[:num_tokens])}
    tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [])).save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text("{}")


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = published_model(tmp_path_factory.mktemp("published"))
    byte_tokenizer(directory)
    return directory


@pytest.fixture(scope="module")
def dataset(published: Path) -> Path:
    """With five new tokens, ids 99 to 103."""
    source, out = published.parent / "in.jsonl", published.parent / "new-tokens-out"
    source.write_text(json.dumps({"text": "abcd" * 40}) + "\n")
    tokenize(source, tokenizer=published, out=out, append_eod=True)
    assert IndexedDataset(out)[0][-1] == VOCAB + 2
    return out


def published_rows(directory: Path, name: str) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory).state_dict()[name]


def test_rows_are_of_the_mean_of_all_rows_when_those_are_read_in_blocks(published, dataset, tmp_path, monkeypatch):
    monkeypatch.setattr("megacore.checkpoint.resized_embeddings._BLOCK_ROWS", 40)
    megacore.convert("llama", published, tmp_path / "grown", add_tokens=dataset)
    megacore.export(tmp_path / "grown", tmp_path / "exported")
    rows = published_rows(tmp_path / "exported", "model.embed_tokens.weight")
    torch.testing.assert_close(rows[VOCAB:], rows[:VOCAB].mean(0).expand(len(rows) - VOCAB, -1))


@pytest.mark.parametrize("command", ["convert", "split"])
def test_embedding_and_head_grow_by_the_mean_of_their_rows(published, dataset, tmp_path, command):
    if command == "convert":
        megacore.convert("llama", published, tmp_path / "grown", tp=2, add_tokens=dataset)
    else:
        megacore.convert("llama", published, tmp_path / "ckpt")
        megacore.split(tmp_path / "ckpt", tmp_path / "grown", tp=2, add_tokens=dataset)
    megacore.export(tmp_path / "grown", tmp_path / "exported")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        before, after = published_rows(published, name), published_rows(tmp_path / "exported", name)
        assert len(after) == VOCAB + 5
        assert torch.equal(after[:VOCAB], before)
        torch.testing.assert_close(after[VOCAB:], before.mean(0).expand(5, -1))


@pytest.mark.parametrize("num_tokens", [90, 97])
@pytest.mark.parametrize("command", ["convert", "split"])
def test_rows_that_a_model_has_to_spare_are_the_mean_too_once_tokens_have_them(tmp_path, command, num_tokens):
    published = published_model(tmp_path / "published")
    byte_tokenizer(published, num_tokens=num_tokens)
    (tmp_path / "in.txt").write_text("abc")
    tokenize(tmp_path / "in.txt", tokenizer=published, out=tmp_path / "data")
    if command == "convert":
        megacore.convert("llama", published, tmp_path / "grown", tp=2, add_tokens=tmp_path / "data")
    else:
        megacore.convert("llama", published, tmp_path / "ckpt", tp=3)
        megacore.split(tmp_path / "ckpt", tmp_path / "grown", tp=2, add_tokens=tmp_path / "data")
    megacore.export(tmp_path / "grown", tmp_path / "exported")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        before, after = published_rows(published, name), published_rows(tmp_path / "exported", name)
        assert len(after) == max(VOCAB, num_tokens + 5)
        assert torch.equal(after[:num_tokens], before[:num_tokens])
        torch.testing.assert_close(after[num_tokens : num_tokens + 5], before[:num_tokens].mean(0).expand(5, -1))
        assert torch.equal(after[num_tokens + 5 :], before[num_tokens + 5 :])


def test_rows_of_tokens_that_the_models_own_tokenizer_has_stay_though_the_dataset_added_them(tmp_path):
    published = published_model(tmp_path / "published")
    byte_tokenizer(tmp_path, num_tokens=90)
    (tmp_path / "in.txt").write_text("abc")
    tokenize(tmp_path / "in.txt", tokenizer=tmp_path, out=tmp_path / "data")
    (published / "tokenizer.json").write_bytes((tmp_path / "data-tokenizer/tokenizer.json").read_bytes())
    megacore.convert("llama", published, tmp_path / "ckpt", add_tokens=tmp_path / "data")
    megacore.export(tmp_path / "ckpt", tmp_path / "exported")
    name = "model.embed_tokens.weight"
    assert torch.equal(published_rows(tmp_path / "exported", name), published_rows(published, name))


def test_without_a_tokenizer_of_the_model_the_dataset_says_which_token_is_the_first_new_one(tmp_path):
    published = published_model(tmp_path / "published")
    byte_tokenizer(tmp_path, num_tokens=97)
    (tmp_path / "in.txt").write_text("abc")
    tokenize(tmp_path / "in.txt", tokenizer=tmp_path, out=tmp_path / "data")
    megacore.convert("llama", published, tmp_path / "ckpt", add_tokens=tmp_path / "data")
    megacore.export(tmp_path / "ckpt", tmp_path / "exported")
    name = "model.embed_tokens.weight"
    before, after = published_rows(published, name), published_rows(tmp_path / "exported", name)
    torch.testing.assert_close(after[97:], before[:97].mean(0).expand(5, -1))


def test_the_grown_checkpoint_has_the_tokenizer_and_says_where_its_rows_are_from(published, dataset, tmp_path):
    megacore.convert("llama", published, tmp_path / "ckpt")
    manifest = megacore.split(tmp_path / "ckpt", tmp_path / "grown", add_tokens=dataset)
    assert manifest.config["vocab_size"] == VOCAB + 5
    assert manifest.history[-1]["added_tokens"] == f"{dataset}-tokenizer"
    assert load_tokenizer(tmp_path / "grown/tokenizer").token_id("<EOD>") == VOCAB + 2
    Checkpoint(tmp_path / "grown").check()


def test_tied_embeddings_stay_tied(tmp_path, dataset):
    directory = published_model(tmp_path / "tied", tie_word_embeddings=True)
    byte_tokenizer(directory)
    manifest = megacore.convert("llama", directory, tmp_path / "grown", add_tokens=f"{dataset}-tokenizer")
    assert manifest.parameters["embedding.word_embeddings.weight"].spec.shape[0] == VOCAB + 5
    assert "output_layer.weight" not in manifest.parameters


def test_training_on_new_tokens_that_the_model_lacks_is_refused_with_both_remedies(published, dataset, tmp_path):
    megacore.convert("llama", published, tmp_path / "ckpt")
    (tmp_path / "run.toml").write_text(
        f"""
        [model]
        checkpoint = "{tmp_path}/ckpt"
        [data]
        prefix = "{dataset}"
        seq_length = 8
        [optimizer]
        lr = 1e-3
        [training]
        train_iters = 1
        micro_batch_size = 1
        global_batch_size = 1
        [output]
        checkpoint = "{tmp_path}/trained"
        """
    )
    with pytest.raises(MegacoreError, match=r"104 ids.*has 99.*--no-new-tokens.*megacore split .* --add-tokens"):
        megacore.train(tmp_path / "run.toml")


def test_another_tokenizer_than_the_models_is_refused(published, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    byte_tokenizer(other, first="z")
    with pytest.raises(DataError, match=r"is not the model's tokenizer with tokens added.*have other ids there"):
        megacore.convert("llama", published, tmp_path / "grown", add_tokens=other)


def test_new_tokens_never_get_the_rows_of_tokens_that_the_model_has_beside_its_tokenizer_model(tmp_path):
    for name in ("known", "same"):
        (tmp_path / name).mkdir()
        with (tmp_path / name / "tokenizer.model").open("wb") as file:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(["a b c", "d e f"]), model_writer=file, vocab_size=12, hard_vocab_limit=False,
                minloglevel=2,
            )  # fmt: skip
    (tmp_path / "known/added_tokens.json").write_text('{"<|im_end|>": 12}')
    known = {file.name: file for file in (tmp_path / "known").iterdir()}
    with pytest.raises(DataError, match=r"added_tokens.json beside it adds '<\|im_end\|>' \(12\)"):
        ExtendedTokenizer.read(tmp_path / "same", known=known)


def test_a_dataset_without_new_tokens_has_none_to_add(published, tmp_path):
    (tmp_path / "in.txt").write_text("abc")
    tokenize(tmp_path / "in.txt", tokenizer=published, out=tmp_path / "out", new_tokens=False)
    with pytest.raises(DataError, match="was tokenized without new tokens: leave out --add-tokens"):
        megacore.convert("llama", published, tmp_path / "grown", add_tokens=tmp_path / "out")


def test_the_commands_take_the_tokens_of_a_dataset(published, dataset, tmp_path):
    for arguments in (
        ["convert", "--model", "llama", "--from", published, "--out", tmp_path / "ckpt"],
        ["split", tmp_path / "ckpt", "--out", tmp_path / "grown", "--tp", "3", "--add-tokens", dataset],
    ):
        result = CliRunner().invoke(cli, list(map(str, arguments)))
        assert result.exit_code == 0, result.output
    assert Checkpoint(tmp_path / "grown").manifest.config["vocab_size"] == VOCAB + 5
