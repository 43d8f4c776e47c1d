"""Which dataset of a weighted mixture each sample is taken from: its weight's share, to one sample, at every point."""

from __future__ import annotations

import heapq
from array import array
from collections import deque
from collections.abc import Iterable, Sequence
from fractions import Fraction
from functools import lru_cache
from math import lcm
from typing import NamedTuple

from megacore.errors import DataError

SHORTEST_BLOCK, LONGEST_BLOCK = 2**12, 2**20
"""Positions that are dealt out together, a power of two between these; it takes some 10 ms to 3 s. The order of samples
depends on it."""


class Turn(NamedTuple):
    """What comes at a position of a mixture."""

    dataset: int
    """Its number, in the order of the weights."""
    number: int
    """How many times its turn came before."""


class Mixture:
    """Deals the positions ``0, 1, 2, …`` out to datasets by weight; ``mixture[n]`` depends on ``n`` alone.

    Of the first ``n`` positions, for **every** ``n``, dataset ``i`` has ``w_i * n`` but for less than 1, where ``w_i``
    is its weight over the sum of all. No position before the one that is asked for is gone through, and nothing is kept
    that grows with the number of positions.

    In other words, turn ``j`` of dataset ``i``, counted from 0, lies in its *window* of positions,
    ``floor(j / w_i)`` to ``ceil((j + 1) / w_i) - 1``. That this can be had for all turns of all datasets is shown by
    Baruah, Cohen, Plaxton and Varvel, "Proportionate Progress: A Notion of Fairness in Resource Allocation",
    Algorithmica 15 (1996). Here the positions are cut into blocks, as long as the longest window. How many turns each
    dataset had at the start of a block follows from the place alone, see :meth:`_turns_before`; the turns within a
    block are then given to the dataset whose window ends first, which keeps all windows if anything does.

    Args:
        weights: positive, of any sum. A float counts as the decimal number that it prints as.

    Raises:
        DataError: when a dataset has less than one sample in about a million, for which blocks would be too long.
    """

    def __init__(self, weights: Sequence[Fraction | float | str]) -> None:
        exact = [Fraction(str(weight)) for weight in weights]
        if not exact or min(exact) <= 0:
            raise ValueError(f"the weights of a mixture are positive numbers, at least one, not {list(weights)}")
        shares = [weight / sum(exact) for weight in exact]
        # The share of dataset i is _weights[i] / _total.
        self._total = lcm(*(share.denominator for share in shares))
        self._weights = [int(share * self._total) for share in shares]
        self._block_length = SHORTEST_BLOCK
        while self._block_length < 1 / min(shares) + 2:  # no window is longer
            self._block_length *= 2
        if self._block_length > LONGEST_BLOCK:
            raise DataError(
                f"a dataset of the mixture has the weight {min(exact)} of {sum(exact)}, less than one sample in "
                f"{LONGEST_BLOCK - 2:,}: leave it out, or give it more"
            )
        self._block = lru_cache(maxsize=2)(self._deal)

    def __getitem__(self, position: int) -> Turn:
        if position < 0:
            raise IndexError(f"position {position}; positions are counted from 0")
        block, place = divmod(position, self._block_length)
        datasets, numbers = self._block(block)
        return Turn(datasets[place], numbers[place])

    def _deal(self, block: int) -> tuple[array[int], array[int]]:
        """The dataset at each position of a block, and how many times its turn came before."""
        start, stop = block * self._block_length, (block + 1) * self._block_length
        numbers, stops = self._turns_before(start), self._turns_before(stop)
        datasets, turns = array("l"), array("q")
        begins = [(self._begin(i, number), i) for i, number in enumerate(numbers) if number < stops[i]]
        heapq.heapify(begins)
        due: list[tuple[int, int]] = []
        for position in range(start, stop):
            while begins and begins[0][0] <= position:
                _, dataset = heapq.heappop(begins)
                heapq.heappush(due, (self._end(dataset, numbers[dataset]), dataset))
            end, dataset = heapq.heappop(due)
            assert position < end
            datasets.append(dataset)
            turns.append(numbers[dataset])
            numbers[dataset] += 1
            if numbers[dataset] < stops[dataset]:
                heapq.heappush(begins, (self._begin(dataset, numbers[dataset]), dataset))
        return datasets, turns

    def _turns_before(self, position: int) -> list[int]:
        """How many turns each dataset has before ``position``: its share, rounded down or up.

        Rounded up is each whose *current* turn, the one that its share is a fraction of, was before the position. So
        that the windows of the turns after it can be kept, not too many of those may be left over whose windows end
        soon; and of those before it, not too many must have been crowded out whose windows had long begun. With the
        sum of the fractions of some datasets, rounded up, as the most of them that are rounded up, for those whose
        windows end last, however many, this holds; and with that sum, rounded down, as the least of them, for those
        whose windows began first. (Both by Hall's theorem: compare the turns that must lie in an interval of positions
        with its length, for intervals that begin, or end, at this position.)

        The fractions themselves keep all of these sums, which are of two nested families of sets; so whole numbers do
        too (the integrality of flows). The fractions are laid end to end twice, in the order of the windows' ends and
        of their beginnings, and both rows are cut into cells of 1: each cell takes one of the datasets that it touches.
        """
        shares = [divmod(weight * position, self._total) for weight in self._weights]
        counts = [count for count, _ in shares]
        current = [dataset for dataset, (_, fraction) in enumerate(shares) if fraction]
        fractions = {dataset: shares[dataset][1] for dataset in current}
        by_end = sorted(current, key=lambda dataset: (self._end(dataset, counts[dataset]), dataset))
        by_begin = sorted(current, key=lambda dataset: (self._begin(dataset, counts[dataset]), dataset))
        for dataset in _one_for_each(self._cells(by_end, fractions), self._cells(by_begin, fractions)):
            counts[dataset] += 1
        return counts

    def _begin(self, dataset: int, number: int) -> int:
        """The first position of the window of a turn."""
        return number * self._total // self._weights[dataset]

    def _end(self, dataset: int, number: int) -> int:
        """The position after the window of a turn."""
        return -(-(number + 1) * self._total // self._weights[dataset])

    def _cells(self, order: Iterable[int], fractions: dict[int, int]) -> list[list[int]]:
        """The datasets that touch each cell when their fractions are laid end to end."""
        cells: list[list[int]] = [[] for _ in range(sum(fractions.values()) // self._total)]
        start = 0
        for dataset in order:
            stop = start + fractions[dataset]
            for cell in range(start // self._total, (stop - 1) // self._total + 1):
                cells[cell].append(dataset)
            start = stop
        return cells


def _one_for_each(first: list[list[int]], second: list[list[int]]) -> list[int]:
    """Members, as many as there are cells in a row, of which each cell of either row can have one of its own.

    It is a flow from the cells of one row through the members to those of the other, found path by path (Ford and
    Fulkerson, 1956). What is chosen decides the order of samples, so it must not change with the version of a library.
    """
    source, sink = ("source", 0), ("sink", 0)
    # Which nodes can be gone to from each; a dictionary instead of a set, for its order.
    open_: dict[tuple[str, int], dict[tuple[str, int], None]] = {source: {}, sink: {}}

    def connect(start: tuple[str, int], stop: tuple[str, int]) -> None:
        open_.setdefault(start, {})[stop] = None
        open_.setdefault(stop, {})

    for cell, members in enumerate(first):
        connect(source, ("first", cell))
        for member in members:
            connect(("first", cell), ("into", member))
            connect(("into", member), ("out of", member))
    for cell, members in enumerate(second):
        for member in members:
            connect(("out of", member), ("second", cell))
        connect(("second", cell), sink)
    for _ in first:
        came_from = {source: source}
        waiting = deque([source])
        while sink not in came_from:
            node = waiting.popleft()
            for following in open_[node]:
                if following not in came_from:
                    came_from[following] = node
                    waiting.append(following)
        node = sink
        while node != source:
            before = came_from[node]
            del open_[before][node]
            open_[node][before] = None
            node = before
    return [number for (kind, number), following in open_.items() if kind == "out of" and ("into", number) in following]
