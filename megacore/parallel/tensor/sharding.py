"""The cut of a parameter over tensor-parallel ranks: along one axis, as ``torch.chunk`` cuts.

Every parameter is seen in two ways. In the model, fused parts have axes of their own, ``[kv_groups, rows,
hidden]`` say, so that a cut is a ``narrow``. In files, it is a matrix ``[rows, columns]``: the first
``row_dims`` axes flattened, then the rest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
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
class Box:
    """A part of a tensor that is a box of another, larger one.

    Attributes:
        offsets: Start in the larger tensor, along each axis.
        sizes: Size along each axis.
        part_offsets: Start in the part, along each axis.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    part_offsets: tuple[int, ...]

    def narrow(self, dim: int, start: int, stop: int) -> Box:
        """Return the box of a smaller part: the entries ``start`` to ``stop`` of this one's part along ``dim``."""
        first = self.part_offsets[dim]
        begin, end = max(first, start), min(first + self.sizes[dim], stop)
        offset = self.offsets[dim] + begin - first
        return Box(
            _replaced(self.offsets, dim, offset),
            _replaced(self.sizes, dim, max(0, end - begin)),
            _replaced(self.part_offsets, dim, begin - start),
        )

    @property
    def is_empty(self) -> bool:
        return 0 in self.sizes


def _replaced(numbers: tuple[int, ...], dim: int, number: int) -> tuple[int, ...]:
    return (*numbers[:dim], number, *numbers[dim + 1 :])


@dataclass(frozen=True)
class ParameterSpec:
    """The shape of a parameter of the whole model, and its cut by tensor parallelism.

    The axis ``shard_dim`` counts units, each of which goes to one rank. If there are more ranks than units, a unit
    with ``num_subunits`` > 1 is divided among several ranks: each of them gets the last ``num_shared`` entries of the
    next axis, and an equal part of the others. So the query heads that share a key-value head can be on
    different ranks, each with a replica of that head. Replicas exist in memory only: files hold one.

    Attributes:
        shape: Shape of the uncut parameter.
        shard_dim: Axis that tensor parallelism cuts; ``None`` if every rank holds the whole.
        row_dims: Number of leading axes that are the rows of the matrix; the rest are its columns. The one axis of a
            vector is in the rows.
        num_subunits: Number of parts that a unit can be divided into; 1 if it cannot.
        num_shared: Number of entries of the axis after ``shard_dim`` that each rank of a unit holds.
    """

    shape: tuple[int, ...]
    shard_dim: int | None
    row_dims: int
    num_subunits: int = 1
    num_shared: int = 0

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """Return ``(rows, columns)``; a vector of n is a matrix of ``(n, 1)``."""
        return math.prod(self.shape[: self.row_dims]), math.prod(self.shape[self.row_dims :])

    @property
    def flat_shape(self) -> tuple[int, ...]:
        """Return the shape in published checkpoints: ``[rows, columns]``, or ``[rows]`` for a vector."""
        return self.matrix_shape if self.row_dims < len(self.shape) else self.matrix_shape[:1]

    def is_same_parameter(self, other: ParameterSpec) -> bool:
        """Return whether both describe the same parameter; it may be divisible beyond its units in one of them only."""
        return (self.shape, self.shard_dim, self.row_dims) == (other.shape, other.shard_dim, other.row_dims)

    @property
    def num_units(self) -> int:
        """Return the number of units along ``shard_dim``; 1 if nothing is cut."""
        return 1 if self.shard_dim is None else self.shape[self.shard_dim]

    def ranks_per_unit(self, tp_size: int) -> int:
        """Return the number of ranks that a unit is divided among: 1, unless there are more ranks than units."""
        return 1 if self.shard_dim is None or tp_size <= self.num_units else tp_size // self.num_units

    def can_be_cut_over(self, tp_size: int) -> bool:
        """Return whether a cut over ``tp_size`` ranks leaves each rank a part of the parameter."""
        if self.shard_dim is None:
            return tp_size >= 1
        if not 1 <= tp_size <= self.num_units:
            share, rest = divmod(tp_size, self.num_units)
            return share > 0 and rest == 0 and self.num_subunits % share == 0
        return chunk_bounds(self.num_units, tp_size, tp_size - 1)[0] < self.num_units

    def local_shape(self, tp_size: int, tp_rank: int) -> tuple[int, ...]:
        """Return the shape of the part that rank ``tp_rank`` of ``tp_size`` holds, replicas included."""
        return self._shape_of(tp_size, tp_rank, with_replicas=True)

    def stored_shape(self, tp_size: int, tp_rank: int) -> tuple[int, ...]:
        """Return the shape of the part in the file of rank ``tp_rank`` of ``tp_size``; see :meth:`stored_block`."""
        return self._shape_of(tp_size, tp_rank, with_replicas=False)

    def global_shape(self, tp_size: int) -> tuple[int, ...]:
        """Return the shape of the joined parts of all ranks along ``shard_dim``: ``shape``, unless there are replicas.

        This is the shape of the parameter as a DTensor.
        """
        share = self.ranks_per_unit(tp_size)
        if share == 1 or self.shard_dim is None:
            return self.shape
        local = self.local_shape(tp_size, 0)
        return (*local[: self.shard_dim], tp_size, *local[self.shard_dim + 1 :])

    def block(self, tp_size: int, tp_rank: int) -> tuple[Rows, slice]:
        """Return the rows and columns of the matrix that rank ``tp_rank`` of ``tp_size`` holds, replicas included."""
        return self._block(tp_size, tp_rank, with_replicas=True)

    def stored_block(self, tp_size: int, tp_rank: int) -> tuple[Rows, slice]:
        """Return the rows and columns that the file of rank ``tp_rank`` of ``tp_size`` holds: each is in one file only.

        Entries that several ranks hold are in the file of the first of them; see :meth:`is_stored_by`.
        """
        return self._block(tp_size, tp_rank, with_replicas=False)

    def is_stored_by(self, tp_rank: int) -> bool:
        """Return whether the file of ``tp_rank`` holds a part of the parameter; without a cut only rank 0 does."""
        return self.shard_dim is not None or tp_rank == 0

    def subunit_bounds(self, tp_size: int, tp_rank: int) -> tuple[int, int]:
        """Return the half-open range of subunits, counted through all units, that rank ``tp_rank`` holds."""
        share = self.ranks_per_unit(tp_size)
        if share == 1:
            first, last = chunk_bounds(self.num_units, tp_size, tp_rank)
            return first * self.num_subunits, last * self.num_subunits
        size = self.num_subunits // share
        return tp_rank * size, (tp_rank + 1) * size

    def boxes(self, tp_size: int, tp_rank: int) -> list[Box]:
        """Return the boxes of the whole parameter that make up the part of rank ``tp_rank``, replicas included."""
        zeros = (0,) * len(self.shape)
        if self.shard_dim is None:
            return [Box(zeros, self.shape, zeros)]
        units, parts = self._parts(tp_size, tp_rank, with_replicas=True)
        offsets = _replaced(zeros, self.shard_dim, units.start)
        sizes = _replaced(self.shape, self.shard_dim, units.stop - units.start)
        if not parts:
            return [Box(offsets, sizes, zeros)]
        boxes, dim, done = [], self.shard_dim + 1, 0
        for part in parts:
            size = part.stop - part.start
            boxes.append(
                Box(_replaced(offsets, dim, part.start), _replaced(sizes, dim, size), _replaced(zeros, dim, done))
            )
            done += size
        return boxes

    def _parts(self, tp_size: int, tp_rank: int, *, with_replicas: bool) -> tuple[slice, list[slice]]:
        """Return the units of a rank, and its parts of each along the next axis; no parts if a unit is whole."""
        share = self.ranks_per_unit(tp_size)
        if share == 1:
            return slice(*chunk_bounds(self.num_units, tp_size, tp_rank)), []
        assert self.shard_dim is not None
        unit, part = divmod(tp_rank, share)
        size = self.shape[self.shard_dim + 1]
        own_size = (size - self.num_shared) // share
        parts = [slice(part * own_size, (part + 1) * own_size)]
        if self.num_shared and (with_replicas or part == 0):
            parts.append(slice(size - self.num_shared, size))
        return slice(unit, unit + 1), parts

    def _shape_of(self, tp_size: int, tp_rank: int, *, with_replicas: bool) -> tuple[int, ...]:
        if self.shard_dim is None:
            return self.shape
        units, parts = self._parts(tp_size, tp_rank, with_replicas=with_replicas)
        shape = list(self.shape)
        shape[self.shard_dim] = units.stop - units.start
        if parts:
            shape[self.shard_dim + 1] = sum(part.stop - part.start for part in parts)
        return tuple(shape)

    def _block(self, tp_size: int, tp_rank: int, *, with_replicas: bool) -> tuple[Rows, slice]:
        rows, columns = self.matrix_shape
        if self.shard_dim is None:
            return slice(0, rows), slice(0, columns)
        units, parts = self._parts(tp_size, tp_rank, with_replicas=with_replicas)
        if self.shard_dim >= self.row_dims:
            assert self.shard_dim == self.row_dims, "columns are cut along their first axis"
            inner = math.prod(self.shape[self.shard_dim + 1 :])
            if not parts:
                return slice(0, rows), slice(units.start * inner, units.stop * inner)
            assert len(parts) == 1, "columns have no replicas"
            entry = inner // self.shape[self.shard_dim + 1]
            first = units.start * inner
            return slice(0, rows), slice(first + parts[0].start * entry, first + parts[0].stop * entry)
        outer = math.prod(self.shape[: self.shard_dim])
        inner = math.prod(self.shape[self.shard_dim + 1 : self.row_dims])
        if outer == 1 and not parts:
            return slice(units.start * inner, units.stop * inner), slice(0, columns)
        numbers = torch.arange(rows).view(outer, self.num_units, inner)[:, units]
        if parts:
            entries = numbers.unflatten(-1, (self.shape[self.shard_dim + 1], -1))
            numbers = torch.cat([entries[:, :, part] for part in parts], dim=2)
        return numbers.flatten(), slice(0, columns)


def join_parts(parts: Sequence[torch.Tensor], spec: ParameterSpec) -> torch.Tensor:
    """Join the parts of all ranks, in their order, to the uncut parameter."""
    rows, columns = spec.matrix_shape
    whole = parts[0].new_empty(rows, columns)
    for rank, part in enumerate(parts):
        block_rows, block_columns = spec.block(len(parts), rank)
        whole[block_rows, block_columns] = part.reshape(-1, block_columns.stop - block_columns.start)
    return whole.view(spec.shape)


def check_tensor_parallel(specs: Mapping[str, ParameterSpec], tp_size: int) -> None:
    """Refuse a tensor-parallel size that would leave a rank without its part of some parameter.

    Raises:
        LayoutError: When it would, with the parameter and the sizes that work.
    """
    cut = [spec for spec in specs.values() if spec.shard_dim is not None]
    failing = [name for name, spec in specs.items() if spec.shard_dim is not None and not spec.can_be_cut_over(tp_size)]
    if tp_size >= 1 and not failing:
        return
    smallest = min(failing, key=lambda name: specs[name].num_units)
    largest = min((spec.num_units * spec.num_subunits for spec in cut), default=1)
    working = [str(tp) for tp in range(1, largest + 1) if all(spec.can_be_cut_over(tp) for spec in cut)]
    spec = specs[smallest]
    finer = f", and each of these only into equal parts of its {spec.num_subunits}" if spec.num_subunits > 1 else ""
    raise LayoutError(
        f"this model cannot be cut over tp {tp_size}: {smallest} {list(spec.shape)} can be cut into "
        f"{spec.num_units} along axis {spec.shard_dim}{finer}, and in chunks of equal size but for the last a "
        f"rank would be left with none. tp sizes that work: {', '.join(working)}"
    )


def describe_imbalance(specs: Mapping[str, ParameterSpec], tp_size: int) -> str | None:
    """Describe in a line how unequal the ranks' parts are; ``None`` if tp divides everything."""
    uneven: dict[str, str] = {}
    for name, spec in specs.items():
        size = spec.num_units
        if spec.shard_dim is not None and spec.ranks_per_unit(tp_size) == 1 and size % tp_size:
            parts = [stop - start for start, stop in (chunk_bounds(size, tp_size, rank) for rank in range(tp_size))]
            uneven.setdefault(name.rsplit(".", 2)[-2], f"{size} as {' + '.join(map(str, parts))}")
    if not uneven:
        return None
    return f"tp {tp_size} cuts unevenly: " + ", ".join(f"{name} {sizes}" for name, sizes in uneven.items())
