"""Trackio: a local dashboard, or one on the Hugging Face hub where ``TRACKIO_SPACE_ID`` names a space."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import redirect_stdout

import trackio

from megacore.training.loggers import LoggedRun


class TrackioLogger:
    """A run of trackio; ``trackio show`` opens the dashboard. A resumed run continues under its name."""

    def __init__(self, run: LoggedRun) -> None:
        with redirect_stdout(sys.stderr):  # it prints how to open the dashboard
            self._run = trackio.init(
                project=run.project,
                name=run.name,
                config={section: dict(table) for section, table in run.settings.items()},
                resume="allow" if run.iteration else "never",
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )

    def log(self, values: Mapping[str, float], *, iteration: int) -> None:
        self._run.log(dict(values), step=iteration)

    def close(self) -> None:
        with redirect_stdout(sys.stderr):
            trackio.finish()  # type: ignore[no-untyped-call]  # the library annotates no return type
