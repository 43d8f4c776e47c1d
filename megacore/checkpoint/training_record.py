"""What a training checkpoint says beside the description of its weights: where each tensor is, and how far the run was.

The tensors are cut as the run that saved them held them, into boxes, each of which is a tensor of a safetensors file.
They are named

    model.NAME             a parameter
    optimizer.KIND.NAME    what the optimizer keeps of it: exp_avg, exp_avg_sq, step; of SGD momentum_buffer
    random.DEVICE.RANK     the state of torch's generator of random numbers on a process
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
from megacore.errors import CorruptCheckpointError
from megacore.parallel import Rows


@dataclass(frozen=True)
class Chunk:
    """A box of a tensor, and the file that it is in."""

    file: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    def key(self, name: str) -> str:
        """What it is called in the file, as a part of tensor ``name``."""
        return key_of(name, self.offsets)


def key_of(name: str, offsets: Sequence[int]) -> str:
    """What the box of tensor ``name`` that begins at ``offsets`` is called in its file."""
    return f"{name}@{','.join(map(str, offsets))}"


@dataclass(frozen=True)
class StoredTensor:
    """A tensor: its whole shape, its dtype (a safetensors name), and the boxes that it is stored in."""

    shape: tuple[int, ...]
    dtype: str
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True)
class TrainingRecord:
    """What a run needs to go on.

    Attributes:
        iteration: steps done, those that were skipped included.
        num_samples: samples seen.
        tensors: by name.
        state: of the rest of the run, JSON.
    """

    iteration: int
    num_samples: int
    tensors: dict[str, StoredTensor]
    state: dict[str, Any]

    @property
    def run_id(self) -> str:
        """Of the run that saved it."""
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
        """Raises ``ValueError`` for what no megacore would have written; ``files`` are those of the checkpoint."""
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
            whole = tensor.dtype in STORED_DTYPES and all(_is_whole_number(size) for size in tensor.shape)
            if not whole or not all(_is_part(chunk, tensor) and chunk.file in known for chunk in tensor.chunks):
                raise ValueError(f"tensor {name} is none")
            if sum(math.prod(chunk.sizes) for chunk in tensor.chunks) != math.prod(tensor.shape):
                raise ValueError(f"the parts of tensor {name} are not the whole")
        iteration, num_samples = document["iteration"], document["num_samples"]
        if not (_is_whole_number(iteration) and _is_whole_number(num_samples)):
            raise ValueError("iteration and num_samples are no numbers")
        return cls(iteration, num_samples, tensors, dict(document["state"]))


def _is_whole_number(number: Any) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and number >= 0


def _is_part(chunk: Chunk, tensor: StoredTensor) -> bool:
    if not len(chunk.offsets) == len(chunk.sizes) == len(tensor.shape):
        return False
    return all(
        _is_whole_number(offset) and _is_whole_number(size) and 0 < size <= whole - offset
        for offset, size, whole in zip(chunk.offsets, chunk.sizes, tensor.shape, strict=True)
    )


class ChunkedMatrix(LazyMatrix):
    """A parameter of a training checkpoint as a matrix, put together from its boxes when a block of it is read.

    Args:
        name: of the tensor, in its files.
        tensor: how it is stored.
        row_dims: how many leading axes number the rows.
        opened: gives a file of the checkpoint, by name.
    """

    def __init__(
        self, name: str, tensor: StoredTensor, row_dims: int, opened: Callable[[str], SafetensorsFile]
    ) -> None:
        self._row_shape, self._column_shape = tensor.shape[:row_dims], tensor.shape[row_dims:]
        super().__init__(math.prod(self._row_shape), math.prod(self._column_shape), DTYPES[tensor.dtype])
        self._name, self._tensor, self._row_dims, self._opened = name, tensor, row_dims, opened

    def read(self, rows: Rows, columns: slice) -> Tensor:
        wanted_rows = torch.arange(rows.start, rows.stop) if isinstance(rows, slice) else rows
        wanted_columns = torch.arange(columns.start, columns.stop)
        block = torch.empty(len(wanted_rows), len(wanted_columns), dtype=self.dtype)
        cut = self._row_dims
        for chunk in self._tensor.chunks:
            its_rows = _numbers(self._row_shape, chunk.offsets[:cut], chunk.sizes[:cut])
            its_columns = _numbers(self._column_shape, chunk.offsets[cut:], chunk.sizes[cut:])
            from_rows, to_rows = _places(its_rows, wanted_rows)
            from_columns, to_columns = _places(its_columns, wanted_columns)
            if len(to_rows) and len(to_columns):
                part = read_chunk(self._opened(chunk.file), self._name, self._tensor, chunk)
                part = part.view(len(its_rows), len(its_columns))
                block[_index(to_rows, to_columns)] = part[_index(from_rows, from_columns)]
        return block


def read_chunk(file: SafetensorsFile, name: str, tensor: StoredTensor, chunk: Chunk) -> Tensor:
    """A box of tensor ``name``, mapped and not yet read.

    Raises:
        CorruptCheckpointError: when its file does not hold it.
    """
    key = chunk.key(name)
    if key not in file.names or (file.shape(key), file.dtype_name(key)) != (chunk.sizes, tensor.dtype):
        raise CorruptCheckpointError(
            f"{file.path} is damaged: its header does not say of {key} what the manifest does. Make it again"
        )
    return file.tensor(key)


def _numbers(shape: tuple[int, ...], offsets: tuple[int, ...], sizes: tuple[int, ...]) -> Tensor:
    """Of the elements of ``shape``, counted through, those in a box."""
    numbers = torch.arange(math.prod(shape)).view(shape)
    for dim, (offset, size) in enumerate(zip(offsets, sizes, strict=True)):
        numbers = numbers.narrow(dim, offset, size)
    return numbers.flatten()


def _places(there: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Where in ``there``, which is sorted, those of ``wanted`` are that it has, and where in ``wanted`` they are."""
    places = torch.searchsorted(there, wanted.contiguous()).clamp_(max=len(there) - 1)
    is_there = there[places] == wanted
    return places[is_there], is_there.nonzero().flatten()


def _index(rows: Tensor, columns: Tensor) -> tuple[slice | Tensor, slice | Tensor]:
    """The index of a block; ranges are slices, which are much faster."""
    one, other = _as_slice(rows), _as_slice(columns)
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.unsqueeze(1), other
    return one, other


def _as_slice(numbers: Tensor) -> slice | Tensor:
    first, last = int(numbers[0]), int(numbers[-1])
    is_range = last - first + 1 == len(numbers) and bool((numbers.diff() == 1).all())
    return slice(first, last + 1) if is_range else numbers
