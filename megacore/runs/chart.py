"""A chart of a report: curves of several runs as SVG, which needs no script, and their thinning."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

COLOURS = ("#1f6feb", "#d9480f", "#2b8a3e", "#9c36b5", "#c2255c", "#0b7285", "#5c940d", "#862e9c")
"""Colours of the runs in their order; they repeat after the last one."""

_WIDTH, _HEIGHT = 760, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 74, 10, 10, 26

NUM_BUCKETS = 400
"""Number of buckets of equal width along the iterations, each about two pixels wide in a chart."""

Point = tuple[float, float]

_MAX_VALUE = 1e300  # values up to this size have a finite extent


@dataclass(frozen=True)
class Curve:
    """The values of a run, whose index is ``run``, as unbroken sequences of points: iteration and value."""

    run: int
    pieces: list[list[Point]]


def chart(title: str, unit: str, curves: Sequence[Curve]) -> str:
    """Return the chart as HTML, or an empty string if no curve has a point."""
    points = [point for curve in curves for piece in curve.pieces for point in piece]
    if not points:
        return ""
    x_low, x_high = _bounds([x for x, _ in points])
    y_low, y_high = _bounds([y for _, y in points])

    def across(x: float) -> float:
        return _LEFT + (x - x_low) / (x_high - x_low) * (_WIDTH - _LEFT - _RIGHT)

    def up(y: float) -> float:
        return _HEIGHT - _BOTTOM - (y - y_low) / (y_high - y_low) * (_HEIGHT - _TOP - _BOTTOM)

    parts = []
    for tick in ticks(y_low, y_high):
        parts.append(
            f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{up(tick):.1f}" y2="{up(tick):.1f}"/>'
        )
        parts.append(f'<text class="y" x="{_LEFT - 8}" y="{up(tick) + 4:.1f}">{escape(format_number(tick))}</text>')
    for tick in ticks(x_low, x_high):
        parts.append(f'<text class="x" x="{across(tick):.1f}" y="{_HEIGHT - 8}">{escape(format_number(tick))}</text>')
    for curve in curves:
        colour = COLOURS[curve.run % len(COLOURS)]
        for piece in curve.pieces:
            if len(piece) == 1:
                [(x, y)] = piece
                parts.append(
                    f'<circle class="run{curve.run}" cx="{across(x):.1f}" cy="{up(y):.1f}" r="2.5" fill="{colour}"/>'
                )
                continue
            path = " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in piece)
            parts.append(f'<polyline class="run{curve.run}" points="{path}" stroke="{colour}"/>')
    heading = escape(title) + (f" <small>{escape(unit)}</small>" if unit else "")
    place = json.dumps([x_low, x_high, y_low, y_high, _LEFT, _WIDTH - _RIGHT, _TOP, _HEIGHT - _BOTTOM])
    return (
        f'<figure><figcaption>{heading}</figcaption><svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="{escape(title, quote=True)}" data-place="{escape(place, quote=True)}">'
        f"{''.join(parts)}</svg></figure>"
    )


def ticks(low: float, high: float, *, about: int = 5) -> Iterator[float]:
    """Yield round numbers between ``low`` and ``high``."""
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    yield from (number * step for number in range(first, last + 1))


def format_number(number: float) -> str:
    """Format a number as short as possible."""
    if number == 0:
        return "0"
    if 1e-3 <= abs(number) < 1e5:
        return f"{number:.6g}"
    if abs(number) < 1e-3:
        return f"{number:.3g}"
    for prefix, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(number) >= size:
            return f"{number / size:.4g} {prefix}"
    return f"{number:.4g}"


def _bounds(values: Sequence[float]) -> tuple[float, float]:
    """Return the lowest and the highest value, or an interval around a single value."""
    low, high = min(values), max(values)
    if low == high:
        return (low - 0.5, high + 0.5) if abs(low) < 1e-300 else (low - abs(low) / 2, high + abs(low) / 2)
    return low, high


def thin_curve(
    iterations: Sequence[int], values: Sequence[float], *, num_buckets: int = NUM_BUCKETS
) -> list[list[Point]]:
    """Return a curve in unbroken pieces with the first, lowest, highest and last point of each bucket, in order.

    Values that are not finite, or too large to be drawn, are dropped; a bucket without any other breaks the curve.
    """
    x, y = np.asarray(iterations, dtype=np.float64), np.asarray(values, dtype=np.float64)
    is_finite = np.abs(y) < _MAX_VALUE
    if not is_finite.any():
        return []
    pieces: list[list[Point]] = []
    first, extent = x[0], max(x[-1] - x[0], 1.0)
    bucket_of = np.minimum((x - first) / extent * num_buckets, num_buckets - 1).astype(np.int64)
    begins = np.flatnonzero(np.diff(bucket_of, prepend=-1))
    is_broken = True
    for begin, end in zip(begins, [*begins[1:], len(x)], strict=True):
        inside = np.flatnonzero(is_finite[begin:end]) + begin
        if len(inside) == 0:
            is_broken = True
            continue
        kept = sorted({inside[0], inside[np.argmin(y[inside])], inside[np.argmax(y[inside])], inside[-1]})
        if is_broken:
            pieces.append([])
        pieces[-1].extend((float(x[i]), float(y[i])) for i in kept)
        is_broken = False
    return pieces
