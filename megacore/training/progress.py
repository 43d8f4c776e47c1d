"""How far a run has come."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(kw_only=True)
class Progress:
    """What the place in the data and every schedule of a run follow from, at any layout of its processes.

    Attributes:
        iteration: steps done, those that were skipped included.
        num_samples: samples seen; the next step begins with the sample of this number.
        evaluated_after: the iteration of the last evaluation that was completed.
    """

    iteration: int = 0
    num_samples: int = 0
    evaluated_after: int = 0
