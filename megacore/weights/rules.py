"""Weight maps: a table of rules, one for each parameter, that names the tensors of a published checkpoint.

A rule names one native parameter and the source tensors that it is made of, and runs in both directions. It reorders
rows and never looks at the numbers; everything is lazy (:mod:`megacore.checkpoint.matrix`). ``*`` stands for the layer
number.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch

from megacore.checkpoint.matrix import ConcatenatedRows, LazyMatrix, RowsOf
from megacore.config import ModelConfig
from megacore.errors import PluginError


@dataclass(frozen=True)
class QKVOrder:
    """The row order of the fused QKV projection, and the number of query, key and value rows in the source."""

    native_from_source: torch.Tensor
    source_from_native: torch.Tensor
    part_rows: tuple[int, int, int]

    @classmethod
    def from_permutation(cls, config: ModelConfig, permutation: Sequence[int]) -> QKVOrder:
        """Prepare the result of the ``qkv_permutation`` hook. Raises :class:`PluginError` if it is no permutation."""
        query_rows = config.num_attention_heads * config.head_dim
        key_rows = config.num_kv_heads * config.head_dim
        expected = query_rows + 2 * key_rows
        order = torch.tensor(list(permutation), dtype=torch.int64)
        if len(order) != expected or not torch.equal(order.sort().values, torch.arange(expected)):
            raise PluginError(
                f"the plugin for {config.family} returned a qkv_permutation of {len(order)} entries that is not a "
                f"permutation of the {expected} rows of the QKV projection"
            )
        return cls(order, order.argsort(), (query_rows, key_rows, key_rows))


class Rule:
    """One native parameter and the source tensors it is made of: by default, equally many rows of each."""

    def __init__(self, native: str, sources: tuple[str, ...]) -> None:
        self.native = native
        self.sources = sources

    def source_rows(self, native_rows: int, order: QKVOrder) -> list[int]:
        """Return the number of rows of each source tensor if the native matrix has ``native_rows``."""
        return [native_rows // len(self.sources)] * len(self.sources)

    def to_native(self, parts: Sequence[LazyMatrix], order: QKVOrder) -> LazyMatrix:
        """Return the native matrix, made of the matrices of the sources."""
        return parts[0] if len(parts) == 1 else ConcatenatedRows(parts)

    def to_source(self, native: LazyMatrix, order: QKVOrder) -> list[LazyMatrix]:
        """Return the matrices of the sources, extracted from the native one."""
        if len(self.sources) == 1:
            return [native]
        bounds = accumulate(self.source_rows(native.rows, order), initial=0)
        return [RowsOf(native, slice(start, stop)) for start, stop in pairwise(bounds)]

    def for_layer(self, layer: int) -> Rule:
        """Return the same rule with ``*`` replaced by ``layer``."""
        rule = copy.copy(self)  # keeps the attributes that a plugin's own subclass adds
        rule.native = self.native.replace("*", str(layer))
        rule.sources = tuple(name.replace("*", str(layer)) for name in self.sources)
        return rule

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.native!r} ↔ {', '.join(map(repr, self.sources))})"


class Copy(Rule):
    """One source tensor, unchanged."""

    def __init__(self, native: str, source: str) -> None:
        super().__init__(native, (source,))


class Stacked(Rule):
    """Source tensors with equally many rows, concatenated in the order of the arguments: ``gate=…, up=…``."""

    def __init__(self, native: str, **parts: str) -> None:
        super().__init__(native, tuple(parts.values()))


class SwappedHalves(Rule):
    """One source tensor whose upper and lower halves are exchanged: ``[up; gate]`` in one tensor."""

    def __init__(self, native: str, source: str) -> None:
        super().__init__(native, (source,))

    def to_native(self, parts: Sequence[LazyMatrix], order: QKVOrder) -> LazyMatrix:
        return _swapped(parts[0])

    def to_source(self, native: LazyMatrix, order: QKVOrder) -> list[LazyMatrix]:
        return [_swapped(native)]


class FusedQKV(Rule):
    """The fused QKV projection, its rows in the order of the ``qkv_permutation`` hook, for weights and biases alike.

    The source has either ``q``, ``k`` and ``v`` or one tensor ``qkv``.
    """

    def __init__(
        self, native: str, *, q: str | None = None, k: str | None = None, v: str | None = None, qkv: str | None = None
    ) -> None:
        separate = tuple(name for name in (q, k, v) if name is not None)
        if (len(separate), qkv is not None) not in ((3, False), (0, True)):
            raise PluginError(f"FusedQKV({native!r}) takes either q, k and v or qkv")
        super().__init__(native, separate if qkv is None else (qkv,))

    def source_rows(self, native_rows: int, order: QKVOrder) -> list[int]:
        return list(order.part_rows) if len(self.sources) == 3 else [native_rows]

    def to_native(self, parts: Sequence[LazyMatrix], order: QKVOrder) -> LazyMatrix:
        return RowsOf(super().to_native(parts, order), order.native_from_source)

    def to_source(self, native: LazyMatrix, order: QKVOrder) -> list[LazyMatrix]:
        return super().to_source(RowsOf(native, order.source_from_native), order)


class WeightMap:
    """A table of rules for a whole model.

    Args:
        rules: One rule for each native parameter.
        ignored: Names of source tensors that hold nothing learned, such as rotary tables; ``*`` matches anything.
        aliases: Source tensors that may repeat another one, by name, such as a tied head that was saved nevertheless.
            They are compared with it on reading and are not written.
    """

    def __init__(self, *rules: Rule, ignored: Sequence[str] = (), aliases: Mapping[str, str] | None = None) -> None:
        self.rules = rules
        self.ignored = tuple(ignored)
        self.aliases = dict(aliases or {})

    def expand(self, num_layers: int) -> list[Rule]:
        """Return the rules with every ``*`` replaced, for each of ``num_layers`` layers."""
        once = [rule for rule in self.rules if "*" not in rule.native]
        per_layer = [rule for rule in self.rules if "*" in rule.native]
        return once + [rule.for_layer(layer) for layer in range(num_layers) for rule in per_layer]


def _swapped(matrix: LazyMatrix) -> LazyMatrix:
    half = matrix.rows // 2
    return ConcatenatedRows([RowsOf(matrix, slice(half, matrix.rows)), RowsOf(matrix, slice(0, half))])


def grouped_qkv_rows(config: ModelConfig, *, interleaved: bool = False) -> list[int]:
    """Return the ``qkv_permutation`` of a source with separate query, key and value projections.

    It gathers, for each key-value head, the query heads that share it, the key and the value. The source's rotary pairs
    are the components ``(2i, 2i + 1)`` of a head if ``interleaved``, as in the rotary paper; otherwise they are
    ``(i, i + head_dim / 2)``, megacore's own layout.
    """
    head_dim, queries = config.head_dim, config.queries_per_kv
    first_key = config.num_attention_heads * head_dim
    first_value = first_key + config.num_kv_heads * head_dim
    rotated_rows = _half_from_interleaved(head_dim) if interleaved else range(head_dim)
    rows: list[int] = []
    for group in range(config.num_kv_heads):
        rotated = [(group * queries + query) * head_dim for query in range(queries)] + [first_key + group * head_dim]
        rows += [first + row for first in rotated for row in rotated_rows]
        rows += range(first_value + group * head_dim, first_value + (group + 1) * head_dim)
    return rows


def half_from_interleaved_rows(*, queries_per_kv: int, kv_heads: int, head_dim: int) -> list[int]:
    """Return the rows of a grouped QKV projection with interleaved rotary pairs in the order of rotary halves.

    In a query or key head, the rows that rotate together are ``(2i, 2i + 1)`` before and ``(i, i + head_dim / 2)``
    after. Values are not rotated.
    """
    rows: list[int] = []
    for block in range(kv_heads * (queries_per_kv + 2)):
        is_value = block % (queries_per_kv + 2) == queries_per_kv + 1
        head_rows = range(head_dim) if is_value else _half_from_interleaved(head_dim)
        rows += (block * head_dim + row for row in head_rows)
    return rows


def _half_from_interleaved(head_dim: int) -> list[int]:
    return [*range(0, head_dim, 2), *range(1, head_dim, 2)]
