"""The files that ``tokenize`` takes, cut into pieces that processes read on their own."""

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
"""Enough for a process to be busy for a while, little enough for memory to stay small."""

_READ_AT_ONCE = {".gz": 1 << 13, ".zst": 1 << 8}
"""Of a compressed file, so that it becomes some 8 MiB at most. Where all is alike deflate makes 1032 bytes of one, and
Zstandard a block of 128 KiB of four; the latter's decompressor takes no limit."""

_NOT_READ = {".bz2", ".xz", ".zip", ".7z", ".tar", ".tgz", ".lz4", ".arrow"}
"""What somebody may name, and would not want to be taken for text."""


class Reading(NamedTuple):
    """What a piece holds, and how many places (lines, rows) it has, blank ones included."""

    records: list[Record | Problem]
    num_positions: int


@dataclass(frozen=True)
class Piece(ABC):
    """A part of an input, which says where it is and is read where it is needed.

    Attributes:
        path: of the file.
        num_input_bytes: what the piece is of the file, for progress.
        is_first: whether it begins a file.
    """

    path: Path
    num_input_bytes: int
    is_first: bool

    def read(self, keys: Sequence[str]) -> Reading:
        """The records, with what they have under ``keys`` at least.

        Raises:
            DataError: when the file is damaged or cannot be read.
        """
        with _input_errors(self.path):
            return self._read(keys)

    @abstractmethod
    def _read(self, keys: Sequence[str]) -> Reading: ...

    def where(self, position: int) -> str:
        """A place for people: ``position`` counts from 0 over all pieces of the file."""
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
                # A line begins where the byte before ends one.
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
    """JSON lines that were read already, of a compressed file."""

    content: bytes

    def _read(self, keys: Sequence[str]) -> Reading:
        return _json_lines(self.content)


@dataclass(frozen=True)
class WholeText(Piece):
    """A file of plain text, compressed or not, which is one record: the text, under any key."""

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
    """A row group of a parquet file, of which only the columns that are asked for, and are there, are read."""

    group: int

    def _read(self, keys: Sequence[str]) -> Reading:
        file = _parquet_file(self.path)
        try:
            names = file.schema_arrow.names
            rows = file.read_row_group(self.group, columns=[key for key in keys if key in names])
            # Where a key is not there, a message about that names all columns.
            others = {} if set(keys) <= set(names) else dict.fromkeys(names)
            records: list[Record | Problem] = [
                Record(position, others | row) for position, row in enumerate(rows.to_pylist())
            ]
        except (OSError, ValueError) as error:  # ValueErrors are pyarrow's own, and text that is not UTF-8
            raise DataError(f"{self.path}: row group {self.group + 1} is damaged: {error}") from error
        return Reading(records, rows.num_rows)

    def where(self, position: int) -> str:
        return f"{self.path}: row {position + 1}"


def expand(patterns: Iterable[str | Path]) -> list[Path]:
    """The files that paths and patterns (``data/*.jsonl``, ``**`` for any depth) stand for; a pattern's are sorted.

    Raises:
        DataError: when one stands for no file, or for what is no regular file.
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
    """The bytes of all these files. Raises :class:`DataError` where one cannot be found any more."""
    total = 0
    for path in paths:
        with _input_errors(path):
            total += path.stat().st_size
    return total


def pieces(path: Path, text_keys: Sequence[str] = ()) -> Iterator[Piece]:
    """The pieces of one file, in order.

    Args:
        text_keys: the columns that a parquet file must have, of strings.

    Raises:
        DataError: the file is damaged, cannot be read, is of a kind that is not read, has no such columns, or needs a
            package that is not installed.
    """
    with _input_errors(path):
        yield from _pieces(path, text_keys)


def _pieces(path: Path, text_keys: Sequence[str]) -> Iterator[Piece]:
    size = path.stat().st_size
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    if suffixes and suffixes[-1] in _NOT_READ:
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
    """Turn the system's refusal to read an input into an error that says which."""
    try:
        yield
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error


def _json_lines(content: bytes) -> Reading:
    lines = content.split(b"\n")
    if not lines[-1]:
        lines.pop()
    records = [json_record(line, position=position) for position, line in enumerate(lines) if not _is_blank(line)]
    return Reading(records, len(lines))


def _is_blank(line: bytes) -> bool:
    return not line or line.isspace()


def _line_blocks(path: Path, suffix: str) -> Iterator[LineBlock]:
    """Whole lines, some :data:`PIECE_BYTES` of them at a time."""
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
    """What a file of one or several compressed members holds, and how many bytes of the file each part took.

    Raises:
        DataError: the file is damaged or ends too early.
    """
    new_decompressor, errors = _COMPRESSED[suffix]()
    decompressor, has_begun, follows_another = new_decompressor(), False, False
    num_read = 0
    with path.open("rb") as file:
        while block := file.read(_READ_AT_ONCE[suffix]):
            num_read += len(block)
            while block:
                if follows_another and not has_begun and not (block := block.lstrip(b"\0")):
                    break  # zeros may fill up the last block of a tape
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
        raise DataError(f"{path}: ends in the middle: it was not written or copied as a whole")
    yield b"", num_read


def _gzip() -> tuple[Any, type[Exception]]:
    return lambda: zlib.decompressobj(wbits=31), zlib.error


def _zstandard() -> tuple[Any, type[Exception]]:
    zstandard = importlib.import_module("zstandard")
    # As large a window as `zstd --long=31` writes.
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
        # Where the last one ends the whole file is read.
        start, stop = (size * number // file.num_row_groups for number in (group, group + 1))
        yield RowGroup(path, stop - start, group == 0, group)


_TEXT_TYPES = ("string", "large_string", "string_view")
"""Of parquet's columns, those with text, each text by itself or by its number in a dictionary."""


def _parquet_file(path: Path) -> Any:
    try:
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise DataError(f"{path}: reading parquet needs pyarrow: pip install 'megacore[parquet]'") from error
    try:
        return parquet.ParquetFile(path)
    except (OSError, ValueError) as error:  # pyarrow's own errors are ValueErrors
        raise DataError(f"{path}: cannot be read as parquet: {error}") from error
