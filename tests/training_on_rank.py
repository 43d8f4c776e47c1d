"""What the tests of training run on each rank; in a module of its own, so that the ranks can import it."""

from __future__ import annotations

from itertools import islice

from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from megacore.checkpoint import Checkpoint
from megacore.parallel import ParallelContext
from megacore.testing.numerics import whole_tensor
from megacore.training import Engine, RunConfig, batches


def whole_gradients(parallel: ParallelContext, run: RunConfig) -> tuple[float, dict[str, Tensor]]:
    """The loss of the run's first batch, and its gradients, joined over the tensor-parallel ranks."""
    checkpoint = Checkpoint(run.model.checkpoint)
    engine = Engine(run, checkpoint, parallel)
    loss, _ = engine.accumulate(next(batches(run, checkpoint, dp_rank=parallel.dp_rank, dp_size=parallel.dp_size)))
    return loss, {
        name: whole_tensor(parameter.grad, engine.specs[name], parallel)
        for name, parameter in engine.parameters.items()
        if parameter.grad is not None
    }


def trained_replicas(parallel: ParallelContext, run: RunConfig, num_steps: int) -> dict[str, Tensor]:
    """After some steps of the run, this rank's own values of the parameters that every rank holds whole."""
    checkpoint = Checkpoint(run.model.checkpoint)
    engine = Engine(run, checkpoint, parallel)
    for batch in islice(batches(run, checkpoint), num_steps):
        engine.step(batch, lr=run.optimizer.lr)
    return {
        name: parameter.to_local().detach()
        for name, parameter in engine.parameters.items()
        if isinstance(parameter, DTensor) and parameter.placements == (Replicate(),)
    }
