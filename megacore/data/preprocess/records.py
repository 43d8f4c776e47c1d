"""Records of input files (a JSON object, a row or a text), and the lookup of their values."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import orjson

from megacore.errors import DataError


class Record(NamedTuple):
    """A record: its line or row in the piece, and its values by key."""

    position: int
    values: Mapping[str, Any]


class DocumentTexts(NamedTuple):
    """A record's line or row in the piece, and its text under each key, in their order."""

    position: int
    texts: tuple[str, ...]


class Problem(NamedTuple):
    """A malformed record: its line or row in the piece, and the reason."""

    position: int
    message: str


def json_record(line: bytes, *, position: int) -> Record | Problem:
    """Parse a line of JSON; a byte order mark before it is dropped."""
    try:
        try:
            values = orjson.loads(line)
        except orjson.JSONDecodeError:
            # Python's parser accepts a little more (a byte order mark, NaN) and has better messages.
            values = _load(_decode(line.rstrip()))
        if not isinstance(values, dict):
            raise DataError("is JSON, but not an object; each line must be one whole JSON object")
    except DataError as error:
        return Problem(position, str(error))
    return Record(position, values)


def text_record(content: bytes, keys: Sequence[str]) -> Record | Problem:
    """Return a record with plain text as the value of every key; a byte order mark is dropped."""
    try:
        return Record(0, dict.fromkeys(keys, _decode(content)))
    except DataError as error:
        return Problem(0, str(error))


def extract_texts(record: Record, keys: Sequence[str]) -> DocumentTexts | Problem:
    """Return the texts of a record under ``keys``."""
    try:
        texts = tuple([lookup_text(record.values, key, option="--json-key") for key in keys])
        for text in texts:
            require_encodable(text)
    except DataError as error:
        return Problem(record.position, str(error))
    return DocumentTexts(record.position, texts)


def lookup(values: Mapping[str, Any], key: str, *, option: str) -> Any:
    """Return the value of ``key``. Raises :class:`DataError`, without file and line, if there is no such key.

    ``option`` is the command-line option that selects the key.
    """
    try:
        return values[key]
    except KeyError:
        keys = ", ".join(map(repr, values)) or "none"
        raise DataError(f"has no key {key!r} (its keys: {keys}); choose one with {option}") from None


def lookup_text(values: Mapping[str, Any], key: str, *, option: str) -> str:
    """Return the text of ``key``. Raises :class:`DataError` as :func:`lookup` does, or if it is not a string."""
    value = lookup(values, key, option=option)
    if not isinstance(value, str):
        raise DataError(
            f"the value of {key!r} is {abbreviated(value)}, not a string; remove the record, or choose another key "
            f"with {option}"
        )
    return value


def require_encodable(string: str) -> None:
    """Raise :class:`DataError` for half of a surrogate pair, which JSON can spell and UTF-8 cannot encode."""
    if string.isascii():
        return
    try:
        string.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"the text has half of a surrogate pair ({string[error.start]!r}); write the whole pair, or U+FFFD in its "
            "place"
        ) from error


def abbreviated(value: Any) -> str:
    """Return the beginning of a value as JSON, for a message."""
    return json.dumps(value, ensure_ascii=False, default=str)[:40]


def _load(line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(
            f"is not JSON: {error.msg} at column {error.colno}; each line must be one whole JSON object"
        ) from error
    except (ValueError, RecursionError) as error:  # a number too long or nesting too deep for Python
        raise DataError(f"cannot be read as JSON: {error}") from error


def _decode(content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"is not UTF-8: byte {content[error.start]:#04x} at offset {error.start}; convert the file"
        ) from error
