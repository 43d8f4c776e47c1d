"""The training loop: take a step, save, log, evaluate, maybe stop. See :meth:`Trainer.run`."""

from __future__ import annotations

import logging
import signal
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

from megacore.data import Split
from megacore.errors import MegacoreError, TrainingError
from megacore.parallel import (
    ONE_NODE,
    Nodes,
    ParallelContext,
    StopRequest,
    any_rank,
    broadcast_object,
    run_on_ranks,
    stop_requests,
)
from megacore.training.batches import Batch, batches, prefetched
from megacore.training.checkpointing.final_model import ReservedOutput, keep_earlier_result, reserve_output, save_stages
from megacore.training.checkpointing.manager import RunCheckpoints, resolve_run_id
from megacore.training.config import RunConfig, TrainingSection, read_run_config
from megacore.training.engine import Engine
from megacore.training.evaluation.evaluator import Evaluator
from megacore.training.flops import ModelFlops, global_work, measure_peak_flops
from megacore.training.loggers.dispatch import RunLog, has_loggers, open_run_log
from megacore.training.preflight import log_startup_notes, require_agreement
from megacore.training.resolved import ResolvedRun, resolve_run
from megacore.training.schedule import learning_rate, weight_decay
from megacore.training.starting_point import Resume, suggesting_earlier_checkpoint
from megacore.training.step_guard import StepGuard
from megacore.training.step_metrics import Evaluation, Step, TrainResult

log = logging.getLogger(__name__)


def train(
    run: RunConfig | Path | str,
    *,
    resume: Resume = False,
    load: Path | str | None = None,
    nodes: Nodes = ONE_NODE,
    on_note: Callable[[str], None] | None = None,
    on_step: Callable[[Step], None] | None = None,
    on_evaluation: Callable[[Evaluation], None] | None = None,
) -> TrainResult:
    """Train as ``run`` says and save a native checkpoint at the end. Starts the processes that it needs.

    A script that trains on several processes must guard the call with ``if __name__ == "__main__":``, since each
    imports it.

    On SIGTERM or SIGINT, or where the run file says so, the run ends early: it finishes the step, saves a training
    checkpoint and returns. A second signal ends the process. An evaluation that a signal interrupts is repeated when
    the run resumes.

    Args:
        run: A run file, or the result of :func:`~megacore.training.read_run_config`.
        resume: ``True`` to resume from the newest checkpoint of the run, ``"auto"`` to resume if there is one.
        load: A native checkpoint to start from instead of ``model.checkpoint``; or a training checkpoint, or a
            directory of them, to resume from.
        nodes: The nodes that the run is spread over. This is called on each of them, and reads and writes the same
            files.
        on_note: Called with each note for the user at the start.
        on_step: Called after each step; a function of a module, since another process calls it. If it is a context
            manager too, that process enters it for as long as steps are taken.
        on_evaluation: Called after each evaluation, like ``on_step``.

    Returns:
        The outcome of the run.

    Raises:
        MegacoreError: in one of its kinds; whatever can be checked is checked before the model is loaded.
        TrainingError: when too many steps in a row were skipped. A training checkpoint is saved.
    """
    if not isinstance(run, RunConfig):
        run = read_run_config(Path(run))
    resolved = resolve_run(run, resume=resume, load=None if load is None else Path(load), nodes=nodes)
    log_startup_notes(resolved.notes, nodes, on_note)
    result: TrainResult = run_on_ranks(
        train_on_rank,
        resolved,
        on_step,
        on_evaluation,
        sizes=resolved.sizes,
        nodes=nodes,
        timeout=timedelta(seconds=run.parallel.timeout),
        settings=resolved.shared_settings,
        on_note=on_note,
    )
    return result


def train_on_rank(
    parallel: ParallelContext,
    resolved: ResolvedRun,
    on_step: Callable[[Step], None] | None = None,
    on_evaluation: Callable[[Evaluation], None] | None = None,
) -> TrainResult:
    """Train on this rank; the result is the same on all."""
    run, start = resolved.run, resolved.start
    require_agreement(start.checkpoint, run.data.files(), resolved.dataset_digests, parallel)
    if start.is_resumed and parallel.rank == 0:
        keep_earlier_result(run.output.checkpoint, start.checkpoint)
    not_saved: MegacoreError | None = None
    with (
        ExitStack() as listeners,  # closed last: a slow logger must not keep the run from its result
        suppress(_StoppedEarlyError),  # the output is not published then
        reserve_output(
            run.output.checkpoint, parallel, started_from=start.checkpoint, num_bytes=resolved.num_bytes
        ) as output,
    ):
        trainer = Trainer(resolved, parallel, output, on_step, on_evaluation)
        with trainer.checkpoints.opened():
            trainer.start(listeners)
            trainer.run()
            not_saved = trainer.save_result()
    if not_saved is not None:
        raise not_saved
    return trainer.result()


class _StoppedEarlyError(Exception):
    """The run was stopped before its end, so its output must not be published."""


class Trainer:
    """The training loop of one rank, with all that it works with. All ranks have one, and make the same calls.

    Args:
        resolved: The run.
        parallel: The place of this process.
        output: The reserved output.
        on_step: Called after each step, on rank 0.
        on_evaluation: Called after each evaluation, on rank 0.

    Attributes:
        progress: Progress of the run.
        stopped_by: The signal, or the key of the run file, that ends the run early; ``None`` while nothing does.
        guard: The judge of the steps.
        engine: The model and its optimizer.
        checkpoints: The training checkpoints of the run.
    """

    def __init__(
        self,
        resolved: ResolvedRun,
        parallel: ParallelContext,
        output: ReservedOutput,
        on_step: Callable[[Step], None] | None = None,
        on_evaluation: Callable[[Evaluation], None] | None = None,
    ) -> None:
        self._started = time.monotonic()
        assert resolved.spans is not None, "a run that trains has schedules"
        self._resolved, self._parallel, self._output = resolved, parallel, output
        self._run, self._spans = resolved.run, resolved.spans
        self._is_first = parallel.rank == 0
        self._on_step, self._on_evaluation = on_step, on_evaluation
        self.progress = resolved.progress
        self.stopped_by: str | None = None
        self._step_began = 0.0
        self._last_step: Step | None = None
        self._num_steps = self._num_taken = self._num_tokens = 0
        self._seconds = 0.0
        self._is_saved = False

        self._peak: float | None = None
        has_listener = broadcast_object(on_step is not None or has_loggers(self._run), parallel)
        if self._run.logging.measure_peak and has_listener:
            self._peak = measure_peak_flops(parallel, self._run.model.compute_dtype)
        with suggesting_earlier_checkpoint(resolved.start.path):
            self.engine = Engine(resolved, parallel)
        self._flops = ModelFlops.from_specs(resolved.config, resolved.specs)
        self.guard = StepGuard(self._run.faults)
        run_id = resolve_run_id(resolved.start.record, parallel)
        self.checkpoints = RunCheckpoints(resolved, self.engine, self.guard, run_id=run_id, output=output)
        self._evaluator = Evaluator(resolved, self.engine)
        self._stop = StopRequest()
        self._log = RunLog()

    def start(self, listeners: ExitStack) -> None:
        """Restore the state of a resumed run, and open the loggers; they are closed with ``listeners``.

        From here on, signals are requests to stop. An evaluation that was interrupted is repeated.
        """
        self._stop = listeners.enter_context(stop_requests(acknowledge=self._is_first))
        is_resumed = self._resolved.start.is_resumed
        if is_resumed:
            self.checkpoints.restore()
        about_start = {"run_id": self.checkpoints.run_id, "started_from": str(self._resolved.start.path)}
        self._log = listeners.enter_context(
            open_run_log(self._run, self._parallel, iteration=self.progress.iteration, about_start=about_start)
        )
        if self._is_first and isinstance(self._on_step, AbstractContextManager):
            listeners.enter_context(self._on_step)
        if is_resumed and not self._evaluate():
            sys.exit(128 + (self._stop.signal or signal.SIGTERM))  # there is nothing new to save

    def run(self) -> None:
        """Take the steps that are left: the training loop.

        Raises:
            _StoppedEarlyError: when the run was stopped before its end. The state is saved.
            TrainingError: when too many steps in a row were skipped. The state is saved.
        """
        own_batches = batches(
            self._run,
            self._resolved.checkpoint,
            samples=self._resolved.samples["train"],
            train_iters=self._spans.train_iters,
            progress=self.progress,
            dp_rank=self._parallel.dp_rank,
            dp_size=self._parallel.dp_size,
        )
        self._step_began = time.perf_counter()
        for batch in prefetched(own_batches, self._run.data.prefetch):
            step = self.take_step(batch)
            step = self.save_if_due(step)
            self.log(step)
            self.check_skipped_steps(step)
            self.evaluate_if_due()
            if self.stopped_by is not None:
                break
            self._step_began = time.perf_counter()  # a step begins with waiting for its batch
        if self.stopped_by is not None:
            self._warn_of_late_notes()
            raise _StoppedEarlyError

    def take_step(self, batch: Batch) -> Step:
        """Take one optimizer step on ``batch``, this process's part of the global batch."""
        run, engine, guard = self._run, self.engine, self.guard
        iteration = self.progress.iteration + 1
        batch_size = run.training.batch_sizes.at(self.progress.num_samples)
        lr = learning_rate(iteration, optimizer=run.optimizer, spans=self._spans)
        is_skipped = iteration in run.training.skip_iters
        can_lower_scale = engine.loss_scale is not None and not engine.loss_scale.is_at_minimum
        result = engine.step(
            batch,
            lr=lr,
            weight_decay=weight_decay(iteration, optimizer=run.optimizer, spans=self._spans),
            is_skipped=is_skipped,
            accepts=guard.accepts,
            wants_stop=self._wants_stop,
        )
        if not is_skipped:
            lowers_scale = can_lower_scale and not result.is_finite
            guard.record(result.loss, result.grad_norm, is_taken=result.is_taken, lowers_scale=lowers_scale)
        work = global_work(batch, self._flops, run.data, self._parallel, micro_batch_size=run.training.micro_batch_size)
        seconds = time.perf_counter() - self._step_began
        self.progress = replace(self.progress, iteration=iteration, num_samples=self.progress.num_samples + batch_size)
        if iteration < self._spans.train_iters:
            minutes = (time.monotonic() - self._started) / 60
            self.stopped_by = (
                self._stopping_signal()
                if result.is_to_stop
                else early_exit(run.training, iteration, minutes=minutes, parallel=self._parallel)
            )
        self._num_steps += 1
        self._num_taken += result.is_taken
        self._num_tokens += work.num_tokens
        self._seconds += seconds
        return Step(
            iteration=iteration,
            train_iters=self._spans.train_iters,
            loss=result.loss,
            lr=lr,
            grad_norm=result.grad_norm,
            tokens_per_second=work.num_tokens / seconds,
            loss_scale=engine.loss_scale.factor if engine.loss_scale else None,
            num_skipped=guard.num_skipped,
            batch_size=batch_size,
            is_taken=result.is_taken,
            num_tokens=work.num_tokens,
            seconds=seconds,
            flops_per_second=work.flops / seconds,
            peak_flops_per_second=self._peak,
            stopped_by=self.stopped_by,
        )

    def save_if_due(self, step: Step) -> Step:
        """Save a training checkpoint in the background or, if the run stops here, at once; return ``step`` with notes.

        Raises:
            MegacoreError: when the run stops here and its state cannot be saved.
        """
        if step.stopped_by is not None:
            self.checkpoints.save(self.progress, waits=True)
        elif self.checkpoints.is_due(step.iteration) and step.iteration < step.train_iters:
            self.checkpoints.save(self.progress, waits=False)
        notes = self.checkpoints.notes()
        return replace(step, notes=notes) if notes else step

    def log(self, step: Step) -> None:
        """Report ``step`` to the loggers and the caller."""
        self._last_step = step
        self._log.step(step)
        if self._is_first and self._on_step is not None:
            self._on_step(step)

    def check_skipped_steps(self, step: Step) -> None:
        """End the run when too many steps in a row were skipped.

        Raises:
            TrainingError: says where the state is saved, or why it is not.
        """
        if not self.guard.is_over:
            return
        problem = (
            f"iteration {step.iteration}: the loss is {step.loss} and the norm of the gradient {step.grad_norm}; so "
            f"{self.guard.num_in_a_row} steps in a row were skipped. A lower optimizer.lr may help; so may an earlier "
            "checkpoint (--load), if the damage was done by the step before. The weights as they were before the "
            "skipped steps"
        )
        try:
            saved = self.checkpoints.save(self.progress, waits=True)
        except MegacoreError as error:
            raise TrainingError(f"{problem} could not be saved: {error}") from error
        raise TrainingError(f"{problem} are in {saved}")

    def evaluate_if_due(self) -> None:
        """Evaluate the model if it is due; if a signal interrupts that, save the state and stop the run."""
        if not self._evaluate() and self.stopped_by is None:
            self.stopped_by = self._stopping_signal()
            self.checkpoints.save(self.progress, waits=True)

    def _evaluate(self) -> bool:
        """Make the evaluations that are due and not yet made; return whether none was interrupted by a signal."""
        iteration = self.progress.iteration
        if self.progress.evaluated_after == iteration:
            return True
        is_last = iteration == self._spans.train_iters
        due: list[Split] = []
        if is_last or iteration % self._run.evaluation.interval == 0:
            due.append("valid")
        if is_last:
            due.append("test")
        due = [split for split in due if split in self._run.data.splits]
        is_complete = True
        for split in due:
            evaluation = self._evaluator.evaluate(split, iteration=iteration, wants_stop=self._wants_stop)
            if evaluation is None:
                is_complete = False
                continue
            self._log.evaluation(evaluation)
            if self._is_first and self._on_evaluation is not None:
                self._on_evaluation(evaluation)
        if due and is_complete:
            self.progress = replace(self.progress, evaluated_after=iteration)
        return is_complete

    def save_result(self) -> MegacoreError | None:
        """Save the trained model and the last training checkpoint, each even if the other fails. For all ranks.

        Returns:
            The error of the training checkpoint, to be raised once the result is published; ``None`` without one.

        Raises:
            MegacoreError: when the result cannot be saved; it says what is saved instead, and what to do.
        """
        engine, checkpoints = self.engine, self.checkpoints
        details = {
            "iterations": self.progress.iteration,
            "dtype": self._run.model.dtype,
            "run_id": checkpoints.run_id,
        }
        try:
            save_stages(
                self._output,
                engine.stages,
                engine.all_stages,
                self._parallel,
                started_from=self._resolved.checkpoint,
                details=details,
            )
        except MegacoreError as error:
            raise self._missing_result(error, checkpoints.save_last(self.progress)) from error
        self._is_saved = True
        not_saved = None
        if self._run.checkpoints.interval is not None:
            not_saved = checkpoints.save_last(self.progress)
        self._warn_of_late_notes()
        if not_saved is None:
            return None
        return type(not_saved)(
            f"{self._output.out} is saved, but not the last training checkpoint, from which the run could be extended: "
            f"{not_saved}"
        )

    def _missing_result(self, error: MegacoreError, not_saved: MegacoreError | None) -> MegacoreError:
        """Return ``error``, by which the result could not be saved, with the place of the training so far."""
        newest = self.checkpoints.directory.newest()
        if not_saved is None:
            remedy = f"All of the training is in {newest}: once this is fixed, --resume makes the result of it"
        elif newest is None:
            remedy = f"Nor could a training checkpoint be saved, and there is no earlier one: {not_saved}"
        else:
            remedy = f"Nor could the last training checkpoint be saved: {not_saved}. --resume resumes from {newest}"
        return type(error)(f"{error}. {remedy}")

    def result(self) -> TrainResult:
        """Return the outcome of the run."""
        return TrainResult(
            last_step=self._last_step,
            num_steps=self._num_steps,
            num_taken=self._num_taken,
            num_tokens=self._num_tokens,
            seconds=self._seconds,
            stopped_by=self.stopped_by,
            output=self._run.output.checkpoint if self._is_saved else None,
            training_checkpoint=self.checkpoints.directory.newest(),
        )

    def _wants_stop(self) -> bool:
        return self._stop.signal is not None

    def _stopping_signal(self) -> str:
        """Return the name of the signal that stops the run."""
        return "a signal to another rank" if self._stop.signal is None else self._stop.signal.name

    def _warn_of_late_notes(self) -> None:
        """Log the notes that come after the last step."""
        for note in self.checkpoints.notes():
            log.warning("Note: %s.", note)


def early_exit(training: TrainingSection, iteration: int, *, minutes: float, parallel: ParallelContext) -> str | None:
    """Return the key of the run file that ends the run after ``iteration``; ``None`` if there is none. For all ranks.

    ``minutes`` have passed on this rank; the first rank whose time is over ends the run on all.
    """
    limit, interval = training.exit_duration_in_mins, training.exit_interval
    if limit is not None and any_rank(minutes >= limit, parallel):
        return f"training.exit_duration_in_mins ({limit:g})"
    if interval is not None and iteration % interval == 0:
        return f"training.exit_interval ({interval})"
    return None
