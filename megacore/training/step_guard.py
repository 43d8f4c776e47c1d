"""Which steps are taken: those of finite loss and gradient that are no spikes, where the run file says what one is."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from statistics import median
from typing import Any

from megacore.training.config.checkpoints import FaultsSection
from megacore.training.engine import StepResult


class StepGuard:
    """Judges steps by their loss and gradient norm, which are the same on every rank, before they change the weights.

    Attributes:
        num_skipped: steps that were not taken.
        num_in_a_row: of them, those since the last that was, but for overflows that lower the loss scale.
    """

    def __init__(self, settings: FaultsSection) -> None:
        self.settings = settings
        self.num_skipped = 0
        self.num_in_a_row = 0
        self._losses: deque[float] = deque(maxlen=settings.spike_window)
        self._norms: deque[float] = deque(maxlen=settings.spike_window)

    def accepts(self, loss: float, grad_norm: float) -> bool:
        """Whether the weights may change by a step of this ``loss`` and norm of the gradient."""
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            return False
        factor = self.settings.spike_factor
        if factor is None or len(self._losses) < self.settings.spike_window // 2:
            return True
        return loss <= factor * median(self._losses) and grad_norm <= factor * median(self._norms)

    def saw(self, result: StepResult, *, lowers_scale: bool) -> None:
        """What became of a step; ``lowers_scale`` where it overflowed in fp16 and the loss scale could still fall."""
        if result.is_taken:
            self.num_in_a_row = 0
            self._losses.append(result.loss)
            self._norms.append(result.grad_norm)
            return
        self.num_skipped += 1
        self.num_in_a_row += not lowers_scale

    @property
    def is_over(self) -> bool:
        """Whether too many steps in a row were skipped."""
        return self.num_in_a_row >= self.settings.max_skipped_in_a_row

    def state(self) -> dict[str, Any]:
        """JSON for :meth:`restore`."""
        return {
            "num_skipped": self.num_skipped,
            "num_in_a_row": self.num_in_a_row,
            "is_over": self.is_over,
            "losses": list(self._losses),
            "norms": list(self._norms),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state` was; who resumes a run that had skipped too many gives it as many again."""
        self.num_skipped = int(state["num_skipped"])
        self.num_in_a_row = 0 if state["is_over"] else int(state["num_in_a_row"])
        self._losses.extend(state["losses"])
        self._norms.extend(state["norms"])
