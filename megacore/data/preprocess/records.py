"""Records as files have them, each a JSON object, a row or a text, and what is looked up in them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import orjson

from megacore.errors import DataError


class Record(NamedTuple):
    """One record: its place among the lines or rows of its piece, and its values by key."""

    position: int
    values: Mapping[str, Any]


class Document(NamedTuple):
    """A record's place, and its text under each of several keys, in their order."""

    position: int
    texts: tuple[str, ...]


class Problem(NamedTuple):
    """A record that cannot be taken: its place, and why."""

    position: int
    message: str


def json_record(line: bytes, *, position: int) -> Record | Problem:
    """The object in a line of JSON; a byte order mark before it is dropped."""
    try:
        try:
            values = orjson.loads(line)
        except orjson.JSONDecodeError:
            # Python's own reader takes a little more (a byte order mark, NaN) and says better what is wrong.
            values = _load(_decode(line.rstrip()))
        if not isinstance(values, dict):
            raise DataError("is JSON, but not an object; each line must be one whole JSON object")
    except DataError as error:
        return Problem(position, str(error))
    return Record(position, values)


def text_record(content: bytes, keys: Sequence[str]) -> Record | Problem:
    """Plain text, which is the value of every key; a byte order mark is dropped."""
    try:
        return Record(0, dict.fromkeys(keys, _decode(content)))
    except DataError as error:
        return Problem(0, str(error))


def document(record: Record, keys: Sequence[str]) -> Document | Problem:
    """The texts of a record under ``keys``."""
    try:
        texts = tuple([text(record.values, key, option="--json-key") for key in keys])
        for of_key in texts:
            require_encodable(of_key)
    except DataError as error:
        return Problem(record.position, str(error))
    return Document(record.position, texts)


def value(values: Mapping[str, Any], key: str, *, option: str) -> Any:
    """What a record has under ``key``. Raises :class:`DataError`, without saying where, when it has no such key.

    ``option`` is the one to choose another key with.
    """
    try:
        return values[key]
    except KeyError:
        keys = ", ".join(map(repr, values)) or "none"
        raise DataError(f"has no key {key!r} (its keys: {keys}); choose one with {option}") from None


def text(values: Mapping[str, Any], key: str, *, option: str) -> str:
    """The text that a record has under ``key``; raises as :func:`value` does."""
    found = value(values, key, option=option)
    if not isinstance(found, str):
        raise DataError(
            f"the value of {key!r} is {shown(found)}, not a string; remove the record, or choose another key with "
            f"{option}"
        )
    return found


def require_encodable(string: str) -> None:
    """Raises :class:`DataError` for what JSON can spell and no text holds, such as ``"\\ud800"``: it has no UTF-8."""
    if string.isascii():
        return
    try:
        string.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"the text has half of a surrogate pair ({string[error.start]!r}); write the whole pair, or U+FFFD in its "
            "place"
        ) from error


def shown(found: Any) -> str:
    """The beginning of a value as JSON, for a message."""
    return json.dumps(found, ensure_ascii=False, default=str)[:40]


def _load(line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(
            f"is not JSON: {error.msg} at column {error.colno}; each line must be one whole JSON object"
        ) from error
    except (ValueError, RecursionError) as error:  # a number too long, or nesting too deep, for Python
        raise DataError(f"cannot be read as JSON: {error}") from error


def _decode(content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"is not UTF-8: byte {content[error.start]:#04x} at offset {error.start}; convert the file"
        ) from error
