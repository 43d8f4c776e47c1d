"""Lazy matrices, which are read block by block.

Converting, splitting, merging, loading and exporting are the same operation: rows and columns of stored matrices are
rearranged into other matrices. A :class:`LazyMatrix` describes the result without holding it; reading a block touches
only the bytes of that block. Stored tensors are memory-mapped, so a block of one is a view.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from megacore.errors import CheckpointError
from megacore.parallel import Rows

_COMPARED_ROWS = 1024


class LazyMatrix(ABC):
    """A matrix of ``rows`` × ``columns`` elements of ``dtype`` that exists only while a block of it is read."""

    def __init__(self, rows: int, columns: int, dtype: torch.dtype) -> None:
        self.rows = rows
        self.columns = columns
        self.dtype = dtype

    @abstractmethod
    def read(self, rows: Rows, columns: slice) -> Tensor:
        """Return block ``[rows, columns]``. Slices have explicit bounds and step 1; the result may be a view."""


class StoredMatrix(LazyMatrix):
    """A whole tensor, in a file for example. ``load`` is called for each block and must not copy or read the data."""

    def __init__(self, rows: int, columns: int, dtype: torch.dtype, load: Callable[[], Tensor]) -> None:
        super().__init__(rows, columns, dtype)
        self._load = load

    def read(self, rows: Rows, columns: slice) -> Tensor:
        block = self._load().view(self.rows, self.columns)[:, columns]
        return block[rows] if isinstance(rows, slice) else block.index_select(0, rows)


def as_matrix(tensor: Tensor) -> StoredMatrix:
    """Return a tensor of one or two dimensions, with any strides, as a matrix; a vector of n is ``[n, 1]``."""
    rows, columns = tensor.shape if tensor.dim() == 2 else (len(tensor), 1)
    return StoredMatrix(rows, columns, tensor.dtype, lambda: tensor)


class RowsOf(LazyMatrix):
    """A selection of the rows of another matrix, in any order."""

    def __init__(self, base: LazyMatrix, chosen: Rows) -> None:
        super().__init__(num_rows(chosen), base.columns, base.dtype)
        self._base = base
        self._chosen = chosen

    def read(self, rows: Rows, columns: slice) -> Tensor:
        return self._base.read(compose_rows(self._chosen, rows), columns)


class ColumnsOf(LazyMatrix):
    """A range of columns of another matrix."""

    def __init__(self, base: LazyMatrix, chosen: slice) -> None:
        super().__init__(base.rows, chosen.stop - chosen.start, base.dtype)
        self._base = base
        self._first = chosen.start

    def read(self, rows: Rows, columns: slice) -> Tensor:
        return self._base.read(rows, slice(self._first + columns.start, self._first + columns.stop))


class Cast(LazyMatrix):
    """Another matrix in another dtype; ``name`` is for the error when a number is out of its range."""

    def __init__(self, base: LazyMatrix, dtype: torch.dtype, name: str) -> None:
        super().__init__(base.rows, base.columns, dtype)
        self._base = base
        self._name = name

    def read(self, rows: Rows, columns: slice) -> Tensor:
        return cast(self._base.read(rows, columns), self.dtype, self._name)


class ConcatenatedRows(LazyMatrix):
    """Matrices of equal width, one below the other."""

    def __init__(self, parts: Sequence[LazyMatrix]) -> None:
        super().__init__(sum(part.rows for part in parts), parts[0].columns, parts[0].dtype)
        assert all(part.columns == self.columns and part.dtype == self.dtype for part in parts)
        self._parts = parts
        self._firsts = list(accumulate((part.rows for part in parts[:-1]), initial=0))

    def read(self, rows: Rows, columns: slice) -> Tensor:
        if isinstance(rows, slice):
            pieces = [
                part.read(overlap, columns)
                for part, first in zip(self._parts, self._firsts, strict=True)
                if (overlap := _overlap(rows, first, part.rows)) is not None
            ]
            return pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        result = torch.empty(len(rows), columns.stop - columns.start, dtype=self.dtype)
        for part, first in zip(self._parts, self._firsts, strict=True):
            here = ((rows >= first) & (rows < first + part.rows)).nonzero().flatten()
            if len(here):
                result.index_copy_(0, here, part.read(rows[here] - first, columns))
        return result


class ConcatenatedColumns(LazyMatrix):
    """Matrices of equal height, side by side."""

    def __init__(self, parts: Sequence[LazyMatrix]) -> None:
        super().__init__(parts[0].rows, sum(part.columns for part in parts), parts[0].dtype)
        assert all(part.rows == self.rows and part.dtype == self.dtype for part in parts)
        self._parts = parts
        self._firsts = list(accumulate((part.columns for part in parts[:-1]), initial=0))

    def read(self, rows: Rows, columns: slice) -> Tensor:
        pieces = [
            part.read(rows, overlap)
            for part, first in zip(self._parts, self._firsts, strict=True)
            if (overlap := _overlap(columns, first, part.columns)) is not None
        ]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)


def cast(block: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """Return ``block`` of ``name`` in ``dtype``. Raises :class:`CheckpointError` if a number becomes infinite."""
    if block.dtype == dtype:
        return block
    converted = block.to(dtype)
    if bool((converted.isinf() & ~block.isinf()).any()):
        raise CheckpointError(f"{name} has numbers beyond the range of {str(dtype).removeprefix('torch.')}: use bf16")
    return converted


def equal_matrices(first: LazyMatrix, second: LazyMatrix) -> bool:
    """Return whether two matrices of one shape hold the same numbers; a block of rows is compared at a time."""
    columns = slice(0, first.columns)
    blocks = (slice(start, min(start + _COMPARED_ROWS, first.rows)) for start in range(0, first.rows, _COMPARED_ROWS))
    return all(torch.equal(first.read(rows, columns), second.read(rows, columns)) for rows in blocks)


def num_rows(rows: Rows) -> int:
    """Return the number of rows that an index selects."""
    return rows.stop - rows.start if isinstance(rows, slice) else len(rows)


def compose_rows(chosen: Rows, rows: Rows) -> Rows:
    """Return the index of the rows that ``rows`` selects among those that ``chosen`` has selected."""
    if isinstance(chosen, Tensor):
        selected: Tensor = chosen[rows]
        return selected
    if isinstance(rows, slice):
        return slice(chosen.start + rows.start, chosen.start + rows.stop)
    return rows.add(chosen.start)


def block_of(matrix: LazyMatrix, rows: Rows, columns: slice) -> LazyMatrix:
    """Return block ``[rows, columns]`` of ``matrix``, without reading it."""
    if columns != slice(0, matrix.columns):
        matrix = ColumnsOf(matrix, columns)
    if isinstance(rows, slice) and rows == slice(0, matrix.rows):
        return matrix
    return RowsOf(matrix, rows)


def _overlap(wanted: slice, first: int, size: int) -> slice | None:
    """Return the part of ``wanted`` within the ``size`` rows from ``first``, relative to ``first``."""
    start, stop = max(wanted.start - first, 0), min(wanted.stop - first, size)
    return slice(start, stop) if start < stop else None
