"""Conversations in JSON Lines files: lists of messages, or questions with their answers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megacore.data.chat_template import Message
from megacore.errors import DataError


@dataclass(frozen=True)
class Conversation:
    """One record.

    Attributes:
        messages: each with ``role`` and, as a rule, ``content``.
        tools: what the assistant may call, as the template takes it.
        where: the file and the line.
        num_input_bytes: what it takes in the file.
    """

    messages: list[Message]
    tools: list[Any] | None
    where: str
    num_input_bytes: int


@dataclass(frozen=True, kw_only=True)
class MessageKeys:
    """Records with a list of messages, ``[{"role": "user", "content": "…"}, …]``.

    Attributes:
        messages: where a record has the list.
        tools: where it has the tools that its assistant may call; a record without them has none.
    """

    messages: str = "messages"
    tools: str = "tools"

    def read(self, record: dict[str, Any]) -> tuple[list[Message], list[Any] | None]:
        """The messages and tools of a record. Raises :class:`DataError` without saying where."""
        messages = _value(record, self.messages, option="--messages-key")
        if not isinstance(messages, list) or not messages:
            raise DataError(f"the value of {self.messages!r} is {_shown(messages)}, not a list of messages")
        for number, message in enumerate(messages, start=1):
            _check_message(number, message)
        if all(message["role"] != "assistant" for message in messages):
            raise DataError("no message is the assistant's, so there is nothing to learn from it")
        tools = record.get(self.tools)
        if tools is not None and not isinstance(tools, list):
            raise DataError(f"the value of {self.tools!r} is {_shown(tools)}, not a list")
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

    def read(self, record: dict[str, Any]) -> tuple[list[Message], None]:
        """The two or three messages of a record. Raises :class:`DataError` without saying where."""
        messages = [
            {"role": "user", "content": _text(record, self.question, option="--question-key")},
            {"role": "assistant", "content": _text(record, self.answer, option="--answer-key")},
        ]
        if self.system is not None and _value(record, self.system, option="--system-key") is not None:
            messages.insert(0, {"role": "system", "content": _text(record, self.system, option="--system-key")})
        return list(messages), None


def read_conversations(
    path: Path, keys: MessageKeys | QuestionKeys, *, on_error: Callable[[DataError, int], None]
) -> Iterator[Conversation]:
    """The conversations of a file with one JSON object a line; blank lines are passed over.

    ``on_error`` is told of a record that cannot be used, with the bytes that it takes; if it returns, the next follows.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.isspace():
                continue
            where = f"{path}:{number}"
            try:
                messages, tools = keys.read(_object(line))
            except DataError as error:
                on_error(DataError(f"{where}: {error}"), len(line))
                continue
            yield Conversation(messages, tools, where, len(line))


def _object(line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"is not UTF-8: byte {line[error.start]:#04x} at offset {error.start}") from error
    except json.JSONDecodeError as error:
        raise DataError(
            f"is not JSON: {error.msg} at column {error.colno}; each line must be one whole JSON object"
        ) from error
    except (ValueError, RecursionError) as error:  # a number too long, or nesting too deep, for Python
        raise DataError(f"cannot be read as JSON: {error}") from error
    if not isinstance(record, dict):
        raise DataError("is JSON, but not an object; each line must be one whole JSON object")
    return record


def _value(record: dict[str, Any], key: str, *, option: str) -> Any:
    if key not in record:
        keys = ", ".join(map(repr, record)) or "none"
        raise DataError(f"has no key {key!r} (its keys: {keys}); choose one with {option}")
    return record[key]


def _text(record: dict[str, Any], key: str, *, option: str) -> str:
    text = _value(record, key, option=option)
    if not isinstance(text, str):
        raise DataError(f"the value of {key!r} is {_shown(text)}, not a string")
    return text


def _check_message(number: int, message: Any) -> None:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise DataError(
            f'message {number} is {_shown(message)}; a message is {{"role": "user", "content": "…"}}, with the roles '
            "that the chat template knows"
        )
    content = message.get("content")
    if content is not None and not isinstance(content, str | list):
        raise DataError(f"the content of message {number} is {_shown(content)}, not a string")


def _shown(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)[:40]
