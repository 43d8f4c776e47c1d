"""What the tests of training on conversations run on each rank; in a module of its own, which ranks can import."""

from __future__ import annotations

from megacore.checkpoint import Checkpoint
from megacore.parallel import ParallelContext
from megacore.training import Engine, RunConfig, batches
from megacore.training.resolved import resolve_run


def losses_and_norms(parallel: ParallelContext, run: RunConfig) -> list[tuple[float, float]]:
    """The loss and the norm of the gradient of each of the run's batches; no step is taken."""
    checkpoint = Checkpoint(run.model.checkpoint)
    engine = Engine(resolve_run(run), parallel)
    found = []
    for batch in batches(run, checkpoint, dp_rank=parallel.dp_rank, dp_size=parallel.dp_size):
        engine.zero_gradients()
        found.append(engine.accumulate(batch))
    return found
