"""safetensors files, written front to back from matrices that need not fit into memory.

The format (https://huggingface.co/docs/safetensors): the length of the header as a little-endian uint64, the header as
JSON (name to dtype, shape and byte offsets), then the tensors back to back. Sizes are known beforehand, so the header
comes first and the file is never seeked: it is hashed while it is written.
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

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megacore.checkpoint.matrix import LazyMatrix, StoredMatrix, cast
from megacore.errors import CheckpointError, CorruptCheckpointError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
"""The names that safetensors gives to the dtypes a parameter may have."""

STORED_DTYPES = DTYPES | {"U8": torch.uint8}
"""With what a training checkpoint holds beside parameters."""

DTYPE_NAMES = {dtype: name for name, dtype in STORED_DTYPES.items()}

MAX_FILE_BYTES = 5_000_000_000
"""No file is larger, unless a single tensor is."""

_CHUNK_BYTES = 4 << 20  # small enough to stay in the processor's cache from reading to hashing and writing
_CHUNKS_IN_FLIGHT = 4


@dataclass(frozen=True)
class OutputTensor:
    """A tensor to be written: its name and shape in the file, and the matrix with its elements, row by row."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    matrix: LazyMatrix

    @property
    def num_bytes(self) -> int:
        return self.matrix.rows * self.matrix.columns * self.dtype.itemsize


@dataclass(frozen=True)
class FileRecord:
    """What was written: the length of a file in bytes and its SHA-256, in hexadecimal."""

    num_bytes: int
    sha256: str


def split_by_size(tensors: Sequence[OutputTensor], limit: int = MAX_FILE_BYTES) -> list[list[OutputTensor]]:
    """Distribute ``tensors``, in order, over files of at most ``limit`` bytes."""
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
    is_alone: bool = True,
) -> FileRecord:
    """Write ``tensors`` to ``path`` and flush it to the disk. ``advance`` is told of every few bytes written.

    Reading and converting, hashing, and writing overlap in three threads; a few chunks of 4 MiB exist at a time.
    ``is_alone`` says that nothing else computes meanwhile: torch is then kept to one thread.
    """
    digest = hashlib.sha256()
    header = _header(tensors)
    digest.update(header)
    with (
        path.open("wb", buffering=0) as file,
        ThreadPoolExecutor(1) as hasher,
        ThreadPoolExecutor(1) as writer,
        _one_torch_thread() if is_alone else nullcontext(),
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


def file_sha256(path: Path, *, advance: Callable[[int], None] = lambda num_bytes: None) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    buffer = bytearray(_CHUNK_BYTES)
    view = memoryview(buffer)
    with path.open("rb", buffering=0) as file:
        while num_bytes := file.readinto(buffer):
            digest.update(view[:num_bytes])
            advance(num_bytes)
    return digest.hexdigest()


class SafetensorsFile:
    """A safetensors file opened for reading: its header is checked, its tensors are mapped when they are read.

    Raises:
        CheckpointError: when the file is missing.
        CorruptCheckpointError: when it is truncated or is no safetensors file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            raise CheckpointError(f"{path} is missing")
        try:
            path.open("rb").close()  # safetensors would say of a file that may not be read that it is missing
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
        try:
            self._file = safe_open(path, framework="pt")
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
        """Raises :class:`CheckpointError` for a dtype that no parameter has (quantized weights, for example)."""
        found = self.dtype_name(name)
        if found not in DTYPES:
            raise CheckpointError(f"{self.path}: {name} has dtype {found}; parameters may be {', '.join(DTYPES)}")
        return DTYPES[found]

    def dtype_name(self, name: str) -> str:
        """As the file has it."""
        return str(self._file.get_slice(name).get_dtype())

    def tensor(self, name: str) -> Tensor:
        """Tensor ``name``, mapped and not yet read."""
        return self._file.get_tensor(name)

    def matrix(self, name: str, rows: int, columns: int) -> StoredMatrix:
        """Tensor ``name``, seen as ``rows`` × ``columns``."""
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
    """The bytes of ``tensor``, in its own dtype, a few megabytes at a time."""
    matrix = tensor.matrix
    step = max(1, _CHUNK_BYTES // max(1, matrix.columns * max(tensor.dtype.itemsize, matrix.dtype.itemsize)))
    for start in range(0, matrix.rows, step):
        block = matrix.read(slice(start, min(start + step, matrix.rows)), slice(0, matrix.columns))
        yield _bytes_of(cast(block, tensor.dtype, tensor.name))


def _bytes_of(block: Tensor) -> memoryview:
    return block.cpu().contiguous().flatten().view(torch.uint8).numpy().data


@contextmanager
def _one_torch_thread() -> Iterator[None]:
    """Keep torch to the calling thread: its others would spin, while they wait, on the cores that hash and write."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _write_all(descriptor: int, chunk: memoryview) -> None:
    while chunk:
        chunk = chunk[os.write(descriptor, chunk) :]
