"""The factor on the loss that keeps gradients in fp16 from vanishing (Micikevicius et al., 2017, arXiv:1710.03740)."""

from __future__ import annotations

from collections.abc import Mapping

from megacore.training.config.run_config import LossScaleSection


class LossScale:
    """Halves when gradients overflow, and doubles when they have not for long.

    Attributes:
        factor: on the loss of the next step.
    """

    def __init__(self, settings: LossScaleSection) -> None:
        self.settings = settings
        self.factor = settings.initial
        self._steps_since_change = 0
        self._overflows_left = settings.hysteresis

    @property
    def is_at_minimum(self) -> bool:
        """Whether a step that overflows now would overflow for ever."""
        return self.factor <= self.settings.minimum

    def overflowed(self) -> None:
        """A step was not taken, since its gradients were not finite."""
        self._steps_since_change = 0
        self._overflows_left -= 1
        if self._overflows_left <= 0:
            self.factor = max(self.factor / 2, self.settings.minimum)

    def stepped(self) -> None:
        """A step was taken."""
        self._steps_since_change += 1
        if self._steps_since_change == self.settings.window:
            self._steps_since_change = 0
            self._overflows_left = self.settings.hysteresis
            self.factor *= 2

    def state(self) -> dict[str, float]:
        """JSON for :meth:`restore`."""
        return {
            "factor": self.factor,
            "steps_since_change": self._steps_since_change,
            "overflows_left": self._overflows_left,
        }

    def restore(self, state: Mapping[str, float]) -> None:
        """Go on from what :meth:`state` was."""
        self.factor = float(state["factor"])
        self._steps_since_change = int(state["steps_since_change"])
        self._overflows_left = int(state["overflows_left"])
