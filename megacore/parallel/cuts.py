"""How a parameter is cut over tensor-parallel ranks: along one axis, as ``torch.chunk`` cuts.

Every parameter is seen in two ways. As the model holds it, fused parts have axes of their own, ``[kv_groups, rows,
hidden]`` say, so that a cut is a ``narrow``. As files hold it, it is a matrix ``[rows, columns]``: the first
``row_dims`` axes flattened, then the rest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from megacore.errors import LayoutError

Rows = slice | torch.Tensor
"""Rows of a matrix: a slice with explicit bounds and step 1, or a one-dimensional int64 tensor of row numbers."""


def chunk_bounds(size: int, parts: int, index: int) -> tuple[int, int]:
    """Return the half-open range that part ``index`` of ``torch.chunk(range(size), parts)`` covers.

    Every part is ``ceil(size / parts)`` until nothing is left, so late parts may be smaller or empty.
    """
    step = -(-size // parts)
    start = min(index * step, size)
    return start, min(start + step, size)


@dataclass(frozen=True)
class ParameterSpec:
    """The shape of a parameter of the whole model, and how tensor parallelism cuts it.

    Attributes:
        shape: of the uncut parameter.
        shard_dim: the axis that tensor parallelism cuts; ``None`` where every rank holds the whole.
        row_dims: how many leading axes number the rows of the matrix; the rest number its columns. A vector has its
            one axis in the rows.
    """

    shape: tuple[int, ...]
    shard_dim: int | None
    row_dims: int

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """``(rows, columns)``; a vector of n is a matrix of ``(n, 1)``."""
        return math.prod(self.shape[: self.row_dims]), math.prod(self.shape[self.row_dims :])

    @property
    def flat_shape(self) -> tuple[int, ...]:
        """The shape that published checkpoints have: ``[rows, columns]``, or ``[rows]`` for a vector."""
        return self.matrix_shape if self.row_dims < len(self.shape) else self.matrix_shape[:1]

    def local_shape(self, tp_size: int, tp_rank: int) -> tuple[int, ...]:
        """The shape of the part that rank ``tp_rank`` of ``tp_size`` holds."""
        if self.shard_dim is None:
            return self.shape
        start, stop = chunk_bounds(self.shape[self.shard_dim], tp_size, tp_rank)
        return (*self.shape[: self.shard_dim], stop - start, *self.shape[self.shard_dim + 1 :])

    def block(self, tp_size: int, tp_rank: int) -> tuple[Rows, slice]:
        """The rows and columns of the matrix that rank ``tp_rank`` of ``tp_size`` holds."""
        rows, columns = self.matrix_shape
        if self.shard_dim is None:
            return slice(0, rows), slice(0, columns)
        start, stop = chunk_bounds(self.shape[self.shard_dim], tp_size, tp_rank)
        if self.shard_dim >= self.row_dims:
            assert self.shard_dim == self.row_dims, "columns are cut along their first axis"
            inner = math.prod(self.shape[self.shard_dim + 1 :])
            return slice(0, rows), slice(start * inner, stop * inner)
        outer = math.prod(self.shape[: self.shard_dim])
        inner = math.prod(self.shape[self.shard_dim + 1 : self.row_dims])
        if outer == 1:
            return slice(start * inner, stop * inner), slice(0, columns)
        numbers = torch.arange(rows).view(outer, self.shape[self.shard_dim], inner)
        return numbers[:, start:stop].flatten(), slice(0, columns)


def leaves_no_rank_empty(specs: Mapping[str, ParameterSpec], tp_size: int) -> bool:
    """Whether a cut over ``tp_size`` ranks leaves every rank something of every cut parameter."""
    sizes = {spec.shape[spec.shard_dim] for spec in specs.values() if spec.shard_dim is not None}
    return all(chunk_bounds(size, tp_size, tp_size - 1)[0] < size for size in sizes)


def check_tensor_parallel(specs: Mapping[str, ParameterSpec], tp_size: int) -> None:
    """Refuse a tensor-parallel size that would leave a rank without its part of some parameter.

    Raises:
        LayoutError: names the parameter and the sizes that work.
    """
    if tp_size >= 1 and leaves_no_rank_empty(specs, tp_size):
        return
    units = {name: spec.shape[spec.shard_dim] for name, spec in specs.items() if spec.shard_dim is not None}
    failing = [name for name in units if tp_size < 1 or not leaves_no_rank_empty({name: specs[name]}, tp_size)]
    smallest = min(failing, key=lambda name: units[name])
    size = units[smallest]
    working = [str(tp) for tp in range(1, min(units.values()) + 1) if leaves_no_rank_empty(specs, tp)]
    raise LayoutError(
        f"this model cannot be cut over tp {tp_size}: {smallest} {list(specs[smallest].shape)} is cut into "
        f"{size} units at most, and a rank would be left with none. tp sizes that work: {', '.join(working)}"
    )


def describe_imbalance(specs: Mapping[str, ParameterSpec], tp_size: int) -> str | None:
    """Say in a line how unequal the ranks' parts are; ``None`` where tp divides everything."""
    uneven: dict[str, str] = {}
    for name, spec in specs.items():
        if spec.shard_dim is not None and (size := spec.shape[spec.shard_dim]) % tp_size:
            parts = [stop - start for start, stop in (chunk_bounds(size, tp_size, rank) for rank in range(tp_size))]
            uneven.setdefault(name.rsplit(".", 2)[-2], f"{size} as {' + '.join(map(str, parts))}")
    if not uneven:
        return None
    return f"tp {tp_size} cuts unevenly: " + ", ".join(f"{name} {how}" for name, how in uneven.items())
