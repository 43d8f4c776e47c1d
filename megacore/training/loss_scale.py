"""The dynamic loss scale that keeps gradients in fp16 from vanishing (Micikevicius et al., 2017, arXiv:1710.03740)."""

from __future__ import annotations

from collections.abc import Mapping

from megacore.training.config import LossScaleSection


class LossScale:
    """Halves when gradients overflow, and doubles after a long time without an overflow.

    torch's GradScaler judges the gradients of one process; here all ranks decide alike, by the norm over all of them.

    Attributes:
        settings: The section of the run file.
        factor: The factor on the loss of the next step.
    """

    def __init__(self, settings: LossScaleSection) -> None:
        self.settings = settings
        self.factor = settings.initial
        self._steps_since_change = 0
        self._overflows_left = settings.hysteresis

    @property
    def is_at_minimum(self) -> bool:
        """True if the scale cannot fall any further, so that an overflow would repeat for ever."""
        return self.factor <= self.settings.minimum

    def overflowed(self) -> None:
        """Count a step that was not taken because its gradients were not finite."""
        self._steps_since_change = 0
        self._overflows_left -= 1
        if self._overflows_left <= 0:
            self.factor = max(self.factor / 2, self.settings.minimum)

    def stepped(self) -> None:
        """Count a step without an overflow."""
        self._steps_since_change += 1
        if self._steps_since_change == self.settings.window:
            self._steps_since_change = 0
            self._overflows_left = self.settings.hysteresis
            self.factor *= 2

    def state(self) -> dict[str, float]:
        """Return the state for :meth:`restore`, as JSON."""
        return {
            "factor": self.factor,
            "steps_since_change": self._steps_since_change,
            "overflows_left": self._overflows_left,
        }

    def restore(self, state: Mapping[str, float]) -> None:
        """Restore a :meth:`state`."""
        self.factor = float(state["factor"])
        self._steps_since_change = int(state["steps_since_change"])
        self._overflows_left = int(state["overflows_left"])
