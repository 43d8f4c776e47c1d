"""Skipping bad steps: those whose loss or gradient is not finite, or spikes where the run file defines a spike."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from statistics import median
from typing import Any

from megacore.training.config import FaultsSection


class StepGuard:
    """Judges steps by loss and gradient norm, which are the same on every rank, before they change the weights.

    Attributes:
        settings: The section of the run file.
        num_skipped: Number of steps that were not taken.
        num_in_a_row: Number of them since the last step that was taken; overflows that lower the loss scale do not
            count.
    """

    def __init__(self, settings: FaultsSection) -> None:
        self.settings = settings
        self.num_skipped = 0
        self.num_in_a_row = 0
        self._losses: deque[float] = deque(maxlen=settings.spike_window)
        self._norms: deque[float] = deque(maxlen=settings.spike_window)

    def accepts(self, loss: float, grad_norm: float) -> bool:
        """Return whether a step of this ``loss`` and ``grad_norm`` may change the weights."""
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            return False
        factor = self.settings.spike_factor
        if factor is None or len(self._losses) < self.settings.spike_window // 2:
            return True
        return loss <= factor * median(self._losses) and grad_norm <= factor * median(self._norms)

    def record(self, loss: float, grad_norm: float, *, is_taken: bool, lowers_scale: bool) -> None:
        """Count a step; ``lowers_scale`` if it overflowed in fp16 and the loss scale could still fall."""
        if is_taken:
            self.num_in_a_row = 0
            self._losses.append(loss)
            self._norms.append(grad_norm)
            return
        self.num_skipped += 1
        self.num_in_a_row += not lowers_scale

    @property
    def is_over(self) -> bool:
        """True if too many steps in a row were skipped."""
        return self.num_in_a_row >= self.settings.max_skipped_in_a_row

    def state(self) -> dict[str, Any]:
        """Return the state for :meth:`restore`, as JSON."""
        return {
            "num_skipped": self.num_skipped,
            "num_in_a_row": self.num_in_a_row,
            "is_over": self.is_over,
            "losses": list(self._losses),
            "norms": list(self._norms),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore a :meth:`state`. A run that ended because of too many skipped steps may skip as many again."""
        self.num_skipped = int(state["num_skipped"])
        self.num_in_a_row = 0 if state["is_over"] else int(state["num_in_a_row"])
        self._losses.extend(state["losses"])
        self._norms.extend(state["norms"])
