"""Documents in text files: JSON lines, columns of Parquet files, plain text; the first and the last also compressed."""

from __future__ import annotations

import glob
import gzip
import io
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

import orjson

from megacore.errors import DataError

_CHUNK_BYTES = 1 << 20
"""What is parsed and encoded at once."""

_ROWS = 1024
"""Likewise, of a Parquet file."""


@dataclass(frozen=True)
class Chunk:
    """Some consecutive documents of a file, as they lie there.

    Attributes:
        path: of the file.
        kind: ``"lines"``, JSON objects; ``"text"``, a whole file; or ``"rows"`` of a table.
        content: what lies there: bytes, or of a table the texts.
        first: the number of the first line or row, from 1.
        num_input_bytes: of the file as it is, compressed or not.
    """

    path: Path
    kind: Literal["lines", "text", "rows"]
    content: bytes | list[str | None]
    first: int
    num_input_bytes: int


@dataclass
class Documents:
    """What a chunk holds.

    Attributes:
        texts: of the documents.
        places: where each stands, for messages.
        num_text_bytes: of all texts, in UTF-8.
        errors: of what could not be read.
    """

    texts: list[str] = field(default_factory=list)
    places: list[str] = field(default_factory=list)
    num_text_bytes: int = 0
    errors: list[DataError] = field(default_factory=list)

    def add(self, text: str, place: str) -> None:
        try:
            self.num_text_bytes += len(text) if text.isascii() else len(text.encode())
        except UnicodeEncodeError as error:
            # JSON can spell what no text holds, such as "\ud800"; no tokenizer takes it.
            raise DataError(
                f"{place}: the text has half of a surrogate pair ({text[error.start]!r}); "
                f"write the whole pair, or U+FFFD in its place"
            ) from error
        self.texts.append(text)
        self.places.append(place)


def input_files(inputs: str | Path | Iterable[str | Path]) -> list[Path]:
    """The files that are meant, in order; a name that is no file's and has ``*``, ``?`` or ``[`` is a pattern.

    Raises:
        DataError: there is no such file.
    """
    files = []
    for path in map(Path, [inputs] if isinstance(inputs, str | Path) else inputs):
        if path.is_file():
            files.append(path)
        elif path.is_dir():
            raise DataError(f"{path}: is a directory, not a file")
        elif glob.has_magic(str(path)):
            found = sorted(Path(name) for name in glob.glob(str(path), recursive=True))  # noqa: PTH207  patterns may be absolute
            files += (named := [file for file in found if file.is_file()])
            if not named:
                raise DataError(f"{path}: no file has such a name")
        else:
            raise DataError(f"{path}: no such file")
    return files


def read_chunks(path: Path, json_key: str) -> Iterator[Chunk]:
    """Read a file a chunk at a time; what kind it is of follows from its name.

    ``.jsonl`` and ``.json`` are JSON lines, ``.parquet`` is a table with a column ``json_key``, and any other file is
    plain text and a single document. ``.gz`` and ``.zst`` behind the ending say that the file is compressed.

    Raises:
        DataError: the file is damaged, or has no such column; or a package to read it with is missing.
    """
    suffixes = [suffix for suffix in path.suffixes if suffix not in (".gz", ".zst")]
    ending = suffixes[-1] if suffixes else ""
    if ending == ".parquet":
        yield from _table(path, json_key)
        return
    with _opened(path) as (stream, raw):
        position = 0

        def done() -> int:
            nonlocal position
            before, position = position, raw.tell()
            return position - before

        if ending not in (".jsonl", ".json"):
            yield Chunk(path, "text", stream.read(), 1, done())
            return
        number = 1
        while block := stream.read(_CHUNK_BYTES):
            block += stream.readline()
            yield Chunk(path, "lines", block, number, done())
            number += block.count(b"\n")


def documents_of(chunk: Chunk, json_key: str) -> Documents:
    """The documents in a chunk, blank lines left out, with the errors of those that cannot be read."""
    documents = Documents()
    for place, content in _pieces(chunk):
        try:
            documents.add(_text_of(content, json_key, place), place)
        except DataError as error:
            documents.errors.append(error)
    return documents


def _pieces(chunk: Chunk) -> Iterator[tuple[str, bytes | str | None]]:
    """Each document as it lies there, and its place; a plain text comes as a string."""
    if isinstance(chunk.content, list):
        for number, text in enumerate(chunk.content, start=chunk.first):
            yield f"{chunk.path}: row {number}", text
    elif chunk.kind == "text":
        yield str(chunk.path), _decoded(chunk.content, str(chunk.path))
    else:
        for number, line in enumerate(chunk.content.split(b"\n"), start=chunk.first):
            if line and not line.isspace():
                yield f"{chunk.path}:{number}", line


def _text_of(content: bytes | str | None, json_key: str, place: str) -> str:
    if isinstance(content, str):
        return content
    if content is None:
        raise DataError(f"{place}: has no value in the column {json_key!r}")
    try:
        text = orjson.loads(content)[json_key]
    except (ValueError, KeyError, TypeError):
        text = None
    # What the quick reader does not take, the thorough one takes or explains.
    return text if isinstance(text, str) else _text_in(_decoded(content.rstrip(), place), json_key, place)


def _text_in(line: str, json_key: str, place: str) -> str:
    try:
        record: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{place}: is not JSON: {error.msg} at column {error.colno}; each line must be one whole JSON object"
        ) from error
    except (ValueError, RecursionError) as error:  # a number too long, or nesting too deep, for Python
        raise DataError(f"{place}: cannot be read as JSON: {error}") from error
    if not isinstance(record, dict):
        raise DataError(f"{place}: is JSON, but not an object; each line must be one whole JSON object")
    if json_key not in record:
        keys = ", ".join(map(repr, record)) or "none"
        raise DataError(f"{place}: has no key {json_key!r} (its keys: {keys}); choose one with --json-key")
    text = record[json_key]
    if not isinstance(text, str):
        raise DataError(
            f"{place}: the value of {json_key!r} is {json.dumps(text)[:40]}, not a string; "
            f"remove the line, or choose another key with --json-key"
        )
    return text


def _decoded(content: bytes, place: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{place}: is not UTF-8: byte {content[error.start]:#04x} at offset {error.start}; convert the file"
        ) from error


@contextmanager
def _opened(path: Path) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """The content of a file, and the file itself, whose position tells how far one has read."""
    with path.open("rb") as raw:
        if path.suffix == ".gz":
            try:
                with gzip.open(raw) as stream:
                    yield cast(BinaryIO, stream), raw
            except (gzip.BadGzipFile, EOFError, zlib.error) as error:
                raise DataError(f"{path}: is damaged, or not compressed by gzip: {error}") from error
        elif path.suffix == ".zst":
            import zstandard

            try:
                with zstandard.open(raw, "rb", closefd=False) as stream:
                    yield cast(BinaryIO, io.BufferedReader(stream)), raw
            except zstandard.ZstdError as error:
                raise DataError(f"{path}: is damaged, or not compressed by zstd: {error}") from error
        else:
            yield raw, raw


def _table(path: Path, column: str) -> Iterator[Chunk]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise DataError(
            f'{path}: the package pyarrow reads Parquet files, and is not installed: pip install "megacore[parquet]"'
        ) from error

    try:
        table = parquet.ParquetFile(path)
        names: Sequence[str] = table.schema_arrow.names
        if column not in names:
            raise DataError(f"{path}: has no column {column!r} (it has {', '.join(names)}); choose with --json-key")
        first, size = 1, path.stat().st_size
        for batch in table.iter_batches(_ROWS, columns=[column]):
            texts = batch.column(0).to_pylist()
            if any(not isinstance(text, str | None) for text in texts):
                raise DataError(f"{path}: the column {column!r} holds {batch.schema.types[0]}, not text")
            done = [size * number // table.metadata.num_rows for number in (first - 1, first - 1 + len(texts))]
            yield Chunk(path, "rows", texts, first, done[1] - done[0])
            first += len(texts)
    except ArrowException as error:
        raise DataError(f"{path}: cannot be read as a Parquet file: {error}") from error
