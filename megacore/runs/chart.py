"""One chart of a report: curves of several runs as SVG, which shows without a script."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

from megacore.runs.thinning import Point

COLOURS = ("#1f6feb", "#d9480f", "#2b8a3e", "#9c36b5", "#c2255c", "#0b7285", "#5c940d", "#862e9c")
"""Of the runs, in their order; they begin again after the last."""

_WIDTH, _HEIGHT = 760, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 74, 10, 10, 26


@dataclass(frozen=True)
class Curve:
    """One run's values in a chart.

    Attributes:
        run: its place among the runs, which its colour follows from.
        pieces: unbroken stretches of points, iteration and value.
    """

    run: int
    pieces: list[list[Point]]


def chart(title: str, unit: str, curves: Sequence[Curve]) -> str:
    """The chart as HTML; nothing for curves without a point."""
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
        parts.append(f'<text class="y" x="{_LEFT - 8}" y="{up(tick) + 4:.1f}">{escape(told(tick))}</text>')
    for tick in ticks(x_low, x_high):
        parts.append(f'<text class="x" x="{across(tick):.1f}" y="{_HEIGHT - 8}">{escape(told(tick))}</text>')
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
    """Round numbers between ``low`` and ``high``."""
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    number = math.ceil(low / step - 1e-9)
    while number * step <= high + step * 1e-9:
        yield number * step
        number += 1


def told(number: float) -> str:
    """A number as short as it can be."""
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
    """The extent of the values, never empty."""
    low, high = min(values), max(values)
    if low == high:
        return (low - 0.5, high + 0.5) if abs(low) < 1e-300 else (low - abs(low) / 2, high + abs(low) / 2)
    return low, high
