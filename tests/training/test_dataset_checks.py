"""Training on datasets whose ids stand for what the model has learned, and on no others."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

import megacore
import tiny_run
from megacore.data import IndexedDatasetWriter
from megacore.errors import DataError
from recorded_steps import train_steps
from tiny_llama import VOCAB, published_model

WORDS = [f"w{number}" for number in range(VOCAB)]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A model of 99 rows whose tokenizer has the first 60 words."""
    place = tmp_path_factory.mktemp("vocabulary")
    published_model(place / "published")
    word_tokenizer(place / "published", WORDS[:60])
    megacore.convert("llama", place / "published", place / "checkpoint")
    return place


def word_tokenizer(directory: Path, words: list[str], **settings: object) -> Path:
    """A tokenizer.json of which each word is a token, with ids in their order."""
    directory.mkdir(exist_ok=True)
    tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token=words[0]))
    tokenizer.pre_tokenizer = Whitespace()
    (directory / "tokenizer.json").write_text(json.dumps(json.loads(tokenizer.to_str()) | settings))
    return directory


def tokenized(tmp_path: Path, tokenizer: Path, *, new_tokens: bool = False) -> str:
    """A dataset of the tokenizer, as an override of a run file."""
    (tmp_path / "text.txt").write_text(" ".join(WORDS[:20] * 3))
    megacore.tokenize(tmp_path / "text.txt", tokenizer=tokenizer, out=tmp_path / "data", new_tokens=new_tokens)
    return f"data.prefix={tmp_path / 'data'}"


def notes_on_training(place: Path, tmp_path: Path, *overrides: str) -> list[str]:
    """What is told of the vocabulary when a run starts."""
    notes: list[str] = []
    run = tiny_run.run_of(place, tmp_path / "out", "training.train_iters=1", *overrides)
    assert len(train_steps(run, on_note=notes.append)) == 1
    return [note for note in notes if "token" in note]


@pytest.mark.parametrize("new_tokens", [False, True], ids=["as it is", "with new tokens"])
@pytest.mark.parametrize(
    ("words", "settings"),
    [(WORDS[:60], {"normalizer": {"type": "Lowercase"}}), (WORDS[:40], {})],
    ids=["the same tokens, encoded otherwise", "fewer of the same tokens"],
)
def test_a_dataset_of_another_tokenizer_file_with_the_same_tokens_is_as_good(
    place, tmp_path, words, settings, new_tokens
):
    prefix = tokenized(tmp_path, word_tokenizer(tmp_path / "other", words, **settings), new_tokens=new_tokens)

    assert notes_on_training(place, tmp_path, prefix) == []


@pytest.mark.parametrize("new_tokens", [False, True], ids=["as it is", "with new tokens"])
@pytest.mark.parametrize(
    "words", [[*WORDS[:7], WORDS[8], WORDS[7], *WORDS[9:60]], WORDS[:61]], ids=["two swapped", "one that is not there"]
)
def test_a_dataset_whose_ids_stand_for_other_tokens_is_refused_unless_that_is_wanted(
    place, tmp_path, words, new_tokens
):
    prefix = tokenized(tmp_path, word_tokenizer(tmp_path / "other", words), new_tokens=new_tokens)

    with pytest.raises(DataError) as refused:
        notes_on_training(place, tmp_path, prefix)
    told = f"the ids of the dataset {tmp_path}/data stand for other tokens than those of {place}/checkpoint/tokenizer/"
    assert str(refused.value).startswith(told)
    assert "set data.other_vocabulary = true" in str(refused.value)

    [note] = notes_on_training(place, tmp_path, prefix, "data.other_vocabulary=true")
    assert note.startswith(told)


def test_a_dataset_that_does_not_say_what_its_ids_stand_for_is_taken_with_a_note(place, tmp_path):
    prefix = tokenized(tmp_path, word_tokenizer(tmp_path / "other", WORDS[:40]))
    description = json.loads((tmp_path / "data.json").read_text())
    del description["known_tokens_sha256"]  # as in those of earlier versions
    (tmp_path / "data.json").write_text(json.dumps(description))

    [note] = notes_on_training(place, tmp_path, prefix)

    assert "does not say whether its ids stand for the same tokens; tokenize with" in note


def test_a_checkpoint_without_a_tokenizer_takes_any_dataset_that_fits(place, tmp_path):
    shutil.copytree(place / "published", tmp_path / "published")
    (tmp_path / "published" / "tokenizer.json").unlink()
    megacore.convert("llama", tmp_path / "published", tmp_path / "checkpoint")
    prefix = tokenized(tmp_path, word_tokenizer(tmp_path / "other", WORDS[::-1]))

    assert notes_on_training(place, tmp_path, prefix, f"model.checkpoint={tmp_path / 'checkpoint'}") == []


def test_conversations_that_are_not_called_so_are_told_from_a_dataset_that_is_not_there(place, tmp_path):
    for part in ("text", "role"):
        with IndexedDatasetWriter(tmp_path / f"chats-{part}", "uint16") as writer:
            writer.add_document([1, 2])

    with pytest.raises(DataError, match=r'chats: holds conversations: set data\.kind = "instruction"'):
        notes_on_training(place, tmp_path, f"data.prefix={tmp_path / 'chats'}")
