"""Schedules: how long a run is, how far it has come, and the learning rate and weight decay of each iteration."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megacore.checkpoint.training_record import TrainingRecord
from megacore.errors import ConfigError
from megacore.training.config import OptimizerSection, RunConfig


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a run has come. The position in the data and every schedule follow from it, at any process layout.

    Attributes:
        iteration: Number of completed steps, skipped ones included.
        num_samples: Number of samples seen; the next step begins with the sample of this number.
        evaluated_after: Iteration of the last completed evaluation.
        warmup_iters: Length of the warmup as resolved so far; ``None`` at the start of a run, or where the run file
            changes the warmup from here on.
    """

    iteration: int = 0
    num_samples: int = 0
    evaluated_after: int = 0
    warmup_iters: int | None = None

    @classmethod
    def from_record(cls, record: TrainingRecord, optimizer: OptimizerSection) -> Progress:
        """Return the progress of the run that saved ``record`` and resumes with the ``optimizer`` section."""
        is_unchanged = record.state["settings"].get("optimizer.warmup_fraction") == optimizer.warmup_fraction
        return cls(
            iteration=record.iteration,
            num_samples=record.num_samples,
            evaluated_after=record.state["evaluated_after"],
            warmup_iters=record.state.get("warmup_iters") if is_unchanged else None,
        )


START = Progress()


@dataclass(frozen=True, kw_only=True)
class Spans:
    """Lengths in iterations, counted from the beginning of the run.

    Attributes:
        train_iters: Length of the whole run.
        warmup_iters: Number of iterations in which the learning rate rises.
        lr_decay_iters: Number of iterations after which the learning rate is at its lowest.
    """

    train_iters: int
    warmup_iters: int = 0
    lr_decay_iters: int


def resolve_spans(run: RunConfig, samples_per_epoch: int, progress: Progress = START) -> Spans:
    """Convert the lengths in the run file (iterations, samples, epochs or fractions) to iterations.

    Samples are converted through the batch sizes. A run may resume with another batch size: the iterations after
    ``progress`` are counted with the new one, and those before it stay as they were. A warmup given as a fraction
    belongs to the run as it began: a run that is made longer is not warmed up again.

    Raises:
        ConfigError: when the learning rate would decay before the warmup is over.
    """
    training, optimizer, sizes = run.training, run.optimizer, run.training.batch_sizes

    def iterations(num_samples: int) -> int:
        if num_samples > progress.num_samples:
            return progress.iteration + sizes.num_batches(progress.num_samples, num_samples)
        return min(progress.iteration, sizes.num_batches(0, num_samples))

    if training.train_iters is not None:
        train_iters = training.train_iters
    elif training.train_samples is not None:
        train_iters = iterations(training.train_samples)
    else:
        assert training.epochs is not None
        train_iters = iterations(math.ceil(training.epochs * samples_per_epoch))
    decay_iters = optimizer.lr_decay_iters or train_iters
    if optimizer.lr_decay_samples is not None:
        decay_iters = iterations(optimizer.lr_decay_samples)
    warmup_iters = optimizer.warmup_iters
    if optimizer.warmup_fraction is not None:
        warmup_iters = round(optimizer.warmup_fraction * decay_iters)
        if progress.warmup_iters is not None:
            is_over = progress.warmup_iters <= progress.iteration
            warmup_iters = progress.warmup_iters if is_over else min(progress.warmup_iters, warmup_iters)
    elif optimizer.warmup_samples is not None:
        warmup_iters = iterations(optimizer.warmup_samples)
    wsd_decay = optimizer.lr_wsd_decay_iters or 0
    if warmup_iters >= decay_iters or warmup_iters + wsd_decay > decay_iters:
        beside = f" and lr_wsd_decay_iters ({wsd_decay})" if wsd_decay else ""
        raise ConfigError(
            f"optimizer: the {warmup_iters} iterations of the warm-up{beside} must be fewer than the {decay_iters} "
            "after which the learning rate is at its lowest, which are those of the run or lr_decay_iters: make the "
            "warm-up shorter, or the run longer"
        )
    return Spans(train_iters=train_iters, warmup_iters=warmup_iters, lr_decay_iters=decay_iters)


def learning_rate(iteration: int, *, optimizer: OptimizerSection, spans: Spans) -> float:
    """Return the learning rate of ``iteration``, counted from 1.

    It rises linearly to ``lr``, reached right after ``warmup_iters``, and falls towards ``min_lr``, which iteration
    ``lr_decay_iters + 1`` would have: along a line, half a cosine (Loshchilov and Hutter, 2017, arXiv:1608.03983), or
    only in the last ``lr_wsd_decay_iters`` of them (Hu et al., 2024, arXiv:2404.06395). So no iteration is spent at a
    learning rate of 0, neither the first nor the last. The inverse square root depends on the iteration alone and
    ignores ``lr_decay_iters`` (Vaswani et al., 2017, arXiv:1706.03762).
    """
    warmup, end, style = spans.warmup_iters, spans.lr_decay_iters, optimizer.lr_decay_style
    if iteration <= warmup:
        return optimizer.lr * iteration / (warmup + 1)
    if style == "constant":
        return optimizer.lr
    if style == "inverse-square-root":
        return max(optimizer.min_lr, optimizer.lr * math.sqrt((warmup + 1) / iteration))
    start = warmup if optimizer.lr_wsd_decay_iters is None else end - optimizer.lr_wsd_decay_iters
    progress = min(1.0, max(0.0, (iteration - start - 1) / (end - start)))
    share = (1 + math.cos(math.pi * progress)) / 2 if style == "cosine" else 1 - progress
    return optimizer.min_lr + (optimizer.lr - optimizer.min_lr) * share


def weight_decay(iteration: int, *, optimizer: OptimizerSection, spans: Spans) -> float:
    """Return the weight decay of ``iteration``, counted from 1.

    It changes from the start value to the end value, which the iteration after the last of the run would have.
    """
    if optimizer.weight_decay_incr_style == "constant":
        return optimizer.weight_decay
    start, end = (
        optimizer.weight_decay if value is None else value
        for value in (optimizer.start_weight_decay, optimizer.end_weight_decay)
    )
    progress = min(1.0, (iteration - 1) / spans.train_iters)
    share = progress if optimizer.weight_decay_incr_style == "linear" else (1 - math.cos(math.pi * progress)) / 2
    return start + (end - start) * share
