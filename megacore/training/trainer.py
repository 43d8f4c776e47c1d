"""The training loop."""

from __future__ import annotations

import logging
import math
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

from megacore.checkpoint import Checkpoint
from megacore.data import MixedSamples
from megacore.errors import MegacoreError
from megacore.parallel import (
    ONE_NODE,
    Nodes,
    ParallelContext,
    StopRequest,
    broadcast_object,
    is_first_process,
    run_on_ranks,
    stop_requests,
)
from megacore.training.after_step import AfterStep, Evaluations
from megacore.training.agreement import digest_of_dataset, require_agreement
from megacore.training.batches import batches, open_samples
from megacore.training.checkpointing.final_model import ReservedOutput, keep_earlier_result, reserve_output, save_stages
from megacore.training.checkpointing.manager import RunCheckpoints, run_id_of
from megacore.training.config.run_config import RunConfig, read_run_config
from megacore.training.engine import COMPUTED_IN, HELD_IN, Engine
from megacore.training.evaluation.evaluator import Evaluation, Evaluator
from megacore.training.exits import Exits
from megacore.training.loggers.dispatch import check_run_log, is_watched, opened_log
from megacore.training.opening import open_for_run, tell_at_start
from megacore.training.peak_flops import measured_peak
from megacore.training.preflight import check_and_describe, settings_to_agree_on
from megacore.training.progress import Progress
from megacore.training.span import spans_of
from megacore.training.start import open_start
from megacore.training.starting_point import Resume, StartingPoint, offering_the_one_before
from megacore.training.step_guard import StepGuard
from megacore.training.step_metrics import Step
from megacore.training.stepping import take_steps

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
    saved, and the steps up to there returned, the last of which says why. A second signal ends the process. An
    evaluation that a signal interrupts is made when the run goes on.

    Args:
        run: a run file, or what :func:`~megacore.training.config.run_config.read_run_config` made of one.
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
    checkpoint, sizes, layout_notes = open_for_run(run, start.path, nodes)
    if is_first_process(nodes):
        resumed = start.resumed(checkpoint)
        check_run_log(run, resumed_run_id=None if resumed is None else resumed.run_id)
    tell_at_start([*layout_notes, *check_and_describe(run, start, checkpoint)], nodes, on_note)
    return run_on_ranks(
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
    samples = open_samples(run, checkpoint)
    held = HELD_IN[run.model.dtype]
    num_bytes = sum(math.prod(spec.shape) for spec in checkpoint.manifest.specs.values()) * held.itemsize
    if start.is_resumed and parallel.rank == 0:
        keep_earlier_result(run.output.checkpoint, checkpoint)
    steps: list[Step] = []
    not_saved: MegacoreError | None = None
    with (
        ExitStack() as watched,  # left last: who is slow to hear of the end must not keep the run from its result
        suppress(_StoppedEarlyError),
        reserve_output(run.output.checkpoint, parallel, started_from=checkpoint, num_bytes=num_bytes) as output,
    ):
        loaded = _load(run, start, checkpoint, output, parallel, is_told=on_step is not None or is_watched(run))
        with loaded.saved.opened():
            stop = watched.enter_context(stop_requests(acknowledge=parallel.rank == 0))
            progress = loaded.saved.restore(checkpoint) if start.is_resumed else Progress()
            steps += _steps(loaded, samples, progress, stop, exits, watched, on_step, on_evaluation)
            if steps and steps[-1].stopped_by is not None:
                _warn_of(loaded.saved)
                raise _StoppedEarlyError
            not_saved = _save(loaded, progress, output)
            _warn_of(loaded.saved)
    if not_saved is not None:
        raise not_saved
    return steps


@dataclass(frozen=True, kw_only=True)
class _Loaded:
    """A run whose model is in memory.

    Attributes:
        start: where it begins.
        checkpoint: what is there.
        engine: the model and its optimizer.
        guard: judges each step.
        saved: the training checkpoints of the run.
        peak: FLOP/s that all ranks were measured to reach together; ``None`` where that was not done.
    """

    start: StartingPoint
    checkpoint: Checkpoint
    engine: Engine
    guard: StepGuard
    saved: RunCheckpoints
    peak: float | None


def _load(
    run: RunConfig,
    start: StartingPoint,
    checkpoint: Checkpoint,
    output: ReservedOutput,
    parallel: ParallelContext,
    *,
    is_told: bool,
) -> _Loaded:
    """Load the model. ``is_told`` says, on the first rank, whether anybody hears of its steps."""
    peak = None
    is_told = broadcast_object(is_told, parallel)
    if run.logging.measure_peak and is_told:
        peak = measured_peak(parallel, COMPUTED_IN[run.model.dtype])
    with offering_the_one_before(start.path):
        engine = Engine(run, checkpoint, parallel)
    guard = StepGuard(run.faults)
    saved = RunCheckpoints(
        engine,
        guard,
        checkpoint,
        run_id=run_id_of(start.resumed(checkpoint), parallel),
        datasets={key: digest_of_dataset(prefix) for key, prefix in run.data.files().items()},
        output=output,
    )
    return _Loaded(start=start, checkpoint=checkpoint, engine=engine, guard=guard, saved=saved, peak=peak)


def _steps(
    loaded: _Loaded,
    samples: MixedSamples,
    progress: Progress,
    stop: StopRequest,
    exits: Exits,
    watched: ExitStack,
    on_step: Callable[[Step], None] | None,
    on_evaluation: Callable[[Evaluation], None] | None,
) -> Iterator[Step]:
    """Take the steps that are left, up to where the run stops; who is told of them is closed with ``watched``."""
    start, checkpoint, engine, saved = loaded.start, loaded.checkpoint, loaded.engine, loaded.saved
    run, parallel = engine.run, engine.parallel
    about_start = {"run_id": saved.run_id, "started_from": str(start.path)}
    run_log = watched.enter_context(opened_log(run, parallel, iteration=progress.iteration, about_start=about_start))
    if on_step is not None and parallel.rank == 0 and isinstance(on_step, AbstractContextManager):
        watched.enter_context(on_step)
    spans = spans_of(run, samples.samples_per_epoch, progress)
    progress.warmup_iters = spans.warmup_iters
    evaluations = Evaluations(Evaluator(engine, checkpoint), spans, stop, run_log, on_evaluation)
    if start.is_resumed and not evaluations.make(progress):
        sys.exit(128 + (stop.signal or signal.SIGTERM))  # nothing was done that could be saved
    own_batches = batches(
        run,
        checkpoint,
        samples=samples,
        progress=replace(progress),
        dp_rank=parallel.dp_rank,
        dp_size=parallel.dp_size,
    )
    after_step = AfterStep(
        progress, loaded.guard, saved, stop, exits, evaluations, run_log, on_step if parallel.rank == 0 else None
    )
    for step in take_steps(engine, checkpoint, own_batches, spans, progress, loaded.guard, stop, loaded.peak):
        done = after_step(step)
        yield done
        if done.stopped_by is not None:
            return


def _save(loaded: _Loaded, progress: Progress, output: ReservedOutput) -> MegacoreError | None:
    """Save the result, and what the run could be extended from: either, whatever becomes of the other. For all ranks.

    Returns what to raise once the result is in its place.

    Raises:
        MegacoreError: when there is no result; it says what is saved instead, and what to do.
    """
    engine, saved = loaded.engine, loaded.saved
    details = {"iterations": progress.iteration, "dtype": engine.run.model.dtype, "run_id": saved.run_id}
    try:
        save_stages(
            output,
            engine.stages,
            engine.all_stages,
            engine.parallel,
            started_from=loaded.checkpoint,
            details=details,
        )
    except MegacoreError as error:
        raise _without_result(error, saved, saved.save_last(progress)) from error
    if engine.run.checkpoints.interval is None:
        return None
    not_saved = saved.save_last(progress)
    if not_saved is None:
        return None
    return type(not_saved)(
        f"{output.out} is saved, but not the last training checkpoint, which the run could be extended from: "
        f"{not_saved}"
    )


def _without_result(error: MegacoreError, saved: RunCheckpoints, not_saved: MegacoreError | None) -> MegacoreError:
    """That the result could not be written, as ``error`` says, and where the training is all the same, if it is."""
    newest = saved.directory.newest()
    if not_saved is None:
        told = f"All of the training is in {newest}: once that is put right, --resume makes the result of it"
    elif newest is None:
        told = f"Nor could a training checkpoint be saved, and there is no earlier one: {not_saved}"
    else:
        told = f"Nor could the last training checkpoint be saved: {not_saved}. --resume goes on from {newest}"
    return type(error)(f"{error}. {told}")


def _warn_of(saved: RunCheckpoints) -> None:
    """Tell what no step comes after to tell of."""
    for note in saved.notes():
        log.warning("Note: %s.", note)
