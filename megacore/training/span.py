"""How long a run and its parts are, in iterations."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megacore.errors import ConfigError
from megacore.training.config.run_config import RunConfig
from megacore.training.progress import Progress

START = Progress()


@dataclass(frozen=True, kw_only=True)
class Spans:
    """Counted from the beginning of the run, in iterations.

    Attributes:
        train_iters: the whole run.
        warmup_iters: in which the learning rate rises.
        lr_decay_iters: after which it is at its lowest.
    """

    train_iters: int
    warmup_iters: int = 0
    lr_decay_iters: int


def spans_of(run: RunConfig, samples_per_epoch: int, progress: Progress = START) -> Spans:
    """What the run file says in iterations, samples, epochs or shares, all in iterations.

    Samples are turned into iterations through the size of the batches. A run may go on with batches of another size:
    those to come after ``progress`` count, and what it has passed stays passed. A warm-up that is a share of the run is
    one of the run as it began: what is made longer is not warmed up again.

    Raises:
        ConfigError: when the learning rate would fall before it has risen.
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
    fall = optimizer.lr_wsd_decay_iters or 0
    if warmup_iters >= decay_iters or warmup_iters + fall > decay_iters:
        told = f" and lr_wsd_decay_iters ({fall})" if fall else ""
        raise ConfigError(
            f"optimizer: the {warmup_iters} iterations of the warm-up{told} must be fewer than the {decay_iters} after "
            "which the learning rate is at its lowest, which are those of the run or lr_decay_iters: make the warm-up "
            "shorter, or the run longer"
        )
    return Spans(train_iters=train_iters, warmup_iters=warmup_iters, lr_decay_iters=decay_iters)
