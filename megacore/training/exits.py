"""Ending a run before all of it is done."""

from __future__ import annotations

import time

from megacore.parallel import ParallelContext, any_rank
from megacore.training.config.training import TrainingSection
from megacore.training.progress import Progress


class Exits:
    """When a run ends early, as its run file says.

    Args:
        settings: of the run; minutes are counted from now.
        parallel: the place of this process.
    """

    def __init__(self, settings: TrainingSection, parallel: ParallelContext) -> None:
        self.settings, self.parallel = settings, parallel
        self._started = time.monotonic()

    def reason(self, progress: Progress) -> str | None:
        """What ends the run here; ``None`` if nothing does. For all processes, which return the same."""
        minutes, interval = self.settings.exit_duration_in_mins, self.settings.exit_interval
        if minutes is not None and any_rank(time.monotonic() - self._started >= 60 * minutes, self.parallel):
            return f"training.exit_duration_in_mins ({minutes:g})"
        if interval is not None and progress.iteration % interval == 0:
            return f"training.exit_interval ({interval})"
        return None
