"""Which dataset of a weighted mixture each sample is taken from: its weight's share, to one sample, at every point."""

from __future__ import annotations

import heapq
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import combinations
from math import lcm
from typing import NamedTuple

LONGEST_PERIOD = 2**18
"""Sequences that repeat within so many positions are laid down once, in a table of up to 2 MB."""


class Turn(NamedTuple):
    """What comes at a position of a mixture."""

    dataset: int
    """Its number, in the order of the weights."""
    number: int
    """How many times its turn came before."""


class Mixture:
    """Deals the positions ``0, 1, 2, …`` out to datasets by weight; ``mixture[n]`` depends on ``n`` alone.

    Of the first ``n`` positions, for **every** ``n``, dataset ``i`` has ``w_i * n`` but for less than ``bound``, where
    ``w_i`` is its weight over the sum of all. No position is replayed to find another one, and nothing is stored that
    grows with the number of positions. There are two ways, by the weights:

    * The sequence repeats as soon as all ``w_i * n`` are whole: with weights of up to five digits, within
      :data:`LONGEST_PERIOD` positions. Then one period is laid down, and ``bound`` is 1. See :func:`_period`.
    * Otherwise datasets are halves of pairs, pairs of pairs and so on, and a position is handed down from pair to half,
      see :func:`_pair_up`. With up to four datasets ``bound`` is below 1; with more it may be above.

    Attributes:
        bound: as above.

    Args:
        weights: positive, of any sum. A float counts as the decimal number that it prints as.
    """

    def __init__(self, weights: Sequence[Fraction | float | str]) -> None:
        exact = [Fraction(str(weight)) for weight in weights]
        if not exact or min(exact) <= 0:
            raise ValueError(f"the weights of a mixture are positive numbers, at least one, not {list(weights)}")
        shares = [weight / sum(exact) for weight in exact]
        self._length = lcm(*(share.denominator for share in shares))
        self._in_period = [int(share * self._length) for share in shares]
        self._table: tuple[array[int], array[int]] | None = None
        self._pairs: _Node | None = None
        self.bound = 1.0
        if self._length <= LONGEST_PERIOD:
            self._table = _period(self._in_period)
        else:
            self._pairs, self.bound = _pair_up(self._in_period)

    def __getitem__(self, position: int) -> Turn:
        if position < 0:
            raise IndexError(f"position {position}; positions are counted from 0")
        if self._pairs is not None:
            return _handed_down(self._pairs, position)
        assert self._table is not None
        datasets, numbers = self._table
        periods, place = divmod(position, self._length)
        return Turn(datasets[place], periods * self._in_period[datasets[place]] + numbers[place])


def _period(turns: Sequence[int]) -> tuple[array[int], array[int]]:
    """A sequence of ``sum(turns)`` positions: the dataset at each, and how many times it was there before.

    Dataset ``i``, whose share is ``w = turns[i] / sum(turns)``, stays within one of ``w * n`` if, and only if, each
    turn ``j`` of it, counted from 0, lies in the window of positions ``floor(j / w)`` to ``ceil((j + 1) / w) - 1``.
    That all windows can be kept is shown by Baruah, Cohen, Plaxton and Varvel, "Proportionate Progress: A Notion of
    Fairness in Resource Allocation", Algorithmica 15 (1996); with one turn at a time, taking the one whose window ends
    first, of those whose window has begun, keeps them.
    """
    length = sum(turns)
    datasets, numbers = array("l"), array("l")
    begins = [(0, dataset, 0) for dataset in range(len(turns))]
    due: list[tuple[int, int, int]] = []
    for position in range(length):
        while begins and begins[0][0] <= position:
            _, dataset, number = heapq.heappop(begins)
            heapq.heappush(due, (-(-(number + 1) * length // turns[dataset]), dataset, number))
        deadline, dataset, number = heapq.heappop(due)
        assert position < deadline
        datasets.append(dataset)
        numbers.append(number)
        if number + 1 < turns[dataset]:
            heapq.heappush(begins, ((number + 1) * length // turns[dataset], dataset, number + 1))
    return datasets, numbers


@dataclass(frozen=True)
class _Node:
    """A dataset, or a pair of nodes that shares out its own positions between them."""

    weight: int
    dataset: int | None = None
    halves: tuple[_Node, _Node] | None = None


def _handed_down(node: _Node, position: int) -> Turn:
    while node.halves is not None:
        left, right = node.halves
        # Of its first n positions the left half has n * left.weight / node.weight, rounded to the nearest.
        before, after = ((2 * n * left.weight + node.weight) // (2 * node.weight) for n in (position, position + 1))
        node, position = (left, before) if after > before else (right, position - before)
    assert node.dataset is not None
    return Turn(node.dataset, position)


def _pair_up(weights: Sequence[int]) -> tuple[_Node, float]:
    """The root of a tree of pairs, and the bound that it keeps.

    Rounding in a pair is an error of up to 1/2 for either half, which its parts inherit in proportion to their weight:
    a dataset of weight ``w`` ends up with at most ``(1 + sum(w / weight of each pair above it but the root)) / 2``.
    Those two nodes are paired first whose pair adds least to the largest of these sums.
    """
    nodes = [(_Node(weight, dataset=dataset), [(weight, 0.0)]) for dataset, weight in enumerate(weights)]
    while len(nodes) > 2:
        _, _, first, second = min(
            (max(sum_ + weight / total for weight, sum_ in one[1] + other[1]), total, i, j)
            for (i, one), (j, other) in combinations(enumerate(nodes), 2)
            for total in (one[0].weight + other[0].weight,)
        )
        total = nodes[first][0].weight + nodes[second][0].weight
        leaves = [(weight, sum_ + weight / total) for weight, sum_ in nodes[first][1] + nodes[second][1]]
        pair = _Node(total, halves=(nodes[first][0], nodes[second][0]))
        nodes = [node for i, node in enumerate(nodes) if i not in (first, second)] + [(pair, leaves)]
    bound = (1 + max(sum_ for _, leaves in nodes for _, sum_ in leaves)) / 2
    return _Node(sum(weights), halves=(nodes[0][0], nodes[1][0])), bound
