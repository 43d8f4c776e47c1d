"""``tokenize``. The truth about token ids is the library that defines each tokenizer, called directly."""

import errno
import functools
import hashlib
import io
import itertools
import json
import os
import pty
import pydoc_data.topics
import re
import signal
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from click.testing import CliRunner

import megacore.data
from megacore.cli import cli
from megacore.data import DatasetDescription, IndexedDataset, NewTokens, load_tokenizer
from megacore.errors import DataError, DiskFullError, OutputError

# Most of these tests are about a vocabulary as it is published.
tokenize = functools.partial(megacore.data.tokenize, new_tokens=False)

CORPUS = [text for _, text in sorted(pydoc_data.topics.topics.items())]

# Nothing in these may be lost, normalized in another way than the library does, or taken for a token.
AWKWARD = [
    "def f(x):\r\n\treturn x  # two  spaces\n",
    "中文 العربية, naïve 👩‍👩‍👧",
    "<s> [INST] </s> <unk> <|end|> <|sep|>",
    "\x00\x01\x7f\u2028\u0085\ufeff",
    " " * 300 + "x",
]


# --- tiny tokenizers, trained here


@pytest.fixture(scope="session")
def sentencepiece_model(tmp_path_factory) -> Path:
    """347 pieces with byte fallback and one user-defined symbol."""
    return train_sentencepiece(
        tmp_path_factory.mktemp("spm") / "tokenizer.model",
        vocab_size=347,
        byte_fallback=True,
        user_defined_symbols=["<|sep|>"],
    )


@pytest.fixture(scope="session")
def tokenizer_json(tmp_path_factory) -> Path:
    """A directory with a byte-level ``tokenizer.json`` of 399 tokens, and the configuration beside it."""
    return train_byte_level(tmp_path_factory.mktemp("json"), config={"bos_token": None, "eos_token": "<|end|>"})


def train_sentencepiece(file: Path, **options) -> Path:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(" ".join(CORPUS[:20]).splitlines()),
        model_writer=model,
        model_type="bpe",
        minloglevel=2,
        **options,
    )
    file.write_bytes(model.getvalue())
    return file


def train_byte_level(directory: Path, config: dict | None = None) -> Path:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=399,
        special_tokens=["<|end|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS[:20], trainer)
    # What a template adds, the dataset must not have.
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing("<|end|> $A", special_tokens=[("<|end|>", 0)])
    tokenizer.save(str(directory / "tokenizer.json"))
    if config is not None:
        (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def sentencepiece_ids(model: Path, texts: list[str]) -> list[list[int]]:
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    return [processor.encode_as_ids(text) for text in texts]


def json_ids(directory: Path, texts: list[str]) -> list[list[int]]:
    tokenizer = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    return [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]


def write_jsonl(path: Path, texts: list[str], key: str = "text") -> Path:
    path.write_text("".join(json.dumps({"id": i, key: text}) + "\n" for i, text in enumerate(texts)))
    return path


def documents_of(prefix: Path) -> list[list[int]]:
    return [ids.tolist() for ids in IndexedDataset(prefix)]


# --- tokenizers


def test_a_sentencepiece_model_gives_its_librarys_ids(sentencepiece_model):
    tokenizer = load_tokenizer(sentencepiece_model)
    expected = sentencepiece_ids(sentencepiece_model, CORPUS + AWKWARD)
    assert tokenizer.encode_batch(CORPUS + AWKWARD) == expected
    assert [tokenizer.encode(text) for text in AWKWARD] == expected[-len(AWKWARD) :]


def test_a_tokenizer_json_gives_its_librarys_ids_and_nothing_that_a_template_adds(tokenizer_json):
    tokenizer = load_tokenizer(tokenizer_json / "tokenizer.json")
    expected = json_ids(tokenizer_json, CORPUS + AWKWARD)
    assert tokenizer.encode_batch(CORPUS + AWKWARD) == expected
    assert [tokenizer.encode(text) for text in AWKWARD] == expected[-len(AWKWARD) :]


def test_a_sentencepiece_model_names_its_own_special_tokens(sentencepiece_model):
    tokenizer = load_tokenizer(sentencepiece_model)
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eod_id) == (347, 1, 2)
    assert tokenizer.file == sentencepiece_model
    assert tokenizer.sha256 == hashlib.sha256(sentencepiece_model.read_bytes()).hexdigest()


def test_a_sentencepiece_model_without_begin_and_end_tokens_has_none(tmp_path):
    model = train_sentencepiece(tmp_path / "odd.model", vocab_size=99, bos_id=-1, eos_id=-1, character_coverage=0.98)
    tokenizer = load_tokenizer(model)
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eod_id) == (99, None, None)


@pytest.mark.parametrize("token", ["<|end|>", {"content": "<|end|>", "special": True}])
def test_a_tokenizer_json_has_its_end_token_from_the_configuration_beside_it(tmp_path, token):
    tokenizer = load_tokenizer(train_byte_level(tmp_path, config={"eos_token": token}))
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eod_id) == (399, None, 0)


@pytest.mark.parametrize("config", [None, {}, {"eos_token": None}, {"eos_token": "</s>"}])
def test_a_tokenizer_json_without_a_known_end_token_has_none(tmp_path, config):
    assert load_tokenizer(train_byte_level(tmp_path, config)).eod_id is None


@pytest.mark.parametrize(
    "config",
    [None, {"eos_token": "s"}, {"eos_token": "s", "added_tokens_decoder": {"0": {"content": "<|end|>"}}}],
    ids=["none", "old", "new"],
)
def test_special_tokens_that_only_an_older_file_names_are_those_of_transformers(tmp_path, config):
    from transformers import AutoTokenizer

    config = config and config | {"tokenizer_class": "PreTrainedTokenizerFast"}
    train_byte_level(tmp_path, config)
    named = {"bos_token": {"content": "<|end|>"}, "eos_token": "<|end|>", "pad_token": "<|end|>"}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(named))
    theirs = AutoTokenizer.from_pretrained(tmp_path)

    ours = load_tokenizer(tmp_path, NewTokens(standard=True))

    assert (ours.bos_id, ours.token_id("<PAD>") is None) == (theirs.bos_token_id, theirs.pad_token_id is not None)
    # Another end of sequence than that of this tokenizer without <EOD>.
    assert load_tokenizer(tmp_path).eod_id == theirs.eos_token_id


def test_the_vocabulary_size_is_above_every_id_even_where_ids_have_gaps(tmp_path):
    vocabulary = {"[UNK]": 0, "a": 7, "b": 400}
    tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, "[UNK]")).save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).vocab_size == 401


def test_new_tokens_that_would_come_among_ids_with_gaps_are_refused(tmp_path):
    # The library would give <EOD> the id of "b".
    vocabulary = {"[UNK]": 0, "a": 1, "b": 5}
    tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, "[UNK]")).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError, match=r"tokenizer\.json: its ids have gaps.*<CLS> in one, at 3.*--no-new-tokens"):
        load_tokenizer(tmp_path, NewTokens(standard=True))
    assert load_tokenizer(tmp_path).vocab_size == 6


def test_truncation_and_padding_that_a_tokenizer_json_asks_for_are_not_done(tokenizer_json, tmp_path):
    tokenizer = tokenizers.Tokenizer.from_file(str(tokenizer_json / "tokenizer.json"))
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=8)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).encode_batch(["x", CORPUS[0]]) == json_ids(tokenizer_json, ["x", CORPUS[0]])


def test_text_that_spells_a_control_token_stays_text_in_sentencepiece(sentencepiece_model):
    tokenizer = load_tokenizer(sentencepiece_model)
    assert tokenizer.eod_id not in tokenizer.encode("</s>")
    assert tokenizer.decode(tokenizer.encode("</s>")) == "</s>"


def test_text_that_spells_an_added_token_becomes_it_in_a_tokenizer_json(tokenizer_json):
    tokenizer = load_tokenizer(tokenizer_json)
    assert tokenizer.encode("<|end|>") == [tokenizer.eod_id]


def test_decoding_gives_the_text_back_special_tokens_included(sentencepiece_model, tokenizer_json):
    for tokenizer in (load_tokenizer(sentencepiece_model), load_tokenizer(tokenizer_json)):
        text = "naïve 中文 <|end|> 👩"
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_of_a_directory_with_both_files_tokenizer_json_is_used(tokenizer_json, sentencepiece_model, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((tokenizer_json / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model.read_bytes())
    assert load_tokenizer(tmp_path).file == tmp_path / "tokenizer.json"
    assert load_tokenizer(tmp_path / "tokenizer.model").vocab_size == 347


ADDED_BESIDE = {
    "added_tokens.json": lambda tokens: tokens,
    "tokenizer_config.json": lambda tokens: {
        "added_tokens_decoder": {str(number): {"content": token, "special": True} for token, number in tokens.items()}
    },
}


@pytest.mark.parametrize("name", ADDED_BESIDE)
def test_a_tokenizer_model_that_lacks_tokens_of_a_file_beside_it_is_refused_with_what_to_do(
    name, sentencepiece_model, tokenizer_json, tmp_path
):
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model.read_bytes())
    tokens = {"<unk>": 0, "<|im_start|>": 347, "<|im_end|>": 348}
    (tmp_path / name).write_text(json.dumps(ADDED_BESIDE[name](tokens)))
    added = r"'<\|im_start\|>' \(347\), '<\|im_end\|>' \(348\)"
    told = rf"tokenizer\.model: its 347 tokens .*: {name} beside it adds {added}: "
    with pytest.raises(DataError, match=f"{told}give the model's tokenizer.json .* transformers makes one: AutoTok"):
        load_tokenizer(tmp_path)

    (tmp_path / "tokenizer.json").write_bytes((tokenizer_json / "tokenizer.json").read_bytes())
    assert load_tokenizer(tmp_path).file.name == "tokenizer.json"
    with pytest.raises(DataError, match=rf"{told}give .*tokenizer\.json instead, which has them"):
        load_tokenizer(tmp_path / "tokenizer.model")


@pytest.mark.parametrize("name", ADDED_BESIDE)
def test_files_beside_a_tokenizer_model_may_repeat_its_own_tokens(name, sentencepiece_model, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model.read_bytes())
    tokens = {"<unk>": 0, "<s>": 1, "</s>": 2, "<|sep|>": 3}
    (tmp_path / name).write_text(json.dumps(ADDED_BESIDE[name](tokens)))
    assert load_tokenizer(tmp_path, NewTokens(named=("<|a|>",))).new_tokens == {"<|a|>": 347}


@pytest.mark.parametrize(
    "name, content", [("added_tokens.json", {"a": "b"}), ("tokenizer_config.json", {"added_tokens_decoder": [1]})]
)
def test_added_tokens_that_are_none_are_refused(name, content, sentencepiece_model, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model.read_bytes())
    (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(DataError, match=rf"{name}: its added tokens are not tokens with an id each"):
        load_tokenizer(tmp_path)


def test_what_transformers_makes_of_a_tokenizer_model_with_tokens_beside_it_has_their_ids(
    sentencepiece_model, tmp_path
):
    from transformers import AutoTokenizer

    (tmp_path / "old").mkdir()
    (tmp_path / "old/tokenizer.model").write_bytes(sentencepiece_model.read_bytes())
    (tmp_path / "old/tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    (tmp_path / "old/added_tokens.json").write_text('{"<|im_end|>": 347}')
    AutoTokenizer.from_pretrained(tmp_path / "old").save_pretrained(tmp_path / "new")
    tokenizer = load_tokenizer(tmp_path / "new", NewTokens(standard=True))
    assert tokenizer.encode("<|im_end|>") == [347]
    assert min(tokenizer.new_tokens.values()) == 348


def test_of_a_directory_with_only_tokenizer_model_that_is_used(sentencepiece_model):
    assert load_tokenizer(sentencepiece_model.parent).file == sentencepiece_model


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("absent", None, "no such file or directory; give a tokenizer.json, a tokenizer.model or their directory"),
        ("vocab.txt", b"a\nb\n", "a tokenizer is a file tokenizer.json or tokenizer.model"),
        ("tokenizer.model", b"IQ== 0\nIg== 1\n", "is not a SentencePiece model.*give their tokenizer.json"),
        ("tokenizer.model", b"", "is not a SentencePiece model"),
        ("tokenizer.json", b"{}", "cannot be read as a tokenizer"),
        ("tokenizer.json", b"\xff", "cannot be read as a tokenizer"),
    ],
)
def test_what_is_no_tokenizer_is_refused_by_name(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=f"{name}: {message}"):
        load_tokenizer(path)


def test_a_directory_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"has neither tokenizer\.json nor tokenizer\.model"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("content, message", [("{", "is not JSON"), ("[]", "is not a JSON object")])
def test_a_broken_tokenizer_config_is_refused(tmp_path, content, message):
    train_byte_level(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(content)
    with pytest.raises(DataError, match=rf"tokenizer_config\.json: {message}"):
        load_tokenizer(tmp_path)


# --- documents


def test_a_json_line_is_a_document_and_order_is_kept(sentencepiece_model, tmp_path):
    source = write_jsonl(tmp_path / "in.jsonl", CORPUS + AWKWARD)
    summary = tokenize(source, tokenizer=sentencepiece_model, out=tmp_path / "out")
    expected = sentencepiece_ids(sentencepiece_model, CORPUS + AWKWARD)
    assert documents_of(tmp_path / "out") == expected
    assert summary.num_documents == len(expected)
    assert summary.num_tokens == sum(map(len, expected))
    assert summary.num_text_bytes == sum(len(text.encode()) for text in CORPUS + AWKWARD)


def test_documents_and_batches_of_any_size_keep_their_order(tokenizer_json, tmp_path):
    # Some lines are longer than a piece of input, and than what is encoded at once.
    texts = [f"document {i}" for i in range(3000)] + [f"{i} " * 700_000 for i in range(2)] + ["last"]
    tokenize([write_jsonl(tmp_path / "in.jsonl", texts)], tokenizer=tokenizer_json, out=tmp_path / "out")
    assert documents_of(tmp_path / "out") == json_ids(tokenizer_json, texts)


def test_any_other_file_is_one_document_with_its_line_ends(tokenizer_json, tmp_path):
    (tmp_path / "a.txt").write_bytes("one\r\n\r\ntwo ü\n".encode())
    (tmp_path / "b.md").write_bytes(b'{"text": "three"}\n')
    tokenize([tmp_path / "a.txt", tmp_path / "b.md"], tokenizer=tokenizer_json, out=tmp_path / "out")
    expected = json_ids(tokenizer_json, ["one\r\n\r\ntwo ü\n", '{"text": "three"}\n'])
    assert documents_of(tmp_path / "out") == expected


def test_several_files_of_both_kinds_are_taken_in_the_order_given(tokenizer_json, tmp_path):
    second = write_jsonl(tmp_path / "a.json", ["second", "third"])
    (tmp_path / "b.txt").write_text("first")
    tokenize([tmp_path / "b.txt", second], tokenizer=tokenizer_json, out=tmp_path / "out")
    assert documents_of(tmp_path / "out") == json_ids(tokenizer_json, ["first", "second", "third"])


def test_the_end_of_document_token_ends_every_document_when_asked_for(sentencepiece_model, tmp_path):
    source = write_jsonl(tmp_path / "in.jsonl", ["one", "two"])
    summary = tokenize(source, tokenizer=sentencepiece_model, out=tmp_path / "out", append_eod=True)
    expected = [[*ids, 2] for ids in sentencepiece_ids(sentencepiece_model, ["one", "two"])]
    assert documents_of(tmp_path / "out") == expected
    assert summary.num_tokens == sum(map(len, expected))


def test_documents_without_a_token_are_skipped_and_counted(sentencepiece_model, tmp_path):
    # sentencepiece removes spaces at both ends, so that the second is empty too.
    source = write_jsonl(tmp_path / "in.jsonl", ["", "   ", "x", ""])
    summary = tokenize(source, tokenizer=sentencepiece_model, out=tmp_path / "out", append_eod=True)
    assert (summary.num_documents, summary.num_empty_documents) == (1, 3)
    assert len(IndexedDataset(tmp_path / "out")) == 1


def test_blank_lines_are_passed_over_and_a_byte_order_mark_is_dropped(tokenizer_json, tmp_path):
    (tmp_path / "in.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n  \n{"text": "b"}')
    summary = tokenize(tmp_path / "in.jsonl", tokenizer=tokenizer_json, out=tmp_path / "out")
    assert documents_of(tmp_path / "out") == json_ids(tokenizer_json, ["a", "b"])
    assert summary.num_empty_documents == 0


def test_a_line_separator_inside_a_string_does_not_end_the_line(tokenizer_json, tmp_path):
    (tmp_path / "in.jsonl").write_text('{"text": "a\u2028b\u0085c"}\n', encoding="utf-8")
    tokenize(tmp_path / "in.jsonl", tokenizer=tokenizer_json, out=tmp_path / "out")
    assert documents_of(tmp_path / "out") == json_ids(tokenizer_json, ["a\u2028b\u0085c"])


def test_ids_of_a_vocabulary_from_65500_on_are_stored_in_32_bits(tmp_path):
    vocabulary = {"[UNK]": 0, "large": 65_499}
    tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, "[UNK]")).save(str(tmp_path / "tokenizer.json"))
    tokenize(write_jsonl(tmp_path / "in.jsonl", ["large"]), tokenizer=tmp_path, out=tmp_path / "out")
    assert IndexedDataset(tmp_path / "out").dtype == "int32"
    assert documents_of(tmp_path / "out") == [[65_499]]


def test_progress_adds_up_to_the_bytes_of_the_input(tokenizer_json, tmp_path):
    source = write_jsonl(tmp_path / "in.jsonl", ["text"] * 100_000)
    calls: list[int] = []
    tokenize(source, tokenizer=tokenizer_json, out=tmp_path / "out", advance=calls.append)
    assert len(calls) > 1
    assert sum(calls) == source.stat().st_size


# --- the description


def test_the_dataset_says_which_tokenizer_made_it(sentencepiece_model, tmp_path):
    source = write_jsonl(tmp_path / "in.jsonl", ["one", "two"])
    summary = tokenize(source, tokenizer=sentencepiece_model, out=tmp_path / "out", append_eod=True)
    description = DatasetDescription.read(tmp_path / "out")
    assert description is not None
    assert description.tokenizer_file == "tokenizer.model"
    assert description.tokenizer_sha256 == hashlib.sha256(sentencepiece_model.read_bytes()).hexdigest()
    assert (description.vocab_size, description.eod_id, description.append_eod) == (347, 2, True)
    assert (description.num_documents, description.num_tokens) == (2, summary.num_tokens)


@pytest.mark.parametrize("content", [None, b'{"text": "another program\'s"}\n', b"\x80\x00"])
def test_a_dataset_without_our_description_has_none(tmp_path, content):
    if content is not None:
        (tmp_path / "out.json").write_bytes(content)
    assert DatasetDescription.read(tmp_path / "out") is None


def test_a_damaged_or_newer_description_is_refused(tokenizer_json, tmp_path):
    tokenize(write_jsonl(tmp_path / "in.jsonl", ["one"]), tokenizer=tokenizer_json, out=tmp_path / "out")
    path = tmp_path / "out.json"
    content = path.read_text()
    for changed, message in (
        (content[:-20], "is damaged"),
        (content.replace('"vocab_size"', '"vocabulary"'), "is damaged: vocab_size missing"),
        (
            re.sub(r'"vocab_size": (\d+)', r'"vocab_size": "\1"', content),
            "is damaged: it has a field that is not an integer",
        ),
        (content.replace('"version": 1', '"version": 2'), "version 2 of the description; this megacore reads 1"),
    ):
        path.write_text(changed)
        with pytest.raises(DataError, match=rf"out\.json: {message}"):
            DatasetDescription.read(tmp_path / "out")


# --- what is refused

MALFORMED_LINES = {
    "not JSON": (b'{"text": "a"', "is not JSON: .* at column 13; each line must be one whole JSON object"),
    "two objects": (b'{"text": "a"} {"text": "b"}', "is not JSON: Extra data at column 15"),
    "pretty-printed": (b"[", "is not JSON: .*one whole JSON object"),
    "an array": (b'["a"]', "is JSON, but not an object"),
    "another key": (b'{"content": "a", "id": 1}', r"has no key 'text' \(its keys: 'content', 'id'\).*--json-key"),
    "no key": (b"{}", r"has no key 'text' \(its keys: none\)"),
    "a number": (b'{"text": 7}', "the value of 'text' is 7, not a string; remove the record, or .*--json-key"),
    "null": (b'{"text": null}', "the value of 'text' is null, not a string"),
    "not UTF-8": (b'{"text": "\xff"}', "is not UTF-8: byte 0xff at offset 10"),
    "half a pair": (rb'{"text": "a\ud83d"}', r"half of a surrogate pair \('\\ud83d'\)"),
    "too deep": (b'{"text": ' + b"[" * 200_000, "cannot be read as JSON"),
}


@pytest.mark.parametrize("line, message", MALFORMED_LINES.values(), ids=MALFORMED_LINES.keys())
def test_a_malformed_line_is_named_and_nothing_is_left(tokenizer_json, tmp_path, line, message):
    (tmp_path / "in.jsonl").write_bytes(b'{"text": "good"}\n\n' + line + b'\n{"text": "good"}\n')
    with pytest.raises(DataError, match=rf"in\.jsonl:3: .*{message}"):
        tokenize(tmp_path / "in.jsonl", tokenizer=tokenizer_json, out=tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_plain_text_that_is_not_utf_8_is_refused(tokenizer_json, tmp_path):
    (tmp_path / "in.txt").write_bytes("naïve".encode("latin-1"))
    with pytest.raises(DataError, match=r"in\.txt: is not UTF-8: byte 0xef at offset 2"):
        tokenize(tmp_path / "in.txt", tokenizer=tokenizer_json, out=tmp_path / "out")


def test_input_without_any_text_is_refused_and_nothing_is_left(tokenizer_json, tmp_path):
    (tmp_path / "in.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(DataError, match=r"in\.jsonl: no text to tokenize"):
        tokenize(tmp_path / "in.jsonl", tokenizer=tokenizer_json, out=tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_a_missing_input_is_named_before_the_work_begins(tokenizer_json, tmp_path):
    source = write_jsonl(tmp_path / "in.jsonl", ["one"])
    for bad, message in ((tmp_path / "absent.jsonl", "no such file"), (tmp_path, "is a directory, not a file")):
        with pytest.raises(DataError, match=f"{bad.name}: {message}"):
            tokenize([source, bad], tokenizer=tokenizer_json, out=tmp_path / "out")


def test_appending_an_end_token_that_is_not_known_is_refused(tmp_path):
    source = write_jsonl(tmp_path / "in.jsonl", ["one"])
    tokenizer = train_byte_level(tmp_path)
    with pytest.raises(DataError, match=r"tokenizer\.json: its end-of-document token is not known.*as eos_token"):
        tokenize(source, tokenizer=tokenizer, out=tmp_path / "out", append_eod=True)


def test_an_existing_dataset_is_not_replaced(tokenizer_json, tmp_path):
    source = write_jsonl(tmp_path / "in.jsonl", ["one"])
    tokenize(source, tokenizer=tokenizer_json, out=tmp_path / "out")
    with pytest.raises(OutputError, match=r"out\.bin and .*out\.idx and .*out\.json exist already"):
        tokenize(source, tokenizer=tokenizer_json, out=tmp_path / "out")


@pytest.mark.parametrize("out", [".", ".."])
@pytest.mark.parametrize("new_tokens", [False, True])
def test_an_output_without_a_name_is_refused(tokenizer_json, tmp_path, monkeypatch, out, new_tokens):
    source = write_jsonl(tmp_path / "in.jsonl", ["one"])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OutputError, match=rf"^{re.escape(out)} is a directory: give .*, such as .*text$"):
        tokenize(source, tokenizer=tokenizer_json, out=out, new_tokens=new_tokens)
    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.parametrize("new_tokens", [False, True])
def test_an_output_that_the_system_does_not_take_is_an_error_that_says_it(tokenizer_json, tmp_path, new_tokens):
    source = write_jsonl(tmp_path / "in.jsonl", ["one"])
    with pytest.raises(OutputError, match=r"xxx.* could not be written: File name too long"):
        tokenize(source, tokenizer=tokenizer_json, out=tmp_path / ("x" * 253), new_tokens=new_tokens)
    assert list(tmp_path.iterdir()) == [source]


def test_a_tokenizer_that_was_there_already_stays_when_the_dataset_cannot_be_written(
    tokenizer_json, tmp_path, monkeypatch
):
    source, arguments = write_jsonl(tmp_path / "in.jsonl", ["one"]), {"new_tokens": True, "out": tmp_path / "out"}
    tokenize(source, tokenizer=tokenizer_json, **arguments)
    for path in tmp_path.glob("out.*"):
        path.unlink()
    Failing(monkeypatch, Path, "rename", 3)
    with pytest.raises(DiskFullError):
        tokenize(source, tokenizer=tokenizer_json, **arguments)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out-tokenizer"]


def test_a_kill_leaves_nothing_that_looks_like_a_dataset(tokenizer_json, tmp_path):
    source = write_jsonl(tmp_path / "in.jsonl", ["text"] * 5000)
    program = """if True:
        import os, signal, sys
        from megacore.data import tokenize
        kill = lambda num_bytes: os.kill(os.getpid(), signal.SIGKILL)
        tokenize(sys.argv[1], tokenizer=sys.argv[2], out=sys.argv[3], advance=kill)
    """
    arguments = [str(source), str(tokenizer_json), str(tmp_path / "out")]
    process = subprocess.run([sys.executable, "-c", program, *arguments], check=False)
    assert process.returncode == -signal.SIGKILL
    assert not list(tmp_path.glob("out*"))

    tokenize(source, tokenizer=tokenizer_json, out=tmp_path / "out")

    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.bin", "out.idx", "out.json"]


class Failing:
    """A system call that works until the turn of ``number``, from 1 on, and from then on says that the disk is full."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, owner: object, name: str, number: int) -> None:
        self.remaining, self.works = number, getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *arguments: self(*arguments))

    def __call__(self, *arguments):
        self.remaining -= 1
        if self.remaining <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.works(*arguments)


@pytest.mark.parametrize("owner, name", [(os, "fsync"), (Path, "rename")])
def test_of_several_datasets_and_a_tokenizer_all_appear_or_none(tokenizer_json, tmp_path, monkeypatch, owner, name):
    (tmp_path / "in.jsonl").write_text('{"text": "abc", "title": "x"}\n')
    whole = ["out_text.bin", "out_text.idx", "out_text.json", "out_title.bin", "out_title.idx", "out_title.json"]
    for number in itertools.count(1):
        with monkeypatch.context() as patch:
            call = Failing(patch, owner, name, number)
            try:
                megacore.data.tokenize(
                    tmp_path / "in.jsonl", tokenizer=tokenizer_json, out=tmp_path / "out", json_key=["text", "title"]
                )
            except DiskFullError as error:
                assert str(error).endswith("what was begun of it was removed")
            else:
                break
        assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]
    assert number > len(whole) and call.remaining > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out-tokenizer", *whole]


# --- the command


@dataclass
class Command:
    directory: Path
    tokenizer: Path

    def __call__(self, *arguments: str | Path):
        common = ["--no-new-tokens", "--tokenizer", self.tokenizer, "--out", self.directory / "out"]
        return CliRunner().invoke(cli, ["tokenize", *map(str, [*common, *arguments])])


@pytest.fixture
def command(tokenizer_json, tmp_path) -> Command:
    return Command(tmp_path, tokenizer_json)


def test_the_command_ends_with_one_line_that_sums_up(command, tmp_path):
    source = write_jsonl(tmp_path / "in.jsonl", ["one", "", "two"])
    result = command("--input", source, "--append-eod")
    num_tokens = IndexedDataset(tmp_path / "out").num_tokens
    assert result.exit_code == 0
    assert result.stderr == ""
    numbers = f"2 documents, {num_tokens} tokens, {6 / num_tokens:.2f} bytes a token; skipped 1 empty document"
    engine = f"fastokens {version('fastokens')}, compared with tokenizers {version('tokenizers')}"
    assert re.fullmatch(
        re.escape(f"{tmp_path}/out: {numbers}; ") + r"\d+\.\d s with " + re.escape(engine) + "\n", result.stdout
    )


def test_the_command_takes_several_files_after_one_option_as_after_several(command, tmp_path):
    files = [write_jsonl(tmp_path / f"{name}.jsonl", [name]) for name in ("one", "two", "three")]
    result = command("--input", files[0], files[1], "--append-eod", "--input", files[2])
    assert result.exit_code == 0, result.output
    expected = [[*ids, 0] for ids in json_ids(command.tokenizer, ["one", "two", "three"])]
    assert documents_of(tmp_path / "out") == expected


def test_the_command_takes_the_text_from_another_key(command, tmp_path):
    source = write_jsonl(tmp_path / "in.jsonl", ["one"], key="content")
    assert command("--input", source, "--json-key", "content").exit_code == 0
    assert documents_of(tmp_path / "out") == json_ids(command.tokenizer, ["one"])


def test_the_command_frames_documents_adds_tokens_and_makes_a_dataset_of_each_key(
    command, sentencepiece_model, tmp_path
):
    texts = {"title": ["one", "a <extra_id_1>b"], "body": ["two words", "x"]}
    records = [dict(zip(texts, of_record, strict=True)) for of_record in zip(*texts.values(), strict=True)]
    (tmp_path / "in.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))
    words = ["--json-key", "title", "--json-key", "body", "--prepend-bos", "--append-eod", "--vocab-extra-ids", "2"]
    result = command("--input", tmp_path / "in.jsonl", "--tokenizer", sentencepiece_model, *words)
    assert result.exit_code == 0, result.output
    added = "<extra_id_0> 347, <extra_id_1> 348"
    assert f"Note: added 2 new tokens ({added}): the extended tokenizer is {tmp_path}/out-tokenizer, " in result.stderr
    assert result.stdout.startswith(f"{tmp_path}/out_title, {tmp_path}/out_body: 4 documents, ")
    for key in texts:
        ids = sentencepiece_ids(tmp_path / "out-tokenizer/tokenizer.model", texts[key])
        assert documents_of(tmp_path / f"out_{key}") == [[1, *of_text, 2] for of_text in ids]
    assert 348 in documents_of(tmp_path / "out_title")[1]


def test_the_command_skips_malformed_records_on_request_and_names_and_counts_them(command, tmp_path):
    bad = ["oops", "[1]", '{"other": 1}', '{"text": 1}', '{"text": "\\ud83d"}', "{", "null"]
    lines = ['{"text": "one"}', *bad, '{"text": ""}', '{"text": "two"}']
    (tmp_path / "in.jsonl").write_text("".join(f"{line}\n" for line in lines))
    result = command("--input", tmp_path / "in.jsonl", "--on-error", "skip")
    assert result.exit_code == 0, result.output
    assert documents_of(tmp_path / "out") == json_ids(command.tokenizer, ["one", "two"])
    assert "2 documents, " in result.stdout
    assert "; skipped 1 empty document and 7 malformed documents; " in result.stdout
    reasons = [
        "is not JSON",
        "is JSON, but not",
        "has no key 'text'",
        "the value of 'text' is 1",
        "the text has half of",
    ]
    notes = result.stderr.splitlines()
    assert len(notes) == len(reasons)
    for line, (note, reason) in enumerate(zip(notes, reasons, strict=True), start=2):
        assert note.startswith(f"Note: skipped {tmp_path}/in.jsonl:{line}: {reason}")


def test_the_command_refuses_to_begin_documents_with_a_token_that_is_not_known(command, tmp_path):
    result = command("--input", write_jsonl(tmp_path / "in.jsonl", ["one"]), "--prepend-bos")
    assert result.exit_code == 2
    assert result.stderr.startswith(f"Error: {command.tokenizer}/tokenizer.json: its begin token is not known")
    assert "name it as bos_token in a tokenizer_config.json" in result.stderr and "--prepend-bos" in result.stderr
    assert not list(tmp_path.glob("out*"))


def test_the_command_reports_a_mistake_in_the_input_without_a_traceback(command, tmp_path):
    (tmp_path / "in.jsonl").write_text("oops\n")
    result = command("--input", tmp_path / "in.jsonl")
    assert result.exit_code == 2
    assert result.stderr.startswith(f"Error: {tmp_path}/in.jsonl:1: is not JSON")


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "Missing option '--input'"),
        (["--input"], "Option '--input' requires an argument"),
        (["--input", "a.txt", "--append-eod", "stray.txt"], "Got unexpected extra argument (stray.txt)"),
    ],
)
def test_the_command_refuses_a_call_that_is_wrong(command, arguments, message):
    result = command(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr


def run_program(*arguments: str | Path, stderr: int) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "megacore", "tokenize", "--no-new-tokens", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=stderr,
        env=os.environ | {"TERM": "xterm"},
        check=True,
    )


def test_progress_is_shown_on_a_terminal_and_only_there(tokenizer_json, tmp_path):
    source = write_jsonl(tmp_path / "in.jsonl", ["one"])
    arguments = ["--input", source, "--tokenizer", tokenizer_json, "--out"]
    piped = run_program(*arguments, tmp_path / "piped", stderr=subprocess.PIPE)
    assert piped.stderr == b""

    terminal, program_side = pty.openpty()
    shown = run_program(*arguments, tmp_path / "shown", stderr=program_side)
    os.close(program_side)
    assert b"tokenizing" in os.read(terminal, 65536)
    os.close(terminal)
    assert shown.stdout.count(b"\n") == piped.stdout.count(b"\n") == 1


def test_help_loads_no_heavy_library():
    program = """if True:
        import sys
        from megacore.cli import cli
        cli(["tokenize", "--help"], standalone_mode=False)
        heavy = {"numpy", "torch", "transformers", "tokenizers", "sentencepiece", "rich"} & set(sys.modules)
        sys.exit(str(heavy) if heavy else 0)
    """
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    assert "--input FILE..." in process.stdout
