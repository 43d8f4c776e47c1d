"""The record of a training checkpoint: the progress and state of the run, and where each of its tensors is.

Tensors are stored as the saving run held them, in chunks, each of which is a tensor of a safetensors file. Their names:

    model.NAME             a parameter
    optimizer.KIND.NAME    optimizer state of a parameter: exp_avg, exp_avg_sq, step; momentum_buffer for SGD
    random.DEVICE.RANK     state of torch's random number generator of a process
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megacore.checkpoint.matrix import LazyMatrix
from megacore.checkpoint.safetensors_file import DTYPES, STORED_DTYPES, SafetensorsFile
from megacore.parallel import Rows


@dataclass(frozen=True)
class Chunk:
    """A box of a tensor, and the file that contains it."""

    file: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


def chunk_key(name: str, offsets: Sequence[int]) -> str:
    """Return the name in the file of the chunk of tensor ``name`` that begins at ``offsets``."""
    return f"{name}@{','.join(map(str, offsets))}"


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a training checkpoint: its whole shape, its dtype (a safetensors name), and its chunks."""

    shape: tuple[int, ...]
    dtype: str
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True)
class TrainingRecord:
    """The state from which a run resumes.

    Attributes:
        iteration: Number of steps done, skipped ones included.
        num_samples: Number of samples seen.
        tensors: Stored tensors by name.
        state: Remaining state of the run, plain JSON values.
    """

    iteration: int
    num_samples: int
    tensors: dict[str, StoredTensor]
    state: dict[str, Any]

    @property
    def run_id(self) -> str:
        """The id of the run that saved the checkpoint."""
        return str(self.state["run_id"])

    def to_json(self) -> dict[str, Any]:
        return {
            "iteration": self.iteration,
            "num_samples": self.num_samples,
            "state": self.state,
            "tensors": {
                name: {
                    "shape": list(tensor.shape),
                    "dtype": tensor.dtype,
                    "chunks": [[chunk.file, list(chunk.offsets), list(chunk.sizes)] for chunk in tensor.chunks],
                }
                for name, tensor in self.tensors.items()
            },
        }

    @classmethod
    def from_json(cls, document: dict[str, Any], files: Sequence[str]) -> TrainingRecord:
        """Parse a record of a checkpoint of ``files``. Raises ``ValueError`` when no megacore would write it."""
        known = set(files)
        tensors = {
            name: StoredTensor(
                tuple(entry["shape"]),
                entry["dtype"],
                tuple(Chunk(file, tuple(offsets), tuple(sizes)) for file, offsets, sizes in entry["chunks"]),
            )
            for name, entry in document["tensors"].items()
        }
        for name, tensor in tensors.items():
            is_valid = tensor.dtype in STORED_DTYPES and all(_is_natural(size) for size in tensor.shape)
            if not is_valid or not all(_is_inside(chunk, tensor) and chunk.file in known for chunk in tensor.chunks):
                raise ValueError(f"tensor {name} has an invalid shape, dtype or chunk")
            if sum(math.prod(chunk.sizes) for chunk in tensor.chunks) != math.prod(tensor.shape):
                raise ValueError(f"the chunks of tensor {name} do not cover it")
        iteration, num_samples = document["iteration"], document["num_samples"]
        if not (_is_natural(iteration) and _is_natural(num_samples)):
            raise ValueError("iteration or num_samples is not a whole number")
        return cls(iteration, num_samples, tensors, dict(document["state"]))


def _is_natural(number: Any) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and number >= 0


def _is_inside(chunk: Chunk, tensor: StoredTensor) -> bool:
    if not len(chunk.offsets) == len(chunk.sizes) == len(tensor.shape):
        return False
    return all(
        _is_natural(offset) and _is_natural(size) and 0 < size <= whole - offset
        for offset, size, whole in zip(chunk.offsets, chunk.sizes, tensor.shape, strict=True)
    )


class ChunkedMatrix(LazyMatrix):
    """A parameter of a training checkpoint as a matrix, assembled from its chunks when a block is read.

    ``name`` is that of the tensor in its files, ``row_dims`` the number of leading axes that are the rows.
    ``open_file`` returns a file of the checkpoint by its name.
    """

    def __init__(
        self, name: str, tensor: StoredTensor, row_dims: int, open_file: Callable[[str], SafetensorsFile]
    ) -> None:
        self._row_shape, self._column_shape = tensor.shape[:row_dims], tensor.shape[row_dims:]
        super().__init__(math.prod(self._row_shape), math.prod(self._column_shape), DTYPES[tensor.dtype])
        self._name, self._tensor, self._row_dims, self._open_file = name, tensor, row_dims, open_file

    def read(self, rows: Rows, columns: slice) -> Tensor:
        wanted_rows = torch.arange(rows.start, rows.stop) if isinstance(rows, slice) else rows
        wanted_columns = torch.arange(columns.start, columns.stop)
        block = torch.empty(len(wanted_rows), len(wanted_columns), dtype=self.dtype)
        dims = self._row_dims
        for chunk in self._tensor.chunks:
            chunk_rows = _flat_indices(self._row_shape, chunk.offsets[:dims], chunk.sizes[:dims])
            chunk_columns = _flat_indices(self._column_shape, chunk.offsets[dims:], chunk.sizes[dims:])
            from_rows, to_rows = _match(chunk_rows, wanted_rows)
            from_columns, to_columns = _match(chunk_columns, wanted_columns)
            if len(to_rows) and len(to_columns):
                part = read_chunk(self._open_file(chunk.file), self._name, self._tensor, chunk)
                part = part.view(len(chunk_rows), len(chunk_columns))
                block[_block_index(to_rows, to_columns)] = part[_block_index(from_rows, from_columns)]
        return block


def read_chunk(file: SafetensorsFile, name: str, tensor: StoredTensor, chunk: Chunk) -> Tensor:
    """Map a chunk of tensor ``name``. Raises :class:`CorruptCheckpointError` when its file does not contain it."""
    key = chunk_key(name, chunk.offsets)
    file.require(key, chunk.sizes, tensor.dtype)
    return file.tensor(key)


def _flat_indices(shape: tuple[int, ...], offsets: tuple[int, ...], sizes: tuple[int, ...]) -> Tensor:
    """Return the flat indices, in a tensor of ``shape``, of the elements of a box."""
    indices = torch.arange(math.prod(shape)).view(shape)
    for dim, (offset, size) in enumerate(zip(offsets, sizes, strict=True)):
        indices = indices.narrow(dim, offset, size)
    return indices.flatten()


def _match(available: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Return the positions of the common entries: in ``available``, which is sorted, and in ``wanted``."""
    positions = torch.searchsorted(available, wanted.contiguous()).clamp_(max=len(available) - 1)
    is_available = available[positions] == wanted
    return positions[is_available], is_available.nonzero().flatten()


def _block_index(rows: Tensor, columns: Tensor) -> tuple[slice | Tensor, slice | Tensor]:
    """Return the index of a block. Ranges become slices, which are much faster."""
    row_index, column_index = _as_slice(rows), _as_slice(columns)
    if isinstance(row_index, Tensor) and isinstance(column_index, Tensor):
        return row_index.unsqueeze(1), column_index
    return row_index, column_index


def _as_slice(indices: Tensor) -> slice | Tensor:
    first, last = int(indices[0]), int(indices[-1])
    is_range = last - first + 1 == len(indices) and bool((indices.diff() == 1).all())
    return slice(first, last + 1) if is_range else indices
