"""The table of the run file that says who is told how the run goes."""

from __future__ import annotations

from pydantic import Field

from megacore.training.config.section import Section


class LoggingSection(Section):
    """Who is told how the run goes, beside the console and the run's directory."""

    loggers: tuple[str, ...] = Field(
        (),
        description='Who else is told: `"tensorboard"`, `"wandb"`, `"trackio"`, or the name that an installed package '
        "gives to a logger of its own.",
    )
    project: str = Field("megacore", min_length=1, description="What wandb and trackio file the run under.")
    name: str | None = Field(
        None,
        min_length=1,
        description="Of the run; by default that of `output.directory` or, without one, of `output.checkpoint`.",
    )
    log_interval: int = Field(
        1,
        gt=0,
        description="Steps from one line on the console, and one entry of the loggers, to the next; the run's "
        "directory has every step.",
    )
    measure_peak: bool = Field(
        True,
        description="At the start, time matrix products for a fraction of a second, to tell which share of that rate "
        "the run achieves.",
    )
