"""Input files, cut into pieces that worker processes read by themselves."""

from __future__ import annotations

import glob
import importlib
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from megacore.data.preprocess.records import Problem, Record, json_record, text_record
from megacore.errors import DataError

PIECE_BYTES = 1 << 20
"""The size of a piece: large enough to keep a process busy, small enough for memory to stay small."""

_READ_BYTES = {".gz": 1 << 13, ".zst": 1 << 8}
"""Number of compressed bytes to read at once, which become about 8 MiB at most: deflate expands at most 1032 times, and
Zstandard makes a block of 128 KiB of four bytes; its decompressor has no limit on its output."""

_UNSUPPORTED = {".bz2", ".xz", ".zip", ".7z", ".tar", ".tgz", ".lz4", ".arrow"}
"""File types that would otherwise be read as plain text."""


class Reading(NamedTuple):
    """The records of a piece, and its number of lines or rows with blank ones."""

    records: list[Record | Problem]
    num_positions: int


@dataclass(frozen=True)
class Piece(ABC):
    """A part of an input file, which is read only where it is needed."""

    path: Path
    num_input_bytes: int
    """Number of bytes of the file that the piece stands for, for progress."""
    is_first: bool

    def read(self, keys: Sequence[str]) -> Reading:
        """Read the records and their values of ``keys`` at least. Raises :class:`DataError` if the file is damaged."""
        with _input_errors(self.path):
            return self._read(keys)

    @abstractmethod
    def _read(self, keys: Sequence[str]) -> Reading: ...

    def where(self, position: int) -> str:
        """Return a location for messages; ``position`` counts from 0 over all pieces of the file."""
        return f"{self.path}:{position + 1}"


@dataclass(frozen=True)
class LineRange(Piece):
    """The JSON lines that begin in ``[start, start + num_input_bytes)`` of a file; the last may end beyond."""

    start: int

    def _read(self, keys: Sequence[str]) -> Reading:
        stop = self.start + self.num_input_bytes
        with self.path.open("rb") as file:
            if self.start == 0:
                content = file.read(stop)
            else:
                # A line begins after a byte that ends one.
                file.seek(self.start - 1)
                _, newline, begun = file.read(stop - self.start).partition(b"\n")
                if not newline:
                    return Reading([], 0)
                content = begun + file.read(1)
            if content and not content.endswith(b"\n"):
                content += file.readline()
        return _json_lines(content)


@dataclass(frozen=True)
class LineBlock(Piece):
    """JSON lines of a compressed file, which were read already."""

    content: bytes

    def _read(self, keys: Sequence[str]) -> Reading:
        return _json_lines(self.content)


@dataclass(frozen=True)
class WholeText(Piece):
    """A file of plain text, compressed or not, which is one record with the text under every key."""

    def _read(self, keys: Sequence[str]) -> Reading:
        if (suffix := self.path.suffix.lower()) in _COMPRESSED:
            content = b"".join(block for block, _ in _decompressed(self.path, suffix))
        else:
            content = self.path.read_bytes()
        return Reading([text_record(content, keys)], 1)

    def where(self, position: int) -> str:
        return str(self.path)


@dataclass(frozen=True)
class RowGroup(Piece):
    """A row group of a parquet file, of which only the requested columns are read."""

    group: int

    def _read(self, keys: Sequence[str]) -> Reading:
        file = _parquet_file(self.path)
        try:
            names = file.schema_arrow.names
            rows = file.read_row_group(self.group, columns=[key for key in keys if key in names])
            # The error message about a missing key names all columns.
            missing = {} if set(keys) <= set(names) else dict.fromkeys(names)
            records: list[Record | Problem] = [
                Record(position, missing | row) for position, row in enumerate(rows.to_pylist())
            ]
        except (OSError, ValueError) as error:  # ValueErrors are pyarrow's own, and text that is not UTF-8
            raise DataError(f"{self.path}: row group {self.group + 1} is damaged: {error}") from error
        return Reading(records, rows.num_rows)

    def where(self, position: int) -> str:
        return f"{self.path}: row {position + 1}"


def expand(patterns: Iterable[str | Path]) -> list[Path]:
    """Return the files of paths and patterns (``data/*.jsonl``, ``**`` for any depth); those of a pattern are sorted.

    Raises:
        DataError: A path or pattern matches no file, or something other than a regular file.
    """
    files: list[Path] = []
    for pattern in map(Path, patterns):
        with _input_errors(pattern):
            files += _expanded(pattern)
    return files


def _expanded(pattern: Path) -> list[Path]:
    if pattern.is_file():
        return [pattern]
    if pattern.is_dir():
        raise DataError(f"{pattern}: is a directory, not a file")
    if pattern.exists():
        raise DataError(
            f"{pattern}: is not a regular file but a pipe or device; inputs are read in parts, by several processes: "
            "write it into a file first"
        )
    if not glob.has_magic(str(pattern)):
        raise DataError(f"{pattern}: no such file")
    # Path.glob takes no absolute pattern.
    names = glob.glob(str(pattern), recursive=True)  # noqa: PTH207
    found = sorted(path for path in map(Path, names) if path.is_file())
    if not found:
        raise DataError(f"{pattern}: no file matches this pattern")
    return found


def total_size(paths: Iterable[Path]) -> int:
    """Return the bytes of all files. Raises :class:`DataError` if one has disappeared."""
    total = 0
    for path in paths:
        with _input_errors(path):
            total += path.stat().st_size
    return total


def pieces(path: Path, text_keys: Sequence[str] = ()) -> Iterator[Piece]:
    """Yield the pieces of one file, in order; ``text_keys`` are string columns that a parquet file must have.

    Raises:
        DataError: The file is damaged, cannot be read, is of an unsupported type, has no such columns, or needs a
            package that is not installed.
    """
    with _input_errors(path):
        yield from _pieces(path, text_keys)


def _pieces(path: Path, text_keys: Sequence[str]) -> Iterator[Piece]:
    size = path.stat().st_size
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    if suffixes and suffixes[-1] in _UNSUPPORTED:
        raise DataError(f"{path}: {suffixes[-1]} is not read: unpack it, or pack it as .gz or .zst instead")
    compressed = suffixes[-1] if suffixes and suffixes[-1] in _COMPRESSED else None
    kind = (suffixes[:-1] if compressed else suffixes)[-1:]
    if kind == [".parquet"]:
        yield from _row_groups(path, text_keys, size)
    elif kind not in ([".jsonl"], [".ndjson"], [".json"]):
        yield WholeText(path, size, True)
    elif compressed:
        yield from _line_blocks(path, compressed)
    else:
        for start in range(0, size, PIECE_BYTES):
            yield LineRange(path, min(PIECE_BYTES, size - start), start == 0, start)


@contextmanager
def _input_errors(path: Path) -> Iterator[None]:
    """Turn an ``OSError`` into a :class:`DataError` that names the file."""
    try:
        yield
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error


def _json_lines(content: bytes) -> Reading:
    lines = content.split(b"\n")
    if not lines[-1]:
        lines.pop()
    records = [json_record(line, position=i) for i, line in enumerate(lines) if line and not line.isspace()]
    return Reading(records, len(lines))


def _line_blocks(path: Path, suffix: str) -> Iterator[LineBlock]:
    """Yield whole lines, about :data:`PIECE_BYTES` at a time."""
    unfinished: list[bytes] = []
    num_bytes = num_read = 0
    is_first = True
    for block, num_block_bytes in _decompressed(path, suffix):
        num_read += num_block_bytes
        unfinished.append(block)
        num_bytes += len(block)
        if num_bytes >= PIECE_BYTES and b"\n" in block:
            whole, _, rest = b"".join(unfinished).rpartition(b"\n")
            yield LineBlock(path, num_read, is_first, whole + b"\n")
            is_first = False
            unfinished, num_bytes, num_read = [rest], len(rest), 0
    yield LineBlock(path, num_read, is_first, b"".join(unfinished))


def _decompressed(path: Path, suffix: str) -> Iterator[tuple[bytes, int]]:
    """Yield the content of a file of one or several compressed members, with the compressed bytes of each part."""
    new_decompressor, errors = _COMPRESSED[suffix]()
    decompressor, has_begun, follows_another = new_decompressor(), False, False
    num_read = 0
    with path.open("rb") as file:
        while block := file.read(_READ_BYTES[suffix]):
            num_read += len(block)
            while block:
                if follows_another and not has_begun and not (block := block.lstrip(b"\0")):
                    break  # tape archives are padded with zeros
                try:
                    content = decompressor.decompress(block)
                except errors as error:
                    raise DataError(f"{path}: is damaged, or not compressed as its name says: {error}") from error
                yield content, num_read
                num_read, has_begun, block = 0, True, b""
                if decompressor.eof:
                    block = decompressor.unused_data
                    decompressor, has_begun, follows_another = new_decompressor(), False, True
    if has_begun:
        raise DataError(f"{path}: is truncated: it was not written or copied as a whole")
    yield b"", num_read


def _gzip() -> tuple[Any, type[Exception]]:
    return lambda: zlib.decompressobj(wbits=31), zlib.error


def _zstandard() -> tuple[Any, type[Exception]]:
    zstandard = importlib.import_module("zstandard")
    # The largest window that `zstd --long=31` writes.
    return lambda: zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj(), zstandard.ZstdError


_COMPRESSED = {".gz": _gzip, ".zst": _zstandard}


def _row_groups(path: Path, text_keys: Sequence[str], size: int) -> Iterator[RowGroup]:
    file = _parquet_file(path)
    schema = file.schema_arrow
    for key in text_keys:
        if key not in schema.names:
            columns = ", ".join(map(repr, schema.names)) or "none"
            raise DataError(f"{path}: has no column {key!r} (its columns: {columns}); choose one with --json-key")
        if str(schema.field(key).type).removeprefix("dictionary<values=").partition(",")[0] not in _TEXT_TYPES:
            raise DataError(
                f"{path}: column {key!r} is of type {schema.field(key).type}, not string; choose another one with "
                f"--json-key"
            )
    for group in range(file.num_row_groups):
        # With the last row group the whole file is counted as read.
        start, stop = (size * number // file.num_row_groups for number in (group, group + 1))
        yield RowGroup(path, stop - start, group == 0, group)


_TEXT_TYPES = ("string", "large_string", "string_view")
"""Types of parquet columns with text, plain or encoded by a dictionary."""


def _parquet_file(path: Path) -> Any:
    try:
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise DataError(f"{path}: reading parquet needs pyarrow: pip install 'megacore[parquet]'") from error
    try:
        return parquet.ParquetFile(path)
    except (OSError, ValueError) as error:  # pyarrow's own errors are ValueErrors
        raise DataError(f"{path}: cannot be read as parquet: {error}") from error
