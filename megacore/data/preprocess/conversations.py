"""Conversations in records: lists of messages, or a question with its answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megacore.data.preprocess.readers import WholeText, pieces
from megacore.data.preprocess.records import Problem, abbreviated, lookup, lookup_text
from megacore.data.tokenizers.chat_template import Message
from megacore.errors import DataError


@dataclass(frozen=True)
class Conversation:
    """Messages with ``role`` and usually ``content``, the tools for the template, and their file and line or row."""

    messages: list[Message]
    tools: list[Any] | None
    where: str


@dataclass(frozen=True, kw_only=True)
class MessageKeys:
    """Records with a list of messages, ``[{"role": "user", "content": "…"}, …]``.

    Or as ShareGPT has them, ``[{"from": "human", "value": "…"}, …]``, with ``gpt`` for the assistant.

    Attributes:
        messages: Key of the list.
        tools: Key of the tools that the assistant may call, which a record need not have.
    """

    messages: str = "messages"
    tools: str = "tools"

    def names(self) -> Sequence[str]:
        """Return the keys to read."""
        return self.messages, self.tools

    def read(self, record: Mapping[str, Any]) -> tuple[list[Message], list[Any] | None]:
        """Return the messages and tools of a record. Raises :class:`DataError` without file and line."""
        messages = lookup(record, self.messages, option="--messages-key")
        if not isinstance(messages, list) or not messages:
            raise DataError(f"the value of {self.messages!r} is {abbreviated(messages)}, not a list of messages")
        messages = [_message(number, message) for number, message in enumerate(messages, start=1)]
        if all(message["role"] != "assistant" for message in messages):
            raise DataError("no message is the assistant's, so there is nothing to learn from it")
        tools = record.get(self.tools)
        if tools is not None and not isinstance(tools, list):
            raise DataError(f"the value of {self.tools!r} is {abbreviated(tools)}, not a list")
        return messages, tools or None


@dataclass(frozen=True, kw_only=True)
class QuestionKeys:
    """Records with one question and one answer.

    Attributes:
        question: Key of the question.
        answer: Key of the answer.
        system: Key of the system message, whose value may be ``null``; with None there is no system message.
    """

    question: str = "input"
    answer: str = "output"
    system: str | None = None

    def names(self) -> Sequence[str]:
        """Return the keys to read."""
        return self.question, self.answer, *([] if self.system is None else [self.system])

    def read(self, record: Mapping[str, Any]) -> tuple[list[Message], None]:
        """Return the two or three messages of a record. Raises :class:`DataError` without file and line."""
        messages = [
            {"role": "user", "content": lookup_text(record, self.question, option="--question-key")},
            {"role": "assistant", "content": lookup_text(record, self.answer, option="--answer-key")},
        ]
        if self.system is not None and lookup(record, self.system, option="--system-key") is not None:
            messages.insert(0, {"role": "system", "content": lookup_text(record, self.system, option="--system-key")})
        return list(messages), None


def read_conversations(
    path: Path,
    keys: MessageKeys | QuestionKeys,
    *,
    on_error: Callable[[DataError], None],
    advance: Callable[[int], None] = lambda num_bytes: None,
) -> Iterator[Conversation]:
    """Yield the conversations of a file of JSON lines or rows; see :mod:`~megacore.data.preprocess.readers`.

    ``on_error`` is called with the error of each malformed record; if it returns, the record is skipped. ``advance`` is
    called with a number of bytes of the file after their conversations were yielded.

    Raises:
        DataError: The file is damaged, or plain text.
    """
    start = 0
    for piece in pieces(path):
        if isinstance(piece, WholeText):
            raise DataError(f"{path}: is plain text by its name; conversations are .jsonl, .json or .parquet files")
        reading = piece.read(keys.names())
        for record in reading.records:
            where = piece.where(start + record.position)
            try:
                if isinstance(record, Problem):
                    raise DataError(record.message)
                messages, tools = keys.read(record.values)
            except DataError as error:
                on_error(DataError(f"{where}: {error}"))
                continue
            yield Conversation(messages, tools, where)
        start += reading.num_positions
        advance(piece.num_input_bytes)


def _message(number: int, message: Any) -> Message:
    if isinstance(message, dict) and "role" not in message and isinstance(message.get("from"), str):
        rest = {key: value for key, value in message.items() if key not in ("from", "value")}
        role = _SHAREGPT_ROLES.get(message["from"], message["from"])
        message = {"role": role, "content": message.get("value")} | rest
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise DataError(
            f'message {number} is {abbreviated(message)}; a message is {{"role": "user", "content": "…"}}, with a role '
            "that the chat template knows"
        )
    content = message.get("content")
    if content is not None and not isinstance(content, str | list):
        raise DataError(f"the content of message {number} is {abbreviated(content)}, not a string")
    return message


_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}
"""ShareGPT's roles whose names in chat templates differ."""
