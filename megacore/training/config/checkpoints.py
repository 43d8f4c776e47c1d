"""The sections of the run file on checkpoints of the run, and on what becomes of steps that go wrong."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, model_validator

from megacore.training.config.section import Section


class CheckpointsSection(Section):
    """What a run saves on its way, to go on from there."""

    interval: int | None = Field(
        None,
        gt=0,
        description="Iterations between two checkpoints; by default one is saved only when the run is stopped.",
    )
    keep_last: int = Field(3, gt=0, description="How many of the newest are kept.")
    keep_every: int | None = Field(
        None, gt=0, description="Keep those of every so many iterations too, a multiple of interval."
    )
    directory: Path | None = Field(
        None,
        description="Where they are; by default `checkpoints` in output.directory or, without one, beside "
        "output.checkpoint, with `-checkpoints` after its name.",
    )
    asynchronous: bool = Field(
        True, description="Write them while training goes on; it stands still only while they are copied in memory."
    )
    may_change: tuple[str, ...] = Field(
        (), description="Keys of this file that may have changed on resuming though the data are others then."
    )

    @model_validator(mode="after")
    def _keeps_what_is_saved(self) -> CheckpointsSection:
        if self.keep_every is not None and (self.interval is None or self.keep_every % self.interval):
            raise ValueError(f"keep_every ({self.keep_every}) must be a multiple of interval ({self.interval})")
        return self


class FaultsSection(Section):
    """Which steps are not taken, and how many of them are too many."""

    max_skipped_in_a_row: int = Field(
        10,
        gt=0,
        description="The run ends with so many steps skipped in a row; those that lower the loss scale do not count.",
    )
    spike_factor: float | None = Field(
        None,
        gt=1,
        description="Skip a step whose loss or gradient norm is more than this times its median over the last steps; "
        "by default only those that are not finite.",
    )
    spike_window: int = Field(64, gt=1, description="Of how many of the last steps the median is; half must be there.")
