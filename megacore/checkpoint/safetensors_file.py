"""safetensors files, written sequentially from matrices that need not fit into memory.

The writer is our own, since that of the safetensors library needs all tensors in memory. The format
(https://huggingface.co/docs/safetensors): the length of the header as a little-endian uint64, the header as JSON (name
to dtype, shape and byte offsets), then the tensors back to back. Sizes are known in advance, so the file is written
without seeking and hashed meanwhile.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megacore.checkpoint.input_files import require_readable
from megacore.checkpoint.matrix import LazyMatrix, StoredMatrix, cast
from megacore.errors import CheckpointError, CorruptCheckpointError

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Dtypes that a parameter may have, by their safetensors names."""

STORED_DTYPES = DTYPES | {"U8": torch.uint8}
"""Dtypes of all tensors in a training checkpoint."""

DTYPE_NAMES = {dtype: name for name, dtype in STORED_DTYPES.items()}

MAX_FILE_BYTES = 5_000_000_000
"""Limit of a file's size; only a file with a single tensor may be larger."""

_CHUNK_BYTES = 4 << 20  # small enough to stay in the processor's cache from reading to hashing and writing
_CHUNKS_IN_FLIGHT = 4


@dataclass(frozen=True)
class OutputTensor:
    """A tensor to write: its name, shape and dtype in the file, and its elements as a matrix, row by row."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    matrix: LazyMatrix

    @property
    def num_bytes(self) -> int:
        return self.matrix.rows * self.matrix.columns * self.dtype.itemsize


@dataclass(frozen=True)
class FileRecord:
    """The length of a written file in bytes, and its SHA-256 in hexadecimal."""

    num_bytes: int
    sha256: str


def split_by_size(tensors: Sequence[OutputTensor], limit: int = MAX_FILE_BYTES) -> list[list[OutputTensor]]:
    """Distribute ``tensors``, in order, over files of at most ``limit`` bytes each."""
    files: list[list[OutputTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if files[-1] and size + tensor.num_bytes > limit:
            files.append([])
            size = 0
        files[-1].append(tensor)
        size += tensor.num_bytes
    return files


def write_safetensors(
    path: Path,
    tensors: Sequence[OutputTensor],
    *,
    advance: Callable[[int], None] = lambda num_bytes: None,
    limit_threads: bool = True,
) -> FileRecord:
    """Write ``tensors`` to ``path``, in their order, and flush it to the disk.

    Reading and converting, hashing, and writing overlap in three threads; a few chunks of 4 MiB exist at a time.
    ``advance`` receives the bytes written since its last call. ``limit_threads`` restricts torch to one thread
    meanwhile, and must be false if something else is computing.
    """
    digest = hashlib.sha256()
    header = _header(tensors)
    digest.update(header)
    with (
        path.open("wb", buffering=0) as file,
        ThreadPoolExecutor(1) as hasher,
        ThreadPoolExecutor(1) as writer,
        _one_torch_thread() if limit_threads else nullcontext(),
    ):
        file.write(header)
        pending: deque[tuple[Future[None], Future[None], int]] = deque()

        def finish_oldest() -> None:
            hashed, written, num_bytes = pending.popleft()
            hashed.result()
            written.result()
            advance(num_bytes)

        for tensor in tensors:
            for chunk in chunks_of(tensor):
                if len(pending) == _CHUNKS_IN_FLIGHT:
                    finish_oldest()
                pending.append(
                    (hasher.submit(digest.update, chunk), writer.submit(_write_all, file.fileno(), chunk), len(chunk))
                )
        while pending:
            finish_oldest()
        os.fsync(file.fileno())
        return FileRecord(num_bytes=file.tell(), sha256=digest.hexdigest())


class SafetensorsFile:
    """A safetensors file opened for reading. Its header is checked; its tensors are mapped when they are read.

    Raises:
        CheckpointError: when the file is missing or may not be read.
        CorruptCheckpointError: when it is truncated or not a safetensors file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        require_readable(path)
        try:
            self._file: Any = safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise CorruptCheckpointError(
                f"{path} is damaged or incomplete ({path.stat().st_size} bytes): {error}. Fetch it again"
            ) from error

    @cached_property
    def names(self) -> list[str]:
        return list(self._file.keys())

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._file.get_slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of a tensor. Raises :class:`CheckpointError` if no parameter may have it (quantized)."""
        found = self.dtype_name(name)
        if found not in DTYPES:
            raise CheckpointError(f"{self.path}: {name} has dtype {found}; parameters may be {', '.join(DTYPES)}")
        return DTYPES[found]

    def dtype_name(self, name: str) -> str:
        """Return the safetensors name of a tensor's dtype."""
        return str(self._file.get_slice(name).get_dtype())

    def tensor(self, name: str) -> Tensor:
        """Return tensor ``name``, mapped and not yet read."""
        tensor: Tensor = self._file.get_tensor(name)
        return tensor

    def require(self, name: str, shape: tuple[int, ...], dtype_name: str) -> None:
        """Raise :class:`CorruptCheckpointError` unless the file has tensor ``name`` with this shape and dtype."""
        if name not in self.names or (self.shape(name), self.dtype_name(name)) != (shape, dtype_name):
            raise CorruptCheckpointError(
                f"{self.path} is damaged: its header and the manifest disagree about {name}. Make it again"
            )

    def matrix(self, name: str, rows: int, columns: int) -> StoredMatrix:
        """Return tensor ``name`` as a matrix of ``rows`` × ``columns``."""
        return StoredMatrix(rows, columns, self.dtype(name), lambda: self.tensor(name))


def _header(tensors: Sequence[OutputTensor]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        end = offset + tensor.num_bytes
        entries[tensor.name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # tensors start at a multiple of 8 bytes
    return len(header).to_bytes(8, "little") + header


def chunks_of(tensor: OutputTensor) -> Iterator[memoryview]:
    """Yield the bytes of ``tensor``, in its dtype, a few megabytes at a time."""
    matrix = tensor.matrix
    step = max(1, _CHUNK_BYTES // max(1, matrix.columns * max(tensor.dtype.itemsize, matrix.dtype.itemsize)))
    for start in range(0, matrix.rows, step):
        block = matrix.read(slice(start, min(start + step, matrix.rows)), slice(0, matrix.columns))
        yield _bytes_of(cast(block, tensor.dtype, tensor.name))


def _bytes_of(block: Tensor) -> memoryview:
    return block.cpu().contiguous().flatten().view(torch.uint8).numpy().data


@contextmanager
def _one_torch_thread() -> Iterator[None]:
    """Restrict torch to the calling thread: its idle threads would spin on the cores that hash and write."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _write_all(descriptor: int, chunk: memoryview) -> None:
    while chunk:
        chunk = chunk[os.write(descriptor, chunk) :]
