"""The sections of the run file on what a run produces: the result, checkpoints, evaluations, logs; skipped steps."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from megacore.training.config.section import Section


class OutputSection(Section):
    """The files that a run writes."""

    checkpoint: Path = Field(description="Native checkpoint to create at the end of the run.")
    directory: Path | None = Field(
        None,
        description="Run directory, created at the start, for the resolved run file, the metrics and the software "
        "versions. Default: none.",
    )


class CheckpointsSection(Section):
    """Training checkpoints, from which a run resumes."""

    interval: int | None = Field(
        None,
        gt=0,
        description="Iterations between two checkpoints. Default: save one only when the run is stopped.",
    )
    keep_last: int = Field(3, gt=0, description="Number of newest checkpoints to keep.")
    keep_every: int | None = Field(
        None, gt=0, description="Also keep the checkpoints of every so many iterations, a multiple of interval."
    )
    directory: Path | None = Field(
        None,
        description="Directory of the checkpoints. Default: `checkpoints` in output.directory or, without one, "
        "a directory beside output.checkpoint, with `-checkpoints` after its name.",
    )
    asynchronous: bool = Field(
        True, description="Write checkpoints in the background; training pauses only for the copy in memory."
    )
    may_change: tuple[str, ...] = Field(
        (), description="Keys of this file that may differ on resume although they change the data."
    )

    @model_validator(mode="after")
    def _keep_every_is_a_multiple_of_interval(self) -> CheckpointsSection:
        if self.keep_every is not None and (self.interval is None or self.keep_every % self.interval):
            raise ValueError(f"keep_every ({self.keep_every}) must be a multiple of interval ({self.interval})")
        return self


class FaultsSection(Section):
    """Criteria for skipping a step, and the number of skipped steps that ends the run."""

    max_skipped_in_a_row: int = Field(
        10,
        gt=0,
        description="Number of consecutive skipped steps that ends the run. Steps that lower the loss scale do not "
        "count.",
    )
    spike_factor: float | None = Field(
        None,
        gt=1,
        description="Skip a step whose loss or gradient norm exceeds this multiple of its median over the last steps. "
        "Default: skip only steps that are not finite.",
    )
    spike_window: int = Field(
        64, gt=1, description="Number of last steps in the median; it is used once half of them are available."
    )


class EvaluationSection(Section):
    """Evaluation on the validation and test data."""

    interval: int = Field(
        1000, gt=0, description="Iterations between two validations. The last iteration is always validated."
    )
    iters: Annotated[int, Field(gt=0)] | Literal["all"] = Field(
        100,
        description='Global batches of each evaluation, always the same ones, at most one epoch; `"all"`: one epoch.',
    )
    metrics: tuple[str, ...] = Field(
        ("perplexity",),
        description="Metrics reported beside the loss; `package.module:function` for a metric of your own, "
        '`"all"` for all built-in ones.',
    )


class LoggingSection(Section):
    """Loggers, beside the console and the run directory."""

    loggers: tuple[str, ...] = Field(
        (),
        description='Loggers: `"tensorboard"`, `"wandb"`, `"trackio"`, or the name under which an installed package '
        "provides a logger.",
    )
    project: str = Field("megacore", min_length=1, description="Project of the run in wandb and trackio.")
    name: str | None = Field(
        None,
        min_length=1,
        description="Name of the run. Default: the name of `output.directory` or, without one, of `output.checkpoint`.",
    )
    log_interval: int = Field(
        1,
        gt=0,
        description="Steps between two lines on the console and two entries of the loggers. The run directory has "
        "every step.",
    )
    measure_peak: bool = Field(
        True,
        description="Measure matrix products for a fraction of a second at the start; the result is the reference for "
        "% of peak.",
    )
