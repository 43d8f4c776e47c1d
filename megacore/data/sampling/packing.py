"""Packing: which conversations share a row, so that rows are nearly full."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class PackedRows:
    """Items in rows.

    Attributes:
        items: the numbers of the items, row after row.
        starts: row ``r`` is ``items[starts[r] : starts[r + 1]]``; int64, ``[rows + 1]``.
    """

    items: NDArray[np.integer]
    starts: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, row: int) -> NDArray[np.integer]:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        return self.items[self.starts[row] : self.starts[row + 1]]


class _Filling(NamedTuple):
    """What rows that are filled alike hold: ``copies`` items of ``length``, after those of ``before``."""

    before: _Filling | None
    length: int
    copies: int


def pack(lengths: NDArray[np.integer], capacity: int) -> PackedRows:
    """Put items into rows of ``capacity``, by best-fit decreasing: the longest first, each where it leaves least room.

    Items of one length are alike, so what is worked on is the number of items of each length and the rows that are
    filled alike, as in Krell et al., 2021, arXiv:2107.02027: the time depends on ``capacity``, but for one sort of the
    lengths. The outcome depends on nothing but the arguments. Items of the same length keep their order.

    Args:
        lengths: of the items, ``[items]``, each from 1 to ``capacity``.
    """
    assert len(lengths) == 0 or (lengths.min() >= 1 and lengths.max() <= capacity)
    numbers_by_length = np.bincount(lengths, minlength=capacity + 1)
    # Rows by the room that they have left; each entry is a number of rows that are filled alike.
    open_rows: dict[int, list[tuple[int, _Filling | None]]] = {}
    rooms = 0  # bit n is set where some row has room n

    def put(number: int, room: int, filling: _Filling | None) -> None:
        nonlocal rooms
        open_rows.setdefault(room, []).append((number, filling))
        rooms |= 1 << room

    for length in range(capacity, 0, -1):
        left = int(numbers_by_length[length])
        while left:
            fitting = rooms >> length
            if fitting:
                room = length + (fitting & -fitting).bit_length() - 1
                number, filling = open_rows[room].pop()
                if not open_rows[room]:
                    rooms &= ~(1 << room)
            else:
                room, number, filling = capacity, left, None  # as many new rows as could be needed
            # A row that took one is the one with the least room for the next, until it has none.
            copies = room // length
            num_filled = min(number, left // copies)
            if num_filled:
                put(num_filled, room - copies * length, _Filling(filling, length, copies))
                left -= num_filled * copies
            if left and num_filled < number:
                put(1, room - left * length, _Filling(filling, length, left))
                num_filled, left = num_filled + 1, 0
            if filling is not None and num_filled < number:
                put(number - num_filled, room, filling)
    return _numbered(lengths, numbers_by_length, open_rows)


def _numbered(
    lengths: NDArray[np.integer],
    numbers_by_length: NDArray[np.integer],
    open_rows: dict[int, list[tuple[int, _Filling | None]]],
) -> PackedRows:
    """The rows with the numbers of their items: those of each length are dealt out in their order."""
    by_length = np.argsort(lengths, kind="stable")
    if len(lengths) < 2**31:
        by_length = by_length.astype(np.int32)  # half the memory
    items = np.empty_like(by_length)
    next_of_length = np.cumsum(numbers_by_length) - numbers_by_length
    num_items, sizes = 0, []
    for room in sorted(open_rows):
        for number, filling in open_rows[room]:
            columns = []
            while filling is not None:
                first, count = int(next_of_length[filling.length]), number * filling.copies
                next_of_length[filling.length] += count
                columns.append(by_length[first : first + count].reshape(number, filling.copies))
                filling = filling.before
            size = sum(column.shape[1] for column in columns)
            rows = items[num_items : num_items + number * size].reshape(number, size)
            np.concatenate(columns[::-1], axis=1, out=rows)
            num_items += number * size
            sizes.append(np.full(number, size, np.int32))
    starts = np.zeros(sum(map(len, sizes)) + 1, np.int64)
    if sizes:
        np.cumsum(np.concatenate(sizes), out=starts[1:])
    return PackedRows(items, starts)
