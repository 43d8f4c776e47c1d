"""Taking the steps of a run."""

from __future__ import annotations

import time
from collections.abc import Iterator

from megacore.checkpoint import Checkpoint
from megacore.parallel import StopRequest
from megacore.training.batches import Batch
from megacore.training.engine import Engine
from megacore.training.flops import ModelFlops, work_of_step
from megacore.training.plan import model_specs_of
from megacore.training.prefetch import prefetched
from megacore.training.progress import Progress
from megacore.training.schedule import learning_rate, weight_decay
from megacore.training.span import Spans
from megacore.training.step_guard import StepGuard
from megacore.training.step_metrics import Step


def take_steps(
    engine: Engine,
    checkpoint: Checkpoint,
    own_batches: Iterator[Batch],
    spans: Spans,
    progress: Progress,
    guard: StepGuard,
    stop: StopRequest,
    peak_flops_per_second: float | None = None,
) -> Iterator[Step]:
    """Take the steps of the run that ``own_batches`` has left, one at a time, and keep ``progress`` up to date."""
    run, parallel = engine.run, engine.parallel
    model_flops = ModelFlops.of(engine.stages[0].config, model_specs_of(checkpoint))
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
            stopped_by=who_stopped(stop) if result.is_to_stop else None,
        )
        started = time.perf_counter()  # what is done between two steps is no part of either


def who_stopped(stop: StopRequest) -> str:
    """The signal that a run was asked to stop by."""
    return "a signal to another rank" if stop.signal is None else stop.signal.name
