"""The indexed dataset: token ids in ``PREFIX.bin``, the beginning of each document in ``PREFIX.idx``.

The format is Megatron-LM's memory-mapped one (``MMapIndexedDataset``), byte for byte, so that either program reads the
other's datasets. Everything is little endian. ``.bin`` holds the ids of all sequences back to back. ``.idx`` is

====================  =================  ===========================================================================
magic                 9 bytes            ``MMIDIDX\\0\\0``
version               uint64             1
dtype code            uint8              type of an id, see :data:`DTYPE_CODES`
num_sequences         uint64
num_boundaries        uint64             number of documents + 1
sizes                 int32[sequences]   number of ids of each sequence
pointers              int64[sequences]   offset of each sequence in ``.bin``, in bytes
document indices      int64[boundaries]  document ``d`` is the sequences ``[indices[d], indices[d + 1])``
====================  =================  ===========================================================================
"""

from __future__ import annotations

import struct
from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from megacore.atomic_output import StagedFiles, output_errors
from megacore.errors import DataError

DTYPE_CODES: dict[np.dtype[Any], int] = {
    np.dtype("<u1"): 1,
    np.dtype("<i1"): 2,
    np.dtype("<i2"): 3,
    np.dtype("<i4"): 4,
    np.dtype("<i8"): 5,
    np.dtype("<u2"): 8,
}
"""The format's codes of integer types. 6 and 7 are its floating point types, which hold no token ids."""

_MAGIC = b"MMIDIDX\x00\x00"
_OLD_MAGIC = b"TNTIDX\x00\x00"
_VERSION = 1
_HEADER = struct.Struct("<9sQBQQ")
_LONGEST_SEQUENCE = 2**31 - 1
_CHECK_BLOCK = 1 << 20
_COPIED_AT_ONCE = 1 << 22


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Return the type that stores the ids of a vocabulary: as in Megatron-LM, uint16 below 65500 ids, else int32."""
    return np.dtype("<u2") if vocab_size < 65500 else np.dtype("<i4")


class IndexedDatasetWriter:
    """Writes an indexed dataset document by document; used as a context manager.

    >>> with IndexedDatasetWriter("data/train", token_dtype(vocab_size=32000)) as writer:  # doctest: +SKIP
    ...     writer.add_document([5, 6, 7])

    Memory holds no ids, only 12 bytes per document. Until the block ends without an exception, the files are in a
    hidden directory beside the output (:class:`~megacore.atomic_output.StagedFiles`); then they get their names,
    ``.idx`` last. An exception leaves nothing.

    ``files`` are the staged files to add the dataset to; by default it has its own.

    Raises:
        DataError: ``dtype`` is none of the format's integer types, or ids do not fit it.
        OutputError: An output file exists, is being written by another process or cannot be written
            (:class:`DiskFullError` if there is no room).
    """

    def __init__(self, prefix: str | Path, dtype: DTypeLike, *, files: StagedFiles | None = None) -> None:
        self.prefix = Path(prefix)
        self.dtype = np.dtype(dtype).newbyteorder("<")
        if self.dtype not in DTYPE_CODES:
            names = ", ".join(known.name for known in DTYPE_CODES)
            raise DataError(f"{prefix}: token ids are stored as one of {names}, not {self.dtype.name}")
        self._sizes = array("i")
        self._document_indices = array("q", [0])
        self._description: str | None = None
        self._files = files
        self._bin: BinaryIO

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            if self._files is None:
                self._files = stack.enter_context(StagedFiles(self.prefix))
            # A description (.json) left behind by another dataset would be mistaken for this one's.
            self._files.claim(self.prefix, [".bin", ".idx", ".json"])
            with output_errors(self.prefix):
                self._bin = self._open(".bin")
            stack.push(self._finish)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, traceback)

    def add_document(self, *sequences: ArrayLike) -> None:
        """Append one document, usually one sequence of ids, ``[length]``; several sequences stay separable.

        A document without ids is kept, so that document numbers are the caller's, but adds no token to the stream.
        (:func:`megacore.tokenize` skips such documents itself.)
        """
        arrays = [self._stored(sequence) for sequence in sequences]
        for ids in arrays:
            self._check_length(len(ids))
        with output_errors(self.prefix):
            for ids in arrays:
                self._bin.write(ids.data)
                self._sizes.append(len(ids))
        self._document_indices.append(len(self._sizes))

    def add_documents(self, ids: NDArray[Any], lengths: NDArray[Any]) -> None:
        """Append many documents of one sequence each, given their ids back to back and ``[num_documents]`` lengths."""
        assert int(lengths.sum()) == len(ids)
        self._check_length(int(lengths.max(initial=0)))
        stored = self._stored(ids)
        with output_errors(self.prefix):
            self._bin.write(stored.data)
        first = len(self._sizes)
        self._sizes.frombytes(lengths.astype(np.int32).tobytes())
        self._document_indices.frombytes(np.arange(first + 1, len(self._sizes) + 1, dtype=np.int64).tobytes())

    def add_dataset(self, dataset: IndexedDataset, advance: Callable[[int], None] = lambda num_bytes: None) -> None:
        """Append all documents of another dataset; ``advance`` is called with the bytes of ids of each part."""
        for start in range(0, dataset.num_tokens, _COPIED_AT_ONCE):
            ids = dataset.tokens(start, min(start + _COPIED_AT_ONCE, dataset.num_tokens))
            stored = self._stored(ids)
            with output_errors(self.prefix):
                self._bin.write(stored.data)
            advance(ids.nbytes)
        first = len(self._sizes)
        self._sizes.frombytes(dataset.sizes.astype(np.int32).tobytes())
        self._document_indices.frombytes((dataset.document_boundaries()[1:] + first).astype(np.int64).tobytes())

    def describe(self, text: str) -> None:
        """Set the text of ``PREFIX.json``, which appears before the dataset does."""
        self._description = text

    def _check_length(self, length: int) -> None:
        if length > _LONGEST_SEQUENCE:
            raise DataError(f"{self.prefix}: a sequence of {length} ids; the format ends at {_LONGEST_SEQUENCE}")

    def _stored(self, sequence: ArrayLike) -> NDArray[Any]:
        ids = np.asarray(sequence)
        if ids.size == 0:
            return np.empty(0, self.dtype)
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise DataError(f"{self.prefix}: a sequence is a list of integers, not {ids.dtype} of shape {ids.shape}")
        limits = np.iinfo(self.dtype)
        for extreme in (int(ids.min()), int(ids.max())):
            if not limits.min <= extreme <= limits.max:
                raise DataError(
                    f"{self.prefix}: token id {extreme} does not fit {self.dtype.name} ({limits.min} to {limits.max}); "
                    f"choose the dtype by the vocabulary's size, with token_dtype"
                )
        return np.ascontiguousarray(ids, self.dtype)

    def _finish(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Write the description and the index, or discard everything after an exception."""
        if kind is not None:
            # Buffered ids, which are useless now, could not be flushed to a full disk.
            with suppress(OSError):
                self._bin.close()
            return
        with output_errors(self.prefix):
            self._bin.close()
            if self._description is not None:
                with self._open(".json") as file:
                    file.write(self._description.encode())
            with self._open(".idx") as file:
                self._write_index(file)

    def _write_index(self, file: BinaryIO) -> None:
        sizes = np.frombuffer(self._sizes, np.int32)
        # In 64 bits from the start: a sum of int32 wraps around once the file passes 2 GiB.
        ends = np.cumsum(sizes, dtype=np.int64) * self.dtype.itemsize
        boundaries = np.frombuffer(self._document_indices, np.int64)
        file.write(_HEADER.pack(_MAGIC, _VERSION, DTYPE_CODES[self.dtype], len(sizes), len(boundaries)))
        file.write(sizes.astype("<i4").data)
        file.write((ends - sizes * np.int64(self.dtype.itemsize)).astype("<i8").data)
        file.write(boundaries.astype("<i8").data)

    def _open(self, suffix: str) -> BinaryIO:
        assert self._files is not None, "used as a context manager"
        return self._files.path(_with_suffix(self.prefix, suffix)).open("xb", buffering=1 << 20)


class IndexedDataset:
    """A memory-mapped indexed dataset: opening is fast, and memory does not grow with its size.

    ``dataset[i]`` is the ids of sequence ``i``, ``[sizes[i]]``, a read-only view of the file; so is
    ``dataset.tokens(start, stop)``. Datasets of ``tokenize`` have one sequence per document.

    Attributes:
        dtype: Type of the stored ids, little endian.
        sizes: Number of ids of each sequence, int32, ``[num_sequences]``. Other programs write empty sequences too.
        document_indices: int64, ``[num_documents + 1]``; document ``d`` is the sequences
            ``[document_indices[d], document_indices[d + 1])``. Some programs mark no boundaries: then it is ``[0]``.
        num_tokens: Number of ids of all sequences.

    Raises:
        DataError: A file is missing, truncated, of another format, or the two files do not belong together.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = Path(prefix)
        index_path, bin_path = _with_suffix(prefix, ".idx"), _with_suffix(prefix, ".bin")
        for path in (index_path, bin_path):
            if not path.is_file():
                raise DataError(f"{path}: no such file; give a dataset's path without its .bin or .idx")
        self.dtype, num_sequences, num_boundaries = _read_header(index_path)

        index = np.memmap(index_path, np.uint8, "r")
        sizes_end = _HEADER.size + 4 * num_sequences
        self.sizes = np.frombuffer(index, "<i4", num_sequences, _HEADER.size)
        self._pointers = np.frombuffer(index, "<i8", num_sequences, sizes_end)
        self.document_indices = np.frombuffer(index, "<i8", num_boundaries, sizes_end + 8 * num_sequences)

        num_bytes = self._check_index(index_path)
        if bin_path.stat().st_size != num_bytes:
            raise DataError(
                f"{bin_path}: {bin_path.stat().st_size} bytes, but {index_path.name} describes {num_bytes}: "
                f"it is truncated, or belongs to another dataset"
            )
        self.num_tokens = num_bytes // self.dtype.itemsize
        # An empty file cannot be mapped.
        stream = np.memmap(bin_path, self.dtype, "r") if num_bytes else np.empty(0, self.dtype)
        # A plain array over the same memory: slices of np.memmap are slow, since each is an instance of that subclass.
        self._stream = np.asarray(stream).view(np.ndarray)

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, index: int) -> NDArray[Any]:
        start = int(self._pointers[index]) // self.dtype.itemsize
        return self._stream[start : start + int(self.sizes[index])]

    def tokens(self, start: int, stop: int) -> NDArray[Any]:
        """Return the ids ``[stop - start]`` at these positions of the stream of all sequences."""
        if not 0 <= start <= stop <= self.num_tokens:
            raise IndexError(f"tokens {start} to {stop} of {self.prefix}, which has {self.num_tokens}")
        return self._stream[start:stop]

    @property
    def num_documents(self) -> int:
        """The number of documents. Without marked boundaries each sequence is one; a rest after them is one too."""
        num_marked = len(self.document_indices) - 1
        return num_marked + int(self.document_indices[-1] < len(self)) if num_marked else len(self)

    def document_start(self, number: int) -> int:
        """Return the position at which document ``number`` begins; for ``num_documents``, the end of the last one."""
        sequence = self._first_sequence(number)
        return int(self._pointers[sequence]) // self.dtype.itemsize if sequence < len(self) else self.num_tokens

    def document_lengths(self) -> NDArray[np.int64]:
        """Return the number of ids of each document, ``[num_documents]``."""
        starts = np.append(self._pointers // self.dtype.itemsize, self.num_tokens)
        return np.diff(starts[self.document_boundaries()])

    def document_boundaries(self) -> NDArray[np.int64]:
        """Return the first sequence of each document, and the number of sequences: ``[num_documents + 1]``."""
        if len(self.document_indices) == 1:
            return np.arange(len(self) + 1)
        is_whole = self.document_indices[-1] == len(self)
        return self.document_indices if is_whole else np.append(self.document_indices, len(self))

    def documents(self) -> Iterator[list[NDArray[Any]]]:
        """Yield the sequences of each document."""
        for number in range(self.num_documents):
            yield [self[i] for i in range(self._first_sequence(number), self._first_sequence(number + 1))]

    def document_starts(self, start: int, stop: int) -> list[int]:
        """Return the positions in ``[start, stop)`` at which a document with tokens begins, ascending."""
        found: list[int] = []
        for number in range(self._first_document_from(start), self.num_documents):
            position = self.document_start(number)
            if position >= min(stop, self.num_tokens):
                break
            if not found or position != found[-1]:
                found.append(position)
        return found

    def nearest_document_start(self, position: int) -> int:
        """Return the document boundary nearest to ``position``, or the first of two; the end of the stream is one."""
        number = self._first_document_from(position)
        candidates = [self.document_start(n) for n in (number - 1, number) if 0 <= n <= self.num_documents]
        return min(candidates, key=lambda start: abs(start - position), default=0)

    def _first_sequence(self, number: int) -> int:
        """Return the first sequence of document ``number``; for ``num_documents``, the number of sequences."""
        if len(self.document_indices) == 1:
            return number
        return int(self.document_indices[number]) if number < len(self.document_indices) else len(self)

    def _first_document_from(self, position: int) -> int:
        # numpy's search would copy the whole array, which is not aligned in the file.
        return bisect_left(range(self.num_documents), position, key=self.document_start)

    def __reduce__(self) -> tuple[type[IndexedDataset], tuple[Path]]:
        # A worker process maps the files itself instead of receiving their content.
        return IndexedDataset, (self.prefix,)

    def _check_index(self, path: Path) -> int:
        """Check the index for consistency; return the size of ``.bin`` that it describes, in bytes."""
        end = 0
        for first in range(0, len(self), _CHECK_BLOCK):
            block = slice(first, first + _CHECK_BLOCK)
            num_bytes = self.sizes[block].astype(np.int64) * self.dtype.itemsize
            if num_bytes.min() < 0:
                raise DataError(f"{path}: is damaged: sequence {first + int(num_bytes.argmin())} has a negative size")
            ends = end + np.cumsum(num_bytes)
            wrong = self._pointers[block] != ends - num_bytes
            if wrong.any():
                number = first + int(wrong.argmax())
                raise DataError(f"{path}: is damaged: sequence {number} does not begin where the one before ends")
            end = int(ends[-1])
        boundaries = self.document_indices
        is_ascending = bool(len(boundaries) and boundaries[0] == 0)
        for first in range(0, len(boundaries), _CHECK_BLOCK):
            part = boundaries[first : first + _CHECK_BLOCK + 1]  # with the first one of the next part
            is_ascending &= not bool((part[1:] < part[:-1]).any())
        if not is_ascending:
            raise DataError(f"{path}: is damaged: the document boundaries do not ascend from 0")
        if boundaries[-1] > len(self):
            raise DataError(f"{path}: is damaged: a document ends at sequence {boundaries[-1]} of {len(self)}")
        return end


def _read_header(path: Path) -> tuple[np.dtype[Any], int, int]:
    """Return the dtype, the number of sequences and the number of boundaries, after checking the file size."""
    with path.open("rb") as file:
        header = file.read(_HEADER.size)
    if header.startswith(_OLD_MAGIC):
        raise DataError(f"{path}: an index of the old 'lazy' or 'cached' kind; write the dataset as the 'mmap' kind")
    if not header.startswith(_MAGIC):
        raise DataError(f"{path}: is not the index of an indexed dataset (it begins with {header[:9]!r})")
    if len(header) < _HEADER.size:
        raise DataError(f"{path}: is truncated: its header has {len(header)} of {_HEADER.size} bytes")
    _, version, code, num_sequences, num_boundaries = _HEADER.unpack(header)
    if version != _VERSION:
        raise DataError(f"{path}: version {version} of the index format; only version {_VERSION} is known")
    dtypes = {known_code: dtype for dtype, known_code in DTYPE_CODES.items()}
    if code not in dtypes:
        meaning = "floating point numbers, not token ids" if code in (6, 7) else "an unknown type"
        raise DataError(f"{path}: its dtype code {code} means {meaning}")
    expected = _HEADER.size + 12 * num_sequences + 8 * num_boundaries
    actual = path.stat().st_size
    if actual != expected:
        state = "is truncated" if actual < expected else "is damaged"
        raise DataError(
            f"{path}: {state}: {actual} bytes, but {num_sequences} sequences and {num_boundaries} "
            f"document boundaries take {expected}"
        )
    return dtypes[code], num_sequences, num_boundaries


def _with_suffix(prefix: str | Path, suffix: str) -> Path:
    # Path.with_suffix would replace whatever follows the last dot of the prefix.
    return Path(f"{prefix}{suffix}")
