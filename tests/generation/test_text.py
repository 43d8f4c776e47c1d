"""Generated text: as it comes, where it ends, and in conversations; what the tokenizer's own library says is right."""

from __future__ import annotations

import io
import itertools
import json
import os
import pty
import random
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
import torch
from click.testing import CliRunner, Result
from transformers import AutoTokenizer

import megacore
from megacore.checkpoint import Checkpoint
from megacore.cli import cli
from megacore.cli.generate import TextPrinter
from megacore.data import load_tokenizer
from megacore.errors import DataError, GenerationError
from megacore.generation import Limits, Sampling, TextGenerator, converse, text_generator
from megacore.generation.decoding import ENDED
from megacore.generation.detokenizer import Detokenizer
from megacore.parallel import ParallelContext
from tiny_chat import CHATML, write_tokenizer
from tiny_llama import published_model
from warm_commands import Command

SINGLE = ParallelContext.single()
TEXT = "Größe 中文 👩‍👩‍👧 naïve العربية  two\n\nlines ☃ end"


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Models as small as these only lose by a second one."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


# --- tokenizers of all kinds


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("byte-level")
    write_tokenizer(directory, CHATML)
    return directory


@pytest.fixture(scope="module")
def pieces(tmp_path_factory) -> Path:
    """A SentencePiece model that falls back to bytes, as Llama 2's does."""
    directory = tmp_path_factory.mktemp("sentencepiece")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the cat sat on the mat and looked at the moon " * 5] * 20),
        model_writer=model,
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (directory / "tokenizer.model").write_bytes(model.getvalue())
    return directory


@pytest.fixture(scope="module")
def json_bytes(tmp_path_factory, pieces) -> Path:
    """The like as a ``tokenizer.json``: one invalid byte makes its library give up a whole run of bytes."""
    directory = tmp_path_factory.mktemp("json")
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"▁": 256, "a": 257, "▁a": 258, "é": 259}
    model = tokenizers.models.BPE(vocabulary, [("▁", "a")], byte_fallback=True)
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    decoders = tokenizers.decoders
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


@pytest.fixture(scope="module")
def squeezed(tmp_path_factory) -> Path:
    """A SentencePiece model with its own defaults: it drops all spaces at the beginning of a text."""
    directory = tmp_path_factory.mktemp("squeezed")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the cat sat on the mat and looked at the moon"] * 20),
        model_writer=model,
        vocab_size=60,
        user_defined_symbols=["▁▁", "<x>"],
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (directory / "tokenizer.model").write_bytes(model.getvalue())
    return directory


@pytest.fixture(scope="module")
def word_pieces(tmp_path_factory) -> Path:
    """BERT's kind of ``tokenizer.json``: words are parted by spaces, which are taken away before full stops."""
    directory = tmp_path_factory.mktemp("word pieces")
    words = ["[UNK]", "the", "cat", "##s", "sat", ".", ",", "do", "n't", "'", "m", "##."]
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordPiece({word: number for number, word in enumerate(words)}, unk_token="[UNK]")
    )
    tokenizer.add_special_tokens(["[SEP]"])
    tokenizer.decoder = tokenizers.decoders.WordPiece(cleanup=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


@pytest.fixture(scope="module")
def suffixes(tmp_path_factory) -> Path:
    """CLIP's kind of ``tokenizer.json``: the end of a word is a space, but not that of the last one."""
    directory = tmp_path_factory.mktemp("suffixes")
    words = ["a", "b", "a</w>", "b</w>", "</w>", "é</w>"]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({word: number for number, word in enumerate(words)}, []))
    tokenizer.decoder = tokenizers.decoders.BPEDecoder()
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


KINDS = ["byte_level", "pieces", "json_bytes"]


@pytest.fixture(params=KINDS)
def tokenizer(request):
    return load_tokenizer(request.getfixturevalue(request.param))


@pytest.fixture(params=[*KINDS, "squeezed", "word_pieces", "suffixes"])
def any_tokenizer(request):
    return load_tokenizer(request.getfixturevalue(request.param))


def decoded_by_its_library(tokenizer, ids: list[int]) -> str:
    if tokenizer.file.suffix == ".model":
        return sentencepiece.SentencePieceProcessor(model_file=str(tokenizer.file)).decode(ids)
    return tokenizers.Tokenizer.from_file(str(tokenizer.file)).decode(ids, skip_special_tokens=False)


def streamed(tokenizer, prompt: list[int], ids: list[int], *stop: str) -> list[str]:
    stream = Detokenizer(tokenizer, prompt, stop)
    parts = [stream.add(token_id) for token_id in ids] + [stream.finish()]
    assert "".join(parts) == stream.text
    return parts


def test_tokens_of_single_bytes_are_told_from_others(pieces, json_bytes, byte_level):
    for directory in (pieces, json_bytes):
        tokenizer = load_tokenizer(directory)
        assert tokenizer.is_byte(tokenizer.token_id("<0xE2>"))
        assert not tokenizer.is_byte(tokenizer.token_id("a"))
    assert not any(map(load_tokenizer(byte_level).is_byte, range(420)))


# --- text as it comes


def test_the_parts_of_a_text_are_the_whole_and_no_part_ends_in_half_a_character(tokenizer):
    ids = tokenizer.encode(TEXT)
    parts = streamed(tokenizer, [], ids)
    assert "".join(parts) == tokenizer.decode(ids) == TEXT
    assert len([part for part in parts if part]) > 5
    assert not any("�" in part for part in parts)


def drawn(tokenizer, shuffled: random.Random, length: int) -> list[int]:
    """Tokens in no order; single bytes, which some vocabularies have little beside, are every other one at most."""
    everything = range(tokenizer.vocab_size)
    no_bytes = [token_id for token_id in everything if not tokenizer.is_byte(token_id)]
    return [shuffled.choice(shuffled.choice([everything, no_bytes])) for _ in range(length)]


def test_so_they_are_of_tokens_in_no_order_whose_bytes_are_no_characters(any_tokenizer):
    tokenizer, shuffled = any_tokenizer, random.Random(0)
    for length in [*range(1, 30)] * 10 + [300] * 5:
        ids = drawn(tokenizer, shuffled, length)
        assert "".join(streamed(tokenizer, [], ids)) == decoded_by_its_library(tokenizer, ids)


def test_so_they_are_of_few_tokens_over_and_over_behind_a_prompt(any_tokenizer):
    """Of few, so that there are runs of spaces, of tokens without text, of bytes."""
    tokenizer, shuffled, num_compared = any_tokenizer, random.Random(1), 0
    for _ in range(150):
        few, prompt = drawn(tokenizer, shuffled, 3), drawn(tokenizer, shuffled, 20)
        before = decoded_by_its_library(tokenizer, prompt)
        ids = shuffled.choices(few, k=shuffled.randrange(1, 60))
        whole = decoded_by_its_library(tokenizer, prompt + ids)
        if before.strip() and whole.startswith(before) and not (before[-1] == "�" or tokenizer.is_byte(prompt[-1])):
            num_compared += 1
            assert "".join(streamed(tokenizer, prompt, ids)) == whole[len(before) :]
    assert num_compared > 50


def test_the_text_of_any_tokens_ends_before_a_stop_text_wherever_that_is(any_tokenizer):
    tokenizer, shuffled = any_tokenizer, random.Random(2)
    num_stopped = 0
    for _ in range(100):
        ids = drawn(tokenizer, shuffled, 40)
        whole = decoded_by_its_library(tokenizer, ids)
        first = shuffled.randrange(len(whole))
        stop = whole[first : first + shuffled.randrange(1, 6)]
        if "�" not in stop:
            num_stopped += 1
            assert "".join(streamed(tokenizer, [], ids, stop)) == whole[: whole.index(stop)]
    assert num_stopped > 20


def test_a_token_costs_as_much_in_a_long_text_as_in_a_short_one(any_tokenizer, monkeypatch):
    tokenizer, shuffled = any_tokenizer, random.Random(3)
    ids = drawn(tokenizer, shuffled, 2000)
    decode, num_decoded = tokenizer.decode, []

    def counted(some: list[int]) -> str:
        num_decoded.append(len(some))
        return decode(some)

    monkeypatch.setattr(tokenizer, "decode", counted)
    streamed(tokenizer, [], ids, "a stop text")
    assert sum(num_decoded) < 60 * len(ids)


def test_a_text_begins_with_the_space_that_parts_it_from_the_prompt(tokenizer):
    prompt, ids = tokenizer.encode("a cat"), tokenizer.encode("a cat sat")
    assert ids[: len(prompt)] == prompt
    assert "".join(streamed(tokenizer, prompt, ids[len(prompt) :])) == " sat"


def test_a_text_is_what_follows_the_prompt_wherever_that_ends_between_two_characters(tokenizer):
    ids = tokenizer.encode(TEXT * 2)
    num_compared = 0
    for end in range(1, len(ids)):
        prompt = tokenizer.decode(ids[:end])
        if (TEXT * 2).startswith(prompt):
            num_compared += 1
            assert prompt + "".join(streamed(tokenizer, ids[:end], ids[end:])) == TEXT * 2
    assert num_compared > 50


def test_a_character_of_which_the_prompt_has_the_first_bytes_is_not_lost(byte_level):
    tokenizer = load_tokenizer(byte_level)
    ids = tokenizer.encode("a☃b")
    assert "".join(streamed(tokenizer, ids[:2], ids[2:])) == "☃b"


def test_a_stop_text_and_what_may_be_its_beginning_are_held_back(byte_level):
    tokenizer = load_tokenizer(byte_level)
    ids = [tokenizer.token_id(letter) for letter in "xabaabcy"]
    parts = streamed(tokenizer, [], ids, "abc", "nowhere")
    assert parts == ["x", "", "", "ab", "a", "", "", "", ""]


def test_what_was_held_back_comes_at_the_end_if_it_was_no_stop_text(byte_level):
    tokenizer = load_tokenizer(byte_level)
    assert streamed(tokenizer, [], [tokenizer.token_id(letter) for letter in "xab"], "abc") == ["x", "", "", "ab"]


def test_the_first_of_several_stop_texts_ends_the_text(byte_level):
    tokenizer = load_tokenizer(byte_level)
    ids = tokenizer.encode("one two three")
    assert "".join(streamed(tokenizer, [], ids, "three", " t")) == "one"
    assert "".join(streamed(tokenizer, [], [tokenizer.token_id("Ġthe")], "e", "h")) == " t"


def test_texts_are_printed_one_after_the_other_however_they_come(capsys):
    printer = TextPrinter(["first", "second", "third"])
    for index, text in [(1, "b"), (0, "a"), (2, "c"), (2, ""), (0, "A"), (0, ""), (1, "B"), (1, "")]:
        printer(index, text)
    assert capsys.readouterr().out == "==> first\naA\n==> second\nbB\n==> third\nc\n"


# --- a model with a tokenizer


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A model of random weights that knows the tokens of ``tiny_chat``; it names ``</s>`` as the end of a text."""
    place = tmp_path_factory.mktemp("chat")
    published_model(place / "published", vocab_size=420, max_position_embeddings=256, eos_token_id=1)
    write_tokenizer(place / "published", CHATML)
    megacore.convert("llama", place / "published", place / "checkpoint")
    return place / "checkpoint"


@pytest.fixture(scope="module")
def generator(checkpoint) -> TextGenerator:
    return TextGenerator(Checkpoint(checkpoint), SINGLE)


def generated(generator: TextGenerator, prompt, **limits):
    [result] = generator.generate([prompt], Limits(**limits), Sampling())
    return result


def test_a_prompt_is_encoded_as_transformers_does(generator, checkpoint):
    theirs = AutoTokenizer.from_pretrained(checkpoint / "tokenizer")
    assert generator.prompts.encode(TEXT) == theirs(TEXT)["input_ids"]


def test_a_prompt_begins_with_the_token_for_a_beginning_where_the_tokenizer_says_so(checkpoint, tmp_path):
    library = tokenizers.Tokenizer.from_file(str(checkpoint / "tokenizer/tokenizer.json"))
    library.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)]
    )
    for file in (checkpoint / "tokenizer").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    library.save(str(tmp_path / "tokenizer.json"))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    ours = load_tokenizer(tmp_path)
    assert theirs("a b")["input_ids"][0] == ours.bos_id == 0
    assert ours.adds_bos
    assert not load_tokenizer(checkpoint / "tokenizer").adds_bos


def test_so_it_does_with_a_sentencepiece_model_unless_its_configuration_says_otherwise(pieces, tmp_path):
    assert load_tokenizer(pieces).adds_bos
    (tmp_path / "tokenizer.model").write_bytes((pieces / "tokenizer.model").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": false}')
    assert not load_tokenizer(tmp_path).adds_bos


def test_the_token_for_a_beginning_is_added_or_left_out_on_request(checkpoint):
    for add_bos, begin in ((True, [0]), (False, [])):
        [result] = megacore.generate(checkpoint, "ab", max_new_tokens=1, add_bos=add_bos)
        assert result.prompt_ids == begin + load_tokenizer(checkpoint / "tokenizer").encode("ab")


def test_the_text_is_that_of_the_tokens_without_the_one_that_ended_them(generator, checkpoint):
    library = tokenizers.Tokenizer.from_file(str(checkpoint / "tokenizer/tokenizer.json"))
    free = generated(generator, "ab", max_new_tokens=20, end_ids=[])
    assert free.text == library.decode(free.ids, skip_special_tokens=False)
    ended = generated(generator, "ab", max_new_tokens=20, end_ids=[free.ids[9]])
    place = free.ids.index(free.ids[9])
    assert ended.ids == free.ids[: place + 1]
    assert ended.text == library.decode(free.ids[:place], skip_special_tokens=False)


def test_a_stop_text_ends_the_tokens_too(generator):
    free = generated(generator, "ab", max_new_tokens=20, end_ids=[])
    stop = free.text[len(free.text) // 2 :][:3]
    stopped = generated(generator, "ab", max_new_tokens=20, end_ids=[], stop=[stop])
    assert stopped.ended_by == "stop"
    assert stopped.text == free.text[: free.text.index(stop)]
    assert len(stopped.ids) < 20
    assert stopped.ids == free.ids[: len(stopped.ids)]


def test_the_beginning_of_a_stop_text_is_in_the_text_when_no_more_tokens_come(generator):
    free = generated(generator, "ab", max_new_tokens=20, end_ids=[])
    cut_off = generated(generator, "ab", max_new_tokens=20, end_ids=[], stop=[free.text[-1] + "and more"])
    assert (cut_off.text, cut_off.ended_by) == (free.text, "max_new_tokens")


def test_a_stop_text_that_is_a_token_without_text_ends_a_text_too(pieces):
    tokenizer = load_tokenizer(pieces)
    prompt_ids, end = tokenizer.encode("the cat"), tokenizer.token_id("</s>")
    assert tokenizer.decode([end]) == ""
    text = text_generator._Sequence(
        0, prompt_ids, frozenset(), tokenizer, Limits(stop=["</s>"]), 256, torch.Generator(), None
    )  # fmt: skip
    assert text.add(prompt_ids[0]) == prompt_ids[0]
    assert text.add(end) == ENDED
    assert text.generated().ended_by == "stop"


def test_what_is_told_as_it_comes_is_the_text_of_each_prompt(generator):
    told: dict[int, list[str]] = {0: [], 1: []}
    results = generator.generate(
        ["ab", "c"],
        Limits(max_new_tokens=20),
        Sampling(temperature=1.0, seed=0),
        32,
        lambda i, text: told[i].append(text),
    )
    for index, result in enumerate(results):
        assert "".join(told[index]) == result.text
        assert told[index][-1] == ""
        assert "" not in told[index][:-1]


# --- conversations

HELLO = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "中文 naïve?"}]


def test_a_conversation_is_what_transformers_makes_of_it_with_the_prompt_for_an_answer(generator, checkpoint):
    theirs = AutoTokenizer.from_pretrained(checkpoint / "tokenizer")
    expected = theirs.apply_chat_template(HELLO, add_generation_prompt=True, return_dict=False)
    assert generator.prompts.encode(HELLO) == expected


def test_an_answer_ends_with_the_template_s_end_of_turn_and_a_text_does_not(generator):
    """``<|im_end|>`` is not the token that the model names as the end."""
    end_of_turn = generator.prompts.require_tokenizer().token_id("<|im_end|>")
    assert generator.end_ids == {1}
    assert generator._end_ids(HELLO, Limits()) == {1, end_of_turn}
    assert generator._end_ids("a text", Limits()) == {1}


def test_a_conversation_goes_on_from_its_own_answers(generator):
    questions = iter(["Hi", "And then?", None])
    told: list[tuple[int, str]] = []
    messages = converse(
        generator, Limits(max_new_tokens=5), Sampling(), "Be brief.", lambda: next(questions),
        lambda turn, text: told.append((turn, text)), pytest.fail,
    )  # fmt: skip
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "user", "assistant"]
    for number, turn in ((2, 0), (4, 1)):
        alone = generated(generator, messages[:number], max_new_tokens=5)
        assert messages[number]["content"] == alone.text == "".join(text for at, text in told if at == turn)


def test_a_turn_for_which_there_is_no_room_is_taken_back(generator):
    refusals: list[str] = []
    questions = iter(["too long " * 99, "Hi", None])
    messages = converse(
        generator, Limits(max_new_tokens=5), Sampling(), None, lambda: next(questions), lambda turn, text: None,
        refusals.append,
    )  # fmt: skip
    assert messages[0]["content"] == "Hi"
    assert len(refusals) == 1
    assert re.search("tokens, and the context of the model is 256", refusals[0])


def test_a_tokenizer_without_a_chat_template_cannot_converse_unless_it_is_given_one(checkpoint, tmp_path):
    published_model(tmp_path / "published", vocab_size=420)
    write_tokenizer(tmp_path / "published", None)
    megacore.convert("llama", tmp_path / "published", tmp_path / "bare")
    with pytest.raises(DataError, match="the tokenizer has no chat template"):
        megacore.generate(tmp_path / "bare", [HELLO[1:]])
    (tmp_path / "template").write_text(CHATML)
    [result] = megacore.generate(tmp_path / "bare", [HELLO[1:]], chat_template=tmp_path / "template", max_new_tokens=1)
    assert len(result.ids) == 1


# --- the command


def run(*arguments: object, input: str | None = None) -> Result:
    return CliRunner().invoke(cli, ["generate", *map(str, arguments)], input=input)


def test_the_command_prints_the_text_and_says_that_it_was_cut_off(checkpoint, generator):
    result = run(checkpoint, "--prompt", "ab", "--max-new-tokens", 9)
    assert result.exit_code == 0, result.output
    expected = generated(generator, "ab", max_new_tokens=9)
    assert expected.ended_by == "max_new_tokens"
    assert result.stdout == expected.text + "\n"
    assert result.stderr == "Note: the text was cut off after 9 tokens; increase --max-new-tokens for more.\n"


def test_the_command_reads_prompts_from_files_and_from_standard_input(checkpoint, tmp_path):
    (tmp_path / "prompt.txt").write_text("c\r\n")
    limit = ("--max-new-tokens", 3, "--json")
    piped = run(checkpoint, *limit, input="ab\n")
    both = run(checkpoint, "--prompt", "ab", "--prompt-file", tmp_path / "prompt.txt", *limit)
    lines = [json.loads(line) for line in both.stdout.splitlines()]
    assert [line["prompt"] for line in lines] == ["ab", "c"]
    assert json.loads(piped.stdout) == lines[0]


def test_the_lines_of_json_hold_what_python_is_given(checkpoint):
    drawn = ("--temperature", 0.9, "--top-k", 30, "--top-p", 0.9, "--seed", 3)
    result = run(checkpoint, "--prompt", "ab", "--json", *drawn, "--max-new-tokens", 7, "--dtype", "fp64", "--bos")
    [expected] = megacore.generate(
        checkpoint, "ab", temperature=0.9, top_k=30, top_p=0.9, seed=3, max_new_tokens=7, dtype=torch.float64,
        add_bos=True,
    )  # fmt: skip
    assert json.loads(result.stdout) == {"prompt": "ab", **expected.to_json()}


def test_the_command_answers_with_chat(checkpoint):
    result = run(
        checkpoint, "--chat", "--system", "Be brief.", "--prompt", "中文 naïve?", "--json", "--max-new-tokens", 3
    )
    [expected] = megacore.generate(checkpoint, [HELLO], max_new_tokens=3)
    assert json.loads(result.stdout)["ids"] == expected.ids


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--prompt", ""), 'the prompt "" has no token'),
        (("--prompt", "a", "--system", "b"), "--system and --chat-template require --chat"),
        (("--prompt", "a", "--top-p", "0.5"), "top-k and top-p have no effect without a temperature"),
        (("--prompt-file", "nowhere.txt"), "nowhere.txt cannot be read as text"),
        (("--prompt", "a", "--stop", ""), "a stop text is empty"),
        (("--prompt", "a", "--tp", "5"), "5"),
    ],
    ids=itertools.count(),
)
def test_a_mistake_in_the_call_is_said_and_ends_with_2(options, said, checkpoint):
    result = run(checkpoint, *options)
    assert result.exit_code == 2
    assert said in result.output


@pytest.mark.parametrize("tp", [1, 2])
def test_the_command_ends_without_a_word_when_its_reader_is_gone_as_before_head(tp, checkpoint):
    process = Command("generate", checkpoint, "--prompt", "ab", "--tp", str(tp))
    process.stdout.close()

    told = process.stderr.read()

    assert (process.wait(timeout=60), told) == (128 + signal.SIGPIPE, "")


def test_a_checkpoint_without_a_tokenizer_is_said_to_be_one(tmp_path):
    published_model(tmp_path / "published")
    megacore.convert("llama", tmp_path / "published", tmp_path / "bare")
    result = run(tmp_path / "bare", "--prompt", "a")
    assert result.exit_code == 2
    assert "has no tokenizer" in result.stderr
    with pytest.raises(GenerationError, match="has no tokenizer"):
        megacore.generate(tmp_path / "bare", ["a"])


@pytest.mark.soak
@pytest.mark.parametrize("tp", [1, 2])
def test_on_a_terminal_it_converses_turn_by_turn(tp, checkpoint):
    ours, theirs = pty.openpty()
    command = [
        sys.executable,
        "-m",
        "megacore",
        "generate",
        checkpoint,
        "--chat",
        "--max-new-tokens",
        "4",
        "--tp",
        str(tp),
    ]
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True)
    os.close(theirs)
    said = b""
    for typed in (b"Hi\n", b"\n", b"And then?\n", b"\x04"):
        prompts = said.count(b"> ")
        while said.count(b"> ") == prompts:
            said += os.read(ours, 1000)
        os.write(ours, typed)
    assert process.wait(timeout=60) == 0
