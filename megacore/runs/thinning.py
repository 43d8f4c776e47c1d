"""Thinning a curve to what can be seen of it, its peaks and dips among that."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

NUM_BUCKETS = 400
"""Of equal extent along the iterations; no chart has more than about two pixels for each."""

Point = tuple[float, float]

_BEYOND = 1e300
"""The extent of smaller values is a number."""


def thinned(iterations: Sequence[int], values: Sequence[float], *, num_buckets: int = NUM_BUCKETS) -> list[list[Point]]:
    """The curve in unbroken pieces: of each bucket the first, the lowest, the highest and the last point, in order.

    A value that is not finite, or too large to be drawn, is not in it; a bucket without any other breaks the curve.
    """
    x, y = np.asarray(iterations, dtype=np.float64), np.asarray(values, dtype=np.float64)
    is_finite = np.abs(y) < _BEYOND
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
