"""Documents as files have them: a JSON object with texts, or plain text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import orjson


class Document(NamedTuple):
    """One record: its place among the lines or rows of its piece, and its text under each key, in the keys' order."""

    position: int
    texts: tuple[str, ...]


class Problem(NamedTuple):
    """A record that cannot be taken: its place, and why."""

    position: int
    message: str


def json_document(line: bytes, keys: Sequence[str], *, position: int) -> Document | Problem:
    """The texts in a line of JSON; a byte order mark before it is dropped."""
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError:
        # Python's own reader takes a little more (a byte order mark, NaN) and says better what is wrong.
        try:
            record = _load(_decode(line.rstrip()))
        except _MalformedRecordError as error:
            return Problem(position, str(error))
    try:
        return Document(position, tuple([_text_in(record, key) for key in keys]))
    except _MalformedRecordError as error:
        return Problem(position, str(error))


def text_document(content: bytes, *, num_texts: int) -> Document | Problem:
    """Plain text, which is one document, the same under every key; a byte order mark is dropped."""
    try:
        return Document(0, (_decode(content),) * num_texts)
    except _MalformedRecordError as error:
        return Problem(0, str(error))


class _MalformedRecordError(Exception):
    """Says what is wrong with a record, and what to do."""


def _load(line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise _MalformedRecordError(
            f"is not JSON: {error.msg} at column {error.colno}; each line must be one whole JSON object"
        ) from error
    except (ValueError, RecursionError) as error:  # a number too long, or nesting too deep, for Python
        raise _MalformedRecordError(f"cannot be read as JSON: {error}") from error


def _text_in(record: Any, key: str) -> str:
    if not isinstance(record, dict):
        raise _MalformedRecordError("is JSON, but not an object; each line must be one whole JSON object")
    if key not in record:
        keys = ", ".join(map(repr, record)) or "none"
        raise _MalformedRecordError(f"has no key {key!r} (its keys: {keys}); choose one with --json-key")
    text = record[key]
    if not isinstance(text, str):
        raise _MalformedRecordError(
            f"the value of {key!r} is {json.dumps(text)[:40]}, not a string; "
            f"remove the line, or choose another key with --json-key"
        )
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            # JSON can spell what no text holds, such as "\ud800"; no tokenizer takes it.
            raise _MalformedRecordError(
                f"the text has half of a surrogate pair ({text[error.start]!r}); "
                f"write the whole pair, or U+FFFD in its place"
            ) from error
    return text


def _decode(content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _MalformedRecordError(
            f"is not UTF-8: byte {content[error.start]:#04x} at offset {error.start}; convert the file"
        ) from error
