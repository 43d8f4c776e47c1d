"""Lazy matrices: whatever is put together of them reads as the same indexing of plain tensors does."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from megacore.checkpoint.matrix import (
    Cast,
    ColumnsOf,
    ConcatenatedColumns,
    ConcatenatedRows,
    LazyMatrix,
    RowsOf,
    StoredMatrix,
    block_of,
    compose_rows,
    num_rows,
)
from megacore.errors import CheckpointError

SEEDS = range(60)


@dataclass
class Pair:
    """A lazy matrix, and the plain tensor that it stands for."""

    lazy: LazyMatrix
    plain: Tensor


class Generator:
    """Random compositions of every kind of lazy matrix, reproducible by a seed."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.next_number = 0

    def stored(self, rows: int, columns: int) -> Pair:
        """A matrix in which no number occurs twice, so that no mistake in its order goes unseen."""
        numbers = torch.arange(self.next_number, self.next_number + rows * columns, dtype=torch.float64)
        self.next_number += rows * columns
        plain = numbers.view(rows, columns)
        return Pair(StoredMatrix(rows, columns, plain.dtype, lambda: plain.flatten()), plain)

    def range_of(self, size: int) -> slice:
        start = self.random.randrange(size)
        return slice(start, self.random.randint(start + 1, size))

    def rows_of(self, size: int) -> slice | Tensor:
        if self.random.random() < 0.5:
            return self.range_of(size)
        return torch.tensor([self.random.randrange(size) for _ in range(self.random.randint(1, 2 * size))])

    def matrix(self, depth: int, rows: int | None = None, columns: int | None = None) -> Pair:
        """A composition ``depth`` deep, of a given number of rows or columns where its neighbours need that."""
        if depth == 0:
            return self.stored(rows or self.random.randint(1, 6), columns or self.random.randint(1, 6))
        kinds = ["stored", "below", "beside"]
        kinds += ["rows"] if rows is None else []
        kinds += ["columns"] if columns is None else []
        match self.random.choice(kinds):
            case "rows":
                base = self.matrix(depth - 1, columns=columns)
                chosen = self.rows_of(base.lazy.rows)
                return Pair(RowsOf(base.lazy, chosen), base.plain[chosen])
            case "columns":
                base = self.matrix(depth - 1, rows=rows)
                chosen = self.range_of(base.lazy.columns)
                return Pair(ColumnsOf(base.lazy, chosen), base.plain[:, chosen])
            case "below" if rows is None:
                width = columns or self.random.randint(1, 6)
                parts = [self.matrix(depth - 1, columns=width) for _ in range(self.random.randint(1, 3))]
                return Pair(ConcatenatedRows([p.lazy for p in parts]), torch.cat([p.plain for p in parts]))
            case "beside" if columns is None:
                height = rows or self.random.randint(1, 6)
                parts = [self.matrix(depth - 1, rows=height) for _ in range(self.random.randint(1, 3))]
                return Pair(ConcatenatedColumns([p.lazy for p in parts]), torch.cat([p.plain for p in parts], dim=1))
            case _:
                return self.stored(rows or self.random.randint(1, 6), columns or self.random.randint(1, 6))


def compositions(seed: int) -> Iterator[tuple[Generator, Pair]]:
    generator = Generator(seed)
    for depth in range(1, 6):
        yield generator, generator.matrix(depth)


# --- any composition


@pytest.mark.parametrize("seed", SEEDS)
def test_a_composition_has_the_shape_and_the_elements_of_plain_indexing(seed):
    for _, pair in compositions(seed):
        assert (pair.lazy.rows, pair.lazy.columns) == tuple(pair.plain.shape)
        whole = pair.lazy.read(slice(0, pair.lazy.rows), slice(0, pair.lazy.columns))
        assert torch.equal(whole, pair.plain)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_block_of_a_composition_is_the_block_of_the_plain_tensor(seed):
    for generator, pair in compositions(seed):
        rows, columns = generator.rows_of(pair.lazy.rows), generator.range_of(pair.lazy.columns)
        expected = pair.plain[rows][:, columns]

        assert torch.equal(pair.lazy.read(rows, columns), expected)

        block = block_of(pair.lazy, rows, columns)
        assert torch.equal(block.read(slice(0, block.rows), slice(0, block.columns)), expected)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_cast_may_come_anywhere_in_a_composition(seed):
    for generator, pair in compositions(seed):
        cast = Cast(pair.lazy, torch.float32, "matrix")
        chosen = generator.rows_of(cast.rows)
        read = RowsOf(cast, chosen).read(slice(0, num_rows(chosen)), slice(0, cast.columns))

        assert read.dtype == cast.dtype == torch.float32
        assert torch.equal(read, pair.plain[chosen].to(torch.float32))


def test_the_random_compositions_contain_every_kind_of_matrix():
    kinds = {type(pair.lazy) for seed in SEEDS for _, pair in compositions(seed)}
    assert kinds == {StoredMatrix, RowsOf, ColumnsOf, ConcatenatedRows, ConcatenatedColumns}


# --- one at a time


def test_nothing_is_loaded_until_a_block_is_read():
    loads = []

    def load() -> Tensor:
        loads.append(1)
        return torch.arange(12.0)

    matrix = ConcatenatedRows([RowsOf(StoredMatrix(4, 3, torch.float32, load), slice(1, 3))] * 2)
    assert loads == []
    matrix.read(slice(0, 1), slice(0, 3))
    assert loads == [1]


def test_a_part_that_a_block_does_not_touch_is_not_loaded():
    def load() -> Tensor:
        raise AssertionError("not needed")

    needed = StoredMatrix(2, 3, torch.float32, lambda: torch.arange(6.0))
    other = StoredMatrix(2, 3, torch.float32, load)

    assert ConcatenatedRows([needed, other]).read(slice(0, 2), slice(0, 3)).shape == (2, 3)
    assert ConcatenatedRows([other, needed]).read(torch.tensor([3, 2, 3]), slice(0, 3)).shape == (3, 3)
    assert ConcatenatedColumns([needed, other]).read(torch.tensor([1, 0]), slice(0, 3)).shape == (2, 3)


def test_a_block_of_a_stored_matrix_is_a_view_and_not_a_copy():
    tensor = torch.arange(12.0).view(4, 3)
    block = StoredMatrix(4, 3, torch.float32, lambda: tensor).read(slice(1, 3), slice(1, 3))
    assert block.data_ptr() == tensor[1, 1].data_ptr()


def test_casting_rounds_as_torch_does():
    values = torch.tensor([[1.0, 1.0 + 2**-9, 3.3e38, -0.0, float("inf")]])
    matrix = StoredMatrix(1, 5, torch.float32, lambda: values)
    read = Cast(matrix, torch.bfloat16, "matrix").read(slice(0, 1), slice(0, 5))
    assert torch.equal(read, values.to(torch.bfloat16))
    assert torch.signbit(read[0, 3])


def test_the_whole_as_a_block_is_the_matrix_itself():
    matrix = StoredMatrix(4, 3, torch.float32, lambda: torch.arange(12.0))
    assert block_of(matrix, slice(0, 4), slice(0, 3)) is matrix


@pytest.mark.parametrize("seed", SEEDS)
def test_choosing_twice_is_choosing_once_what_the_choices_compose_to(seed):
    generator = Generator(seed)
    numbers = torch.arange(generator.random.randint(1, 40))
    first = generator.rows_of(len(numbers))
    second = generator.rows_of(num_rows(first))

    composed = compose_rows(first, second)

    assert torch.equal(numbers[composed], numbers[first][second])
    assert num_rows(composed) == len(numbers[first][second])


@pytest.mark.parametrize("join", [ConcatenatedRows, ConcatenatedColumns])
def test_parts_that_do_not_fit_together_are_a_mistake_of_the_program(join):
    one = StoredMatrix(2, 3, torch.float32, lambda: torch.arange(6.0))
    for other in (
        StoredMatrix(3, 2, torch.float32, lambda: torch.arange(6.0)),
        StoredMatrix(2, 3, torch.float64, lambda: torch.arange(6.0)),
    ):
        with pytest.raises(AssertionError):
            join([one, other])


def test_a_number_that_the_dtype_has_no_place_for_is_refused_and_infinities_pass():
    stored = torch.tensor([[1.0, 1e6, float("inf")]])
    matrix = StoredMatrix(1, 3, stored.dtype, lambda: stored)

    with pytest.raises(CheckpointError, match="norm has numbers beyond the range of float16: use bf16"):
        Cast(matrix, torch.float16, "norm").read(slice(0, 1), slice(0, 3))
    assert Cast(matrix, torch.float16, "norm").read(slice(0, 1), slice(2, 3)).isinf().all()
