"""``megacore data``, and datasets that megatron-core reads and writes."""

import json
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import tokenizers
from click.testing import CliRunner
from sentencepiece import SentencePieceTrainer

from megacore.cli import cli
from megacore.data import (
    DatasetDescription,
    IndexedDataset,
    IndexedDatasetWriter,
    InstructionDataset,
    tokenize,
    tokenize_chat,
)
from tiny_chat import CHATML, CONVERSATIONS, write_conversations, write_tokenizer

DOCUMENTS = [[5, 6, 7], [], [8, 9], [10, 11, 12, 13]]


def call(*words: object, exit_code: int = 0) -> str:
    result = CliRunner().invoke(cli, ["data", *map(str, words)])
    assert result.exit_code == exit_code, result.output
    return result.output


def write(prefix: Path, documents: list[list[int]], dtype: str = "uint16") -> Path:
    with IndexedDatasetWriter(prefix, dtype) as writer:
        for document in documents:
            writer.add_document(document)
    return prefix


def tokenized(
    place: Path,
    name: str,
    text: str,
    *,
    words: str = "one two three",
    new_tokens: bool = False,
    **framing: bool,
) -> Path:
    """``text`` as a document, by a tokenizer that knows these words."""
    directory = place / words.replace(" ", "-")
    directory.mkdir(exist_ok=True)
    vocabulary = {word: number for number, word in enumerate(["?", "</s>", *words.split()])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text('{"eos_token": "</s>", "bos_token": "?"}')
    (place / f"{name}.txt").write_text(text)
    tokenize(place / f"{name}.txt", tokenizer=directory, out=place / name, new_tokens=new_tokens, **framing)
    return place / name


def test_inspect_says_how_many_documents_and_tokens_there_are_and_how_long_they_are(tmp_path):
    prefix = write(tmp_path / "d", [[1] * n for n in range(1, 102)])
    found = json.loads(call("inspect", prefix, "--json"))
    assert (found["documents"], found["tokens"], found["dtype"]) == (101, 5151, "uint16")
    assert found["lengths"] == {
        "shortest": 1, "10 %": 11, "median": 51, "90 %": 91, "99 %": 100, "longest": 101,
    }  # fmt: skip
    assert found["description"] is None
    assert "101\ntokens         5,151, as uint16\n" in call("inspect", prefix)


def test_inspect_names_the_tokenizer(tmp_path):
    said = call("inspect", tokenized(tmp_path, "d", "one two", append_eod=True))
    assert "tokenizer.json, vocabulary 5, sha256" in said
    assert "each ends with id 1" in said


def test_head_prints_text_where_tokenize_wrote_the_tokenizer_beside_the_dataset(tmp_path):
    prefix = tokenized(tmp_path, "d", "one two", append_eod=True, new_tokens=True)
    assert call("head", prefix) == "--- document 0, 3 tokens\none two <EOD>\n"


def test_conversations_are_inspected_and_shown_with_who_speaks(tmp_path):
    write_tokenizer(tmp_path / "tokenizer", CHATML)
    chats = [[{"role": "system", "content": "S"}, *CONVERSATIONS[0]]]
    file = write_conversations(tmp_path / "chats.jsonl", chats)
    tokenize_chat(file, tokenizer=tmp_path / "tokenizer", out=tmp_path / "chats")
    said = call("inspect", tmp_path / "chats")
    assert "conversations  1\n" in said and "with the markup template" in said
    found = json.loads(call("inspect", tmp_path / "chats", "--json"))
    Path(tmp_path / "chats.json").unlink()
    assert json.loads(call("inspect", tmp_path / "chats", "--json")) == found | {"description": None}
    text = call("head", tmp_path / "chats", "--tokenizer", tmp_path / "tokenizer")
    assert [line[:11] for line in text.splitlines() if line.startswith("[")][:3] == [
        "[system] <|", "[prompter] ", "[assistant]"
    ]  # fmt: skip
    assert f"[assistant] {chats[0][2]['content']}<|im_end|>\n" in text
    ids = InstructionDataset(tmp_path / "chats")[0][0].tolist()
    shown = re.sub(r"\[\w+\]", "", call("head", tmp_path / "chats").partition("\n")[2])
    assert list(map(int, shown.split())) == ids
    refused = call("merge", tmp_path / "chats", tmp_path / "chats", "--out", tmp_path / "all", exit_code=2)
    assert "holds conversations; train on several such datasets as a mixture" in refused


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_a_truncated_or_foreign_dataset_is_refused(tmp_path, suffix):
    prefix = write(tmp_path / "d", DOCUMENTS)
    file = Path(f"{prefix}{suffix}")
    file.write_bytes(file.read_bytes()[:-1])
    assert "truncated" in call("inspect", prefix, exit_code=2)
    Path(f"{prefix}.idx").write_bytes(b"PK\x03\x04" * 20)
    assert "is not the index of an indexed dataset" in call("head", prefix, exit_code=2)


def test_an_empty_dataset_is_inspected(tmp_path):
    assert json.loads(call("inspect", write(tmp_path / "d", []), "--json"))["lengths"]["longest"] == 0


def test_head_prints_the_first_documents_as_ids_or_as_text(tmp_path):
    assert call("head", write(tmp_path / "d", DOCUMENTS), "-n", 3) == (
        "--- document 0, 3 tokens\n5 6 7\n--- document 1, 0 tokens\n\n--- document 2, 2 tokens\n8 9\n"
    )
    prefix = tokenized(tmp_path, "e", "two one three")
    assert (
        call("head", prefix, "--tokenizer", tmp_path / "one-two-three") == "--- document 0, 3 tokens\ntwo one three\n"
    )


def test_head_refuses_a_tokenizer_that_did_not_make_the_dataset(tmp_path):
    prefix = tokenized(tmp_path, "e", "two one three")
    tokenized(tmp_path, "f", "two", words="three two one")
    assert "another tokenizer" in call("head", prefix, "--tokenizer", tmp_path / "three-two-one", exit_code=2)


@pytest.mark.parametrize("ids, stranger", [([1, 4, 5], 5), ([1, -1], -1)])
def test_head_refuses_a_tokenizer_that_does_not_know_an_id(tmp_path, ids, stranger):
    tokenized(tmp_path, "e", "one")
    prefix = write(tmp_path / "d", [[1], ids], "int32")
    said = call("head", prefix, "--tokenizer", tmp_path / "one-two-three", exit_code=2)
    assert f"d has token id {stranger}, and the vocabulary of" in said
    assert "tokenizer.json is 0 to 4: give the tokenizer that made the dataset" in said


def test_head_refuses_an_id_beyond_a_sentencepiece_model(tmp_path):
    with (tmp_path / "tokenizer.model").open("wb") as model:
        SentencePieceTrainer.train(
            sentence_iterator=iter(["a b c d e f g"]), model_writer=model, vocab_size=11, minloglevel=2
        )
    prefix = write(tmp_path / "d", [[5, 40000]])
    said = call("head", prefix, "--tokenizer", tmp_path / "tokenizer.model", exit_code=2)
    assert "d has token id 40000, and the vocabulary of" in said


def test_head_refuses_a_role_that_there_is_not(tmp_path):
    write(tmp_path / "d-text", [[5, 6], [7, 8]])
    write(tmp_path / "d-role", [[1, 2], [1, 7]])
    said = call("head", tmp_path / "d", exit_code=2)
    assert "d-role: conversation 1 has role 7, and the format's are 0 system, 1 prompter, 2 assistant" in said


def test_merge_joins_documents_in_the_order_given_in_the_wider_type(tmp_path):
    one, two = write(tmp_path / "one", DOCUMENTS), write(tmp_path / "two", [[70000], [1, 2]], "int32")
    assert "10 documents, 21 tokens, as int32" in call("merge", one, two, one, "--out", tmp_path / "all")
    merged = IndexedDataset(tmp_path / "all")
    assert [ids.tolist() for ids in merged] == [*DOCUMENTS, [70000], [1, 2], *DOCUMENTS]
    assert merged.num_documents == 10


def test_merge_keeps_the_sequences_of_documents(tmp_path):
    with IndexedDatasetWriter(tmp_path / "d", "uint16") as writer:
        writer.add_document([1, 2], [3])
        writer.add_document([4])
    call("merge", tmp_path / "d", write(tmp_path / "e", [[5]]), "--out", tmp_path / "all")
    assert IndexedDataset(tmp_path / "all").document_indices.tolist() == [0, 2, 3, 4]


def test_merge_takes_what_follows_the_last_boundary_for_a_document_and_copies_block_by_block(tmp_path, monkeypatch):
    monkeypatch.setattr("megacore.data.datasets.indexed._COPIED_AT_ONCE", 4)
    with IndexedDatasetWriter(tmp_path / "d", "uint16") as writer:
        writer.add_document([1, 2], [3])
        writer.add_document([4, 5, 6], [7, 8, 9])
    unmarked = (tmp_path / "d.idx").read_bytes()
    (tmp_path / "d.idx").write_bytes(unmarked[:26] + (2).to_bytes(8, "little") + unmarked[34:-8])

    call("merge", tmp_path / "d", tmp_path / "d", "--out", tmp_path / "all")

    merged = IndexedDataset(tmp_path / "all")
    assert [ids.tolist() for ids in merged] == [[1, 2], [3], [4, 5, 6], [7, 8, 9]] * 2
    assert merged.document_indices.tolist() == [0, 2, 4, 6, 8]


def test_merge_describes_what_it_wrote_where_all_were_described(tmp_path):
    one, two = tokenized(tmp_path, "one", "one two"), tokenized(tmp_path, "two", "three")
    call("merge", one, two, "--out", tmp_path / "all")
    merged, of_one = DatasetDescription.read(tmp_path / "all"), DatasetDescription.read(one)
    assert (merged.num_documents, merged.num_tokens) == (2, 3)
    assert merged.tokenizer_sha256 == of_one.tokenizer_sha256
    call("merge", one, write(tmp_path / "raw", [[1]]), "--out", tmp_path / "undescribed")
    assert DatasetDescription.read(tmp_path / "undescribed") is None


def test_merge_puts_the_tokenizer_with_new_tokens_beside_what_it_wrote_too(tmp_path):
    one, two = (tokenized(tmp_path, name, "one two", new_tokens=True, append_eod=True) for name in ("one", "two"))
    call("merge", one, two, "--out", tmp_path / "elsewhere/all")
    head = call("head", tmp_path / "elsewhere/all")
    assert head == "--- document 0, 3 tokens\none two <EOD>\n--- document 1, 3 tokens\none two <EOD>\n"


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"words": "three two one"}, "different tokenizer"),
        ({"append_eod": True}, "different choice of --append-eod"),
        ({"prepend_bos": True}, "different choice of --prepend-bos"),
    ],
)
def test_merge_refuses_datasets_of_different_tokenizers_and_leaves_nothing(tmp_path, other, message):
    one, two = tokenized(tmp_path, "one", "one two"), tokenized(tmp_path, "two", "one", **other)
    assert message in call("merge", one, two, "--out", tmp_path / "all", exit_code=2)
    assert not list(tmp_path.glob("all*"))


# --- the other implementation


def test_datasets_go_to_megatron_core_and_back():
    try:
        version("megatron-core")
    except PackageNotFoundError:
        pytest.skip("megatron-core has no wheel for this machine")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-o",
        "pythonpath=tests/support tests/cli",
    ]

    ran = subprocess.run(
        [*command, "tests/support/megatron_core_datasets.py"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )

    assert ran.returncode == 0, ran.stdout
    assert re.search(r"^\d+ passed", ran.stdout.splitlines()[-1]), ran.stdout
