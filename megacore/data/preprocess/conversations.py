"""Conversations in records: lists of messages, or questions with their answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megacore.data.preprocess.readers import WholeText, pieces
from megacore.data.preprocess.records import Problem, shown, text, value
from megacore.data.tokenizers.chat_template import Message
from megacore.errors import DataError


@dataclass(frozen=True)
class Conversation:
    """One record.

    Attributes:
        messages: each with ``role`` and, as a rule, ``content``.
        tools: what the assistant may call, as the template takes it.
        where: the file and the line or row.
    """

    messages: list[Message]
    tools: list[Any] | None
    where: str


@dataclass(frozen=True, kw_only=True)
class MessageKeys:
    """Records with a list of messages, ``[{"role": "user", "content": "…"}, …]``.

    Or as ShareGPT has them, ``[{"from": "human", "value": "…"}, …]``, with ``gpt`` for the assistant.

    Attributes:
        messages: where a record has the list.
        tools: where it has the tools that its assistant may call; a record without them has none.
    """

    messages: str = "messages"
    tools: str = "tools"

    def names(self) -> Sequence[str]:
        """The keys that are looked for."""
        return self.messages, self.tools

    def read(self, record: Mapping[str, Any]) -> tuple[list[Message], list[Any] | None]:
        """The messages and tools of a record. Raises :class:`DataError` without saying where."""
        messages = value(record, self.messages, option="--messages-key")
        if not isinstance(messages, list) or not messages:
            raise DataError(f"the value of {self.messages!r} is {shown(messages)}, not a list of messages")
        messages = [_message(number, message) for number, message in enumerate(messages, start=1)]
        if all(message["role"] != "assistant" for message in messages):
            raise DataError("no message is the assistant's, so there is nothing to learn from it")
        tools = record.get(self.tools)
        if tools is not None and not isinstance(tools, list):
            raise DataError(f"the value of {self.tools!r} is {shown(tools)}, not a list")
        return messages, tools or None


@dataclass(frozen=True, kw_only=True)
class QuestionKeys:
    """Records with one question and one answer.

    Attributes:
        question: where a record has the question.
        answer: and the answer.
        system: and the system message, which may be ``null``; without this key, there is none.
    """

    question: str = "input"
    answer: str = "output"
    system: str | None = None

    def names(self) -> Sequence[str]:
        """The keys that are looked for."""
        return self.question, self.answer, *([] if self.system is None else [self.system])

    def read(self, record: Mapping[str, Any]) -> tuple[list[Message], None]:
        """The two or three messages of a record. Raises :class:`DataError` without saying where."""
        messages = [
            {"role": "user", "content": text(record, self.question, option="--question-key")},
            {"role": "assistant", "content": text(record, self.answer, option="--answer-key")},
        ]
        if self.system is not None and value(record, self.system, option="--system-key") is not None:
            messages.insert(0, {"role": "system", "content": text(record, self.system, option="--system-key")})
        return list(messages), None


def read_conversations(
    path: Path,
    keys: MessageKeys | QuestionKeys,
    *,
    on_error: Callable[[DataError], None],
    advance: Callable[[int], None] = lambda num_bytes: None,
) -> Iterator[Conversation]:
    """Read the conversations of a file of any kind that :func:`~megacore.data.preprocess.readers.pieces` reads, except
    plain text.

    ``on_error`` is told of a record that cannot be used; if it returns, the next follows. ``advance`` is told of bytes
    of the file whose conversations were all taken.

    Raises:
        DataError: when the file is damaged, or plain text.
    """
    begins = 0
    for piece in pieces(path):
        if isinstance(piece, WholeText):
            raise DataError(f"{path}: is plain text by its name; conversations are .jsonl, .json or .parquet files")
        reading = piece.read(keys.names())
        for record in reading.records:
            where = piece.where(begins + record.position)
            try:
                if isinstance(record, Problem):
                    raise DataError(record.message)
                messages, tools = keys.read(record.values)
            except DataError as error:
                on_error(DataError(f"{where}: {error}"))
                continue
            yield Conversation(messages, tools, where)
        begins += reading.num_positions
        advance(piece.num_input_bytes)


def _message(number: int, message: Any) -> Message:
    if isinstance(message, dict) and "role" not in message and isinstance(message.get("from"), str):
        others = {key: of_key for key, of_key in message.items() if key not in ("from", "value")}
        message = {
            "role": _OF_SHAREGPT.get(message["from"], message["from"]),
            "content": message.get("value"),
            **others,
        }
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise DataError(
            f'message {number} is {shown(message)}; a message is {{"role": "user", "content": "…"}}, with the roles '
            "that the chat template knows"
        )
    content = message.get("content")
    if content is not None and not isinstance(content, str | list):
        raise DataError(f"the content of message {number} is {shown(content)}, not a string")
    return message


_OF_SHAREGPT = {"human": "user", "gpt": "assistant"}
"""Its names of roles that have others in chat templates."""
