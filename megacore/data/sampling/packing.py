"""Packing of conversations into rows that are nearly full."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class PackedRows:
    """The item numbers of each row: row ``r`` is ``items[starts[r] : starts[r + 1]]``."""

    items: NDArray[np.integer]
    starts: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, row: int) -> NDArray[np.integer]:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        return self.items[self.starts[row] : self.starts[row + 1]]


class _Filling(NamedTuple):
    """The contents of rows that are filled alike: ``copies`` items of ``length``, after those of ``before``."""

    before: _Filling | None
    length: int
    copies: int


def pack(lengths: NDArray[np.integer], capacity: int) -> PackedRows:
    """Pack items into rows by best-fit decreasing: the longest first, each where it leaves the least room.

    Items of one length are alike, so the algorithm works on the number of items of each length and on groups of rows
    that are filled alike, as in Krell et al., 2021, arXiv:2107.02027. Apart from one sort of the lengths, its time
    depends on ``capacity`` only. The result depends on the arguments alone. Items of the same length keep their order.

    ``lengths``, ``[items]``, are from 1 to ``capacity``, the length of a row.
    """
    assert len(lengths) == 0 or (lengths.min() >= 1 and lengths.max() <= capacity)
    numbers_by_length = np.bincount(lengths, minlength=capacity + 1)
    # The rows with each amount of free room; an entry is a number of rows that are filled alike.
    open_rows: dict[int, list[tuple[int, _Filling | None]]] = {}
    rooms = 0  # bit n is set if some row has room n

    def add_rows(number: int, room: int, filling: _Filling | None) -> None:
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
            # After taking an item, a row has the least room for the next one, until it has none.
            copies = room // length
            num_filled = min(number, left // copies)
            if num_filled:
                add_rows(num_filled, room - copies * length, _Filling(filling, length, copies))
                left -= num_filled * copies
            if left and num_filled < number:
                add_rows(1, room - left * length, _Filling(filling, length, left))
                num_filled, left = num_filled + 1, 0
            if filling is not None and num_filled < number:
                add_rows(number - num_filled, room, filling)
    return _assign_items(lengths, numbers_by_length, open_rows)


def _assign_items(
    lengths: NDArray[np.integer],
    numbers_by_length: NDArray[np.integer],
    open_rows: dict[int, list[tuple[int, _Filling | None]]],
) -> PackedRows:
    """Return the rows with their item numbers: the items of each length are assigned in order."""
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
