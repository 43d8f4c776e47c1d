"""What the tests of training run on each rank; in a module of its own, so that the ranks can import it."""

from __future__ import annotations

from itertools import islice

from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from megacore.checkpoint import Checkpoint
from megacore.model import load_model
from megacore.parallel import ParallelContext
from megacore.training import RunConfig, accumulate_gradients
from megacore.training.loop import DTYPES, _batches
from megacore.training.optimizer import build_optimizer, clip_gradients


def whole_gradients(parallel: ParallelContext, run: RunConfig) -> tuple[float, dict[str, Tensor]]:
    """The loss of the run's first batch, and its gradients, joined over the ranks."""
    checkpoint = Checkpoint(run.model.checkpoint)
    model = load_model(checkpoint, parallel, dtype=DTYPES[run.model.dtype])
    batch = next(_batches(run, checkpoint))
    loss = accumulate_gradients(model, batch, micro_batch_size=run.training.micro_batch_size)
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return loss, {name: g.full_tensor() if isinstance(g, DTensor) else g for name, g in gradients.items()}


def trained_replicas(parallel: ParallelContext, run: RunConfig, num_steps: int) -> dict[str, Tensor]:
    """After some steps of the run, this rank's own values of the parameters that every rank holds whole."""
    checkpoint = Checkpoint(run.model.checkpoint)
    model = load_model(checkpoint, parallel, dtype=DTYPES[run.model.dtype])
    optimizer = build_optimizer(model, run.optimizer)
    for batch in islice(_batches(run, checkpoint), num_steps):
        accumulate_gradients(model, batch, micro_batch_size=run.training.micro_batch_size)
        clip_gradients(model, run.optimizer.clip_grad)
        optimizer.step()
        optimizer.zero_grad()
    return {
        name: parameter.to_local().detach()
        for name, parameter in model.named_parameters()
        if isinstance(parameter, DTensor) and parameter.placements == (Replicate(),)
    }
