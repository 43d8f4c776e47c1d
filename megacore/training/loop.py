"""The training loop."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

from megacore.checkpoint import Checkpoint
from megacore.data import Split
from megacore.errors import ConfigError, MegacoreError, TrainingError
from megacore.model import model_specs, read_config
from megacore.parallel import (
    ONE_NODE,
    Nodes,
    ParallelContext,
    StopRequest,
    check_tensor_parallel,
    is_first_process,
    on_ranks,
    stop_requests,
)
from megacore.plugins import get_family
from megacore.training.agreement import digest_of_dataset, require_agreement
from megacore.training.batches import batches, open_samples
from megacore.training.checkpoints import RunCheckpoints, run_id_of
from megacore.training.engine import COMPUTED_IN, HELD_IN, Engine
from megacore.training.evaluation import Evaluation, Evaluator
from megacore.training.exits import Exits
from megacore.training.layout import describe_layout, parallel_sizes
from megacore.training.peak import measured_peak
from megacore.training.plan import check_run, model_specs_of, pipeline_stages
from megacore.training.prefetch import prefetched
from megacore.training.preflight import check_and_describe, settings_to_agree_on
from megacore.training.progress import Progress
from megacore.training.run_config import RunConfig, read_run_config
from megacore.training.run_log import RunLog, check_run_log, is_watched, opened_log
from megacore.training.saving import keep_earlier_result, reserve_output, save_stages, told_by_rank_0
from megacore.training.schedule import learning_rate, weight_decay
from megacore.training.span import spans_of
from megacore.training.start import open_start
from megacore.training.starting_point import Resume, StartingPoint, offering_the_one_before
from megacore.training.step import Step
from megacore.training.step_guard import StepGuard
from megacore.training.work import ModelFlops, work_of_step

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
) -> list[Step]:
    """Train as ``run`` says and save a native checkpoint at the end. Starts the processes that it needs.

    A script that trains on several must guard the call with ``if __name__ == "__main__":``, since each imports it.

    On SIGTERM or SIGINT, or where the run file says so, the run ends early: the step is finished, a training checkpoint
    saved, and the steps up to there returned, the last of which says why. A second signal ends the process.

    Args:
        run: a run file, or what :func:`~megacore.training.run_config.read_run_config` made of one.
        resume: go on from the newest checkpoint of the run, ``"auto"``: if there is one.
        load: a native checkpoint to start from instead of ``model.checkpoint``; or a training checkpoint, or a
            directory of them, to go on from.
        nodes: those that the run is spread over; this is called on each of them, and reads and writes the same files.
        on_note: is told what a person should know at the start.
        on_step: is told of each step as it is done; a function of a module, since another process calls it. If it is a
            context manager too, that process enters it for as long as steps are taken.
        on_evaluation: likewise, of each evaluation.

    Raises:
        MegacoreError: in one of its kinds; what can be checked is checked before the model is loaded.
        TrainingError: when too many steps in a row were skipped. A training checkpoint is saved.
    """
    if not isinstance(run, RunConfig):
        run = read_run_config(Path(run))
    start = StartingPoint.of(run, resume=resume, load=None if load is None else Path(load))
    if start.path == run.model.checkpoint and not start.path.is_dir():
        raise ConfigError(
            f"model.checkpoint: {run.model.checkpoint} is not a directory (paths in a run file are relative to the "
            "directory that the command is started in)"
        )
    with offering_the_one_before(start.path):
        checkpoint = open_start(run, start.path)
    family = get_family(checkpoint.manifest.family)
    config = read_config(family, checkpoint)
    specs = model_specs(config, family.build_layer)
    check_tensor_parallel(specs, run.parallel.tensor_parallel)
    sizes = parallel_sizes(run, nodes)
    check_run(run, config, specs, dp_size=sizes.dp)
    if is_first_process(nodes):
        check_run_log(run, is_resumed=start.is_resumed)
    notes = check_and_describe(run, start, checkpoint)
    if sizes.world > 1:
        notes = [describe_layout(run, sizes, pipeline_stages(run, config, specs)), *notes]
    if on_note and is_first_process(nodes):
        for note in notes:
            on_note(note)
    if on_note and nodes.count > 1:
        on_note(f"node {nodes.rank} of {nodes.count} meets the others at {nodes.address}:{nodes.port}")
    return on_ranks(
        _train_on_rank,
        run,
        on_step,
        start,
        on_evaluation,
        sizes=sizes,
        nodes=nodes,
        timeout=timedelta(seconds=run.parallel.timeout),
        settings=settings_to_agree_on(run, start),
        on_note=on_note,
    )


class _StoppedEarlyError(Exception):
    """The run was stopped before its end: its output is not to be published."""


def _train_on_rank(
    parallel: ParallelContext,
    run: RunConfig,
    on_step: Callable[[Step], None] | None = None,
    start: StartingPoint | None = None,
    on_evaluation: Callable[[Evaluation], None] | None = None,
) -> list[Step]:
    exits = Exits(run.training, parallel)
    start = start or StartingPoint(run.model.checkpoint)
    checkpoint = open_start(run, start.path)
    require_agreement(checkpoint, run.data.files(), parallel)
    held = HELD_IN[run.model.dtype]
    num_bytes = sum(math.prod(spec.shape) for spec in checkpoint.manifest.specs.values()) * held.itemsize
    if start.is_resumed and parallel.rank == 0:
        keep_earlier_result(run.output.checkpoint, checkpoint)
    steps: list[Step] = []
    final_error: MegacoreError | None = None
    with (
        suppress(_StoppedEarlyError),
        reserve_output(run.output.checkpoint, parallel, started_from=checkpoint, num_bytes=num_bytes) as output,
    ):
        peak = None
        is_told = told_by_rank_0("yes" if on_step is not None or is_watched(run) else "", parallel)
        if run.logging.measure_peak and is_told:
            peak = measured_peak(parallel, COMPUTED_IN[run.model.dtype])
        with offering_the_one_before(start.path):
            engine = Engine(run, checkpoint, parallel)
        guard = StepGuard(run.faults)
        saved = RunCheckpoints(
            engine,
            guard,
            checkpoint,
            run_id=run_id_of(checkpoint if start.is_resumed else None, parallel),
            datasets={key: digest_of_dataset(prefix) for key, prefix in run.data.files().items()},
            output=output,
        )
        with saved.opened(), stop_requests(told=parallel.rank == 0) as stop:
            progress = saved.restore(checkpoint) if start.is_resumed else Progress()
            with ExitStack() as shown:
                run_log = shown.enter_context(opened_log(run, parallel, iteration=progress.iteration))
                if on_step is not None and parallel.rank == 0 and isinstance(on_step, AbstractContextManager):
                    shown.enter_context(on_step)
                evaluations = _Evaluations(Evaluator(engine, checkpoint), progress, run_log, on_evaluation)
                for step in _steps(engine, checkpoint, progress, guard, stop, peak):
                    is_last = step.iteration == step.train_iters
                    stopped_by = None if is_last else step.stopped_by or exits.reason(progress)
                    if saved.is_due(step.iteration) and not is_last and stopped_by is None:
                        saved.save(progress, waits=False)
                    steps.append(replace(step, stopped_by=stopped_by, notes=(*step.notes, *saved.notes())))
                    run_log.step(steps[-1])
                    if on_step is not None and parallel.rank == 0:
                        on_step(steps[-1])
                    if guard.is_over:
                        kept = saved.save(progress, waits=True)
                        raise TrainingError(
                            f"iteration {step.iteration}: the loss is {step.loss} and the norm of the gradient "
                            f"{step.grad_norm}; so {guard.num_in_a_row} steps in a row were skipped. A lower "
                            f"optimizer.lr may help. The weights as they were before these steps are in {kept}"
                        )
                    if stopped_by is not None:  # who stops a run may not wait for long
                        saved.save(progress, waits=True)
                    if is_last or step.stopped_by is None:
                        evaluations.after(step)
                    if stopped_by is not None:
                        _warn_of(saved)
                        raise _StoppedEarlyError
            details = {"iterations": progress.iteration, "dtype": run.model.dtype, "run_id": saved.run_id}
            save_stages(output, engine.stages, engine.all_stages, parallel, started_from=checkpoint, details=details)
            final_error = saved.save_last(progress)
            _warn_of(saved)
    if final_error is not None:
        raise final_error
    return steps


def _warn_of(saved: RunCheckpoints) -> None:
    """Tell what no step comes after to tell of."""
    for note in saved.notes():
        log.warning("Note: %s.", note)


class _Evaluations:
    """The evaluations of a run, each when it is due."""

    def __init__(
        self,
        evaluator: Evaluator,
        progress: Progress,
        log: RunLog,
        on_evaluation: Callable[[Evaluation], None] | None,
    ) -> None:
        self._evaluator, self._run = evaluator, evaluator.run
        self._progress, self._log, self._on_evaluation = progress, log, on_evaluation

    def after(self, step: Step) -> None:
        """Evaluate what is to be evaluated after ``step``. For all ranks."""
        is_last = step.iteration == step.train_iters
        if is_last or step.iteration % self._run.evaluation.interval == 0:
            self._evaluate("valid")
        if is_last:
            self._evaluate("test")

    def _evaluate(self, split: Split) -> None:
        if split not in self._run.data.splits:
            return
        evaluation = self._evaluator.evaluate(split, iteration=self._progress.iteration)
        self._log.evaluation(evaluation)
        if self._on_evaluation is not None and self._evaluator.engine.parallel.rank == 0:
            self._on_evaluation(evaluation)


def _steps(
    engine: Engine,
    checkpoint: Checkpoint,
    progress: Progress,
    guard: StepGuard,
    stop: StopRequest,
    peak_flops_per_second: float | None = None,
) -> Iterator[Step]:
    """Take the steps of the run that ``progress`` has left, one at a time, and keep it up to date; fewer on request."""
    run, parallel = engine.run, engine.parallel
    spans = spans_of(run, open_samples(run, checkpoint).samples_per_epoch, progress)
    model_flops = ModelFlops.of(engine.stages[0].config, model_specs_of(checkpoint))
    own_batches = batches(
        run, checkpoint, progress=replace(progress), dp_rank=parallel.dp_rank, dp_size=parallel.dp_size
    )
    started = time.perf_counter()
    for iteration, batch in enumerate(prefetched(own_batches, run.data.prefetch), start=progress.iteration + 1):
        lr = learning_rate(iteration, optimizer=run.optimizer, spans=spans)
        is_skipped = iteration in run.training.skip_iters
        can_lower_scale = engine.loss_scale is not None and not engine.loss_scale.is_at_minimum
        result = engine.step(
            batch,
            lr=lr,
            weight_decay=weight_decay(iteration, optimizer=run.optimizer, spans=spans),
            is_skipped=is_skipped,
            accepts=guard.accepts,
            wants_stop=lambda: stop.signal is not None,
        )
        if not is_skipped:
            guard.saw(result, lowers_scale=can_lower_scale and not result.is_finite)
        work = work_of_step(batch, model_flops, run, parallel)
        seconds = time.perf_counter() - started
        batch_size = run.training.batch_sizes.at(progress.num_samples)
        progress.iteration = iteration
        progress.num_samples += batch_size
        yield Step(
            iteration,
            spans.train_iters,
            result.loss,
            lr,
            result.grad_norm,
            work.num_tokens / seconds,
            engine.loss_scale.factor if engine.loss_scale else None,
            guard.num_skipped,
            batch_size=batch_size,
            is_taken=result.is_taken,
            num_tokens=work.num_tokens,
            seconds=seconds,
            flops_per_second=work.flops / seconds,
            peak_flops_per_second=peak_flops_per_second,
            stopped_by=_stopped_by(stop) if result.is_to_stop else None,
        )
        started = time.perf_counter()  # what is done between two steps is no part of either


def _stopped_by(stop: StopRequest) -> str:
    return "a signal to another rank" if stop.signal is None else stop.signal.name
