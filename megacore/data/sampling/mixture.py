"""A weighted mixture of datasets in which each has its share, to within one sample, at every point of a run."""

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
"""Limits of the number of positions, a power of two, that are assigned at once, in about 10 ms to 3 s. The order of
samples depends on it."""


class Turn(NamedTuple):
    """The dataset of one position, in the order of the weights, and the number of its earlier positions."""

    dataset: int
    number: int


class Mixture:
    """Assigns the positions ``0, 1, 2, …`` to datasets by weight; ``mixture[n]`` depends on ``n`` alone.

    For **every** ``n``, dataset ``i`` has ``w_i * n`` of the first ``n`` positions, to within less than 1, where
    ``w_i`` is its weight divided by the sum of all weights. Earlier positions are not visited, and memory does not grow
    with the number of positions.

    In other words, turn ``j`` of dataset ``i``, counted from 0, lies in its *window* of positions,
    ``floor(j / w_i)`` to ``ceil((j + 1) / w_i) - 1``. Baruah, Cohen, Plaxton and Varvel, "Proportionate Progress: A
    Notion of Fairness in Resource Allocation", Algorithmica 15 (1996), show that this is possible for all turns of all
    datasets. Here positions are cut into blocks at least as long as the longest window. The number of turns before a
    block follows from its position alone (:meth:`_turns_before`). Within a block each position goes to the dataset
    whose window ends first, which keeps all windows if any assignment does.

    Args:
        weights: Positive weights of any sum. A float stands for the decimal number that it prints as.

    Raises:
        DataError: A dataset has less than one sample in about a million, for which blocks would be too long.
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
        """Return the dataset at each position of a block, and the number of its earlier positions."""
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
        """Return the number of turns of each dataset before ``position``: its share, rounded down or up.

        The share is rounded up for a dataset whose *current* turn, of which the share holds a fraction, is before the
        position. Two conditions make it possible to keep all windows. For the windows after the position: among the
        datasets whose windows end last, however many are considered, at most the sum of their fractions, rounded up,
        may be rounded up, so that not too many urgent turns are left. For the windows before it: among the datasets
        whose windows began first, at least the sum of their fractions, rounded down, must be rounded up. (Both follow
        from Hall's theorem: compare the turns that must lie in an interval of positions with its length, for intervals
        that begin or end at this position.)

        The fractions themselves satisfy these bounds, which are on two nested families of sets; therefore whole numbers
        do too (integrality of flows). The fractions are laid end to end twice, in the order of the windows' ends and in
        that of their beginnings, and both rows are cut into cells of length 1: each cell takes one of the datasets that
        it touches.
        """
        shares = [divmod(weight * position, self._total) for weight in self._weights]
        counts = [count for count, _ in shares]
        fractions = {dataset: fraction for dataset, (_, fraction) in enumerate(shares) if fraction}
        # A stable sort: datasets with the same end or beginning keep their order.
        by_end = sorted(fractions, key=lambda dataset: self._end(dataset, counts[dataset]))
        by_begin = sorted(fractions, key=lambda dataset: self._begin(dataset, counts[dataset]))
        for dataset in _match_cells(self._cells(by_end, fractions), self._cells(by_begin, fractions)):
            counts[dataset] += 1
        return counts

    def _begin(self, dataset: int, number: int) -> int:
        """Return the first position of the window of a turn."""
        return number * self._total // self._weights[dataset]

    def _end(self, dataset: int, number: int) -> int:
        """Return the position after the window of a turn."""
        return -(-(number + 1) * self._total // self._weights[dataset])

    def _cells(self, order: Iterable[int], fractions: dict[int, int]) -> list[list[int]]:
        """Return the datasets that touch each cell when their fractions are laid end to end."""
        cells: list[list[int]] = [[] for _ in range(sum(fractions.values()) // self._total)]
        start = 0
        for dataset in order:
            stop = start + fractions[dataset]
            for cell in range(start // self._total, (stop - 1) // self._total + 1):
                cells[cell].append(dataset)
            start = stop
        return cells


def _match_cells(first: list[list[int]], second: list[list[int]]) -> list[int]:
    """Select members so that each cell of either row is matched with one of its own members, none twice in a row.

    The selection is a flow from the cells of one row through the members to the cells of the other, found by augmenting
    paths (Ford and Fulkerson, 1956). It is written here, since it decides the order of samples, which must not change
    with the version of a library.
    """
    source, sink = ("source", 0), ("sink", 0)
    # The residual graph: the successors of each node, in a dictionary instead of a set for its order.
    residual: dict[tuple[str, int], dict[tuple[str, int], None]] = {source: {}, sink: {}}

    def connect(start: tuple[str, int], stop: tuple[str, int]) -> None:
        residual.setdefault(start, {})[stop] = None
        residual.setdefault(stop, {})

    for cell, members in enumerate(first):
        connect(source, ("first", cell))
        for member in members:
            connect(("first", cell), ("enter", member))
            connect(("enter", member), ("leave", member))
    for cell, members in enumerate(second):
        for member in members:
            connect(("leave", member), ("second", cell))
        connect(("second", cell), sink)
    for _ in first:
        predecessor = {source: source}
        queue = deque([source])
        while sink not in predecessor:
            node = queue.popleft()
            for following in residual[node]:
                if following not in predecessor:
                    predecessor[following] = node
                    queue.append(following)
        node = sink
        while node != source:
            previous = predecessor[node]
            del residual[previous][node]
            residual[node][previous] = None
            node = previous
    return [
        number for (kind, number), following in residual.items() if kind == "leave" and ("enter", number) in following
    ]
