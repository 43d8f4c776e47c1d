"""Recording the steps of a run, from whichever process reports them; in a module of its own, which ranks can import."""

from __future__ import annotations

import pickle
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import megacore
from megacore.parallel import ParallelContext
from megacore.training import Batch, Evaluation, RunConfig, Step
from megacore.training.resolved import ResolvedRun, resolve_run
from megacore.training.trainer import Trainer, train_on_rank


class StepRecorder:
    """An ``on_step`` that appends each step to a file, and then calls another one."""

    def __init__(self, file: Path, on_step: Callable[[Step], None] | None = None) -> None:
        self.file = file
        self._on_step = on_step

    def __call__(self, step: Step) -> None:
        with self.file.open("ab") as file:
            pickle.dump(step, file)
        if self._on_step is not None:
            self._on_step(step)

    def steps(self) -> list[Step]:
        """Return the recorded steps."""
        steps = []
        with self.file.open("rb") as file:
            while file.peek(1):
                steps.append(pickle.load(file))
        return steps


def train_steps(run: RunConfig | Path, *, on_step: Callable[[Step], None] | None = None, **keywords: Any) -> list[Step]:
    """Train and return the steps, the last one with what stopped the run. The peak is not measured."""
    if isinstance(run, RunConfig):
        run = run.model_copy(update={"logging": run.logging.model_copy(update={"measure_peak": False})})
    with tempfile.TemporaryDirectory() as directory:
        recorder = StepRecorder(Path(directory, "steps"), on_step)
        recorder.file.touch()
        result = megacore.train(run, on_step=recorder, **keywords)
        steps = recorder.steps()
    assert len(steps) == result.num_steps
    if steps:
        steps[-1] = replace(steps[-1], stopped_by=result.stopped_by)
    return steps


def steps_on_rank(
    parallel: ParallelContext,
    run: RunConfig,
    load: Path | None = None,
    on_evaluation: Callable[[Evaluation], None] | None = None,
) -> list[Step]:
    """Train by a run file, and return the steps as this rank sees them."""
    return steps_of(parallel, resolve_run(run, load=load), on_evaluation)


def steps_of(
    parallel: ParallelContext, resolved: ResolvedRun, on_evaluation: Callable[[Evaluation], None] | None = None
) -> list[Step]:
    """Train, and return the steps as this rank sees them."""
    steps = []
    take_step = Trainer.take_step

    def take_and_record(trainer: Trainer, batch: Batch) -> Step:
        steps.append(take_step(trainer, batch))
        return steps[-1]

    with patch.object(Trainer, "take_step", take_and_record):
        train_on_rank(parallel, resolved, on_evaluation=on_evaluation)
    return steps
