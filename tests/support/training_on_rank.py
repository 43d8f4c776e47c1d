"""What the tests of training run on each rank; in a module of its own, so that the ranks can import it."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate
from torch.utils._python_dispatch import TorchDispatchMode

from megacore.checkpoint import Checkpoint
from megacore.data import Split
from megacore.parallel import ParallelContext, chunk_bounds, gather_parameter, local_tensor, token_scores
from megacore.testing.numerics import gather_tensor
from megacore.training import Batch, Engine, Evaluation, RunConfig, Step, batches
from megacore.training.checkpointing.train_state import state_tensors
from megacore.training.config import TrainingSection
from megacore.training.evaluation.evaluator import Evaluator
from megacore.training.evaluation.metrics import Sums, TokenScores
from megacore.training.resolved import resolve_run
from megacore.training.trainer import early_exit, train_on_rank
from recorded_steps import steps_on_rank


def whole_gradients(parallel: ParallelContext, run: RunConfig) -> tuple[float, dict[str, Tensor]]:
    """The loss of the run's first batch, and its gradients, joined over the tensor-parallel ranks."""
    checkpoint = Checkpoint(run.model.checkpoint)
    engine = Engine(resolve_run(run), parallel)
    loss, _ = engine.accumulate(next(batches(run, checkpoint, dp_rank=parallel.dp_rank, dp_size=parallel.dp_size)))
    return loss, {
        name: gather_tensor(parameter.grad, engine.specs[name], parallel)
        for name, parameter in engine.parameters.items()
        if parameter.grad is not None
    }


def trained_replicas(parallel: ParallelContext, run: RunConfig, num_steps: int) -> dict[str, Tensor]:
    """After some steps of the run, this rank's own values of the parameters that every rank holds whole."""
    checkpoint = Checkpoint(run.model.checkpoint)
    engine = Engine(resolve_run(run), parallel)
    for batch in islice(batches(run, checkpoint), num_steps):
        engine.step(batch, lr=run.optimizer.lr)
    return {
        name: parameter.to_local().detach()
        for name, parameter in engine.parameters.items()
        if isinstance(parameter, DTensor) and parameter.placements == (Replicate(),)
    }


def num_elements_held(parallel: ParallelContext, run: RunConfig) -> int:
    """How many elements of all parameters this rank holds."""
    engine = Engine(resolve_run(run), parallel)
    return sum(
        (parameter.to_local() if isinstance(parameter, DTensor) else parameter).numel()
        for parameter in engine.parameters.values()
    )


class _Counting(TorchDispatchMode):
    """Counts the collectives that are called, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.times: dict[str, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            name = func.overloadpacket.__name__
            self.times[name] = self.times.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


def num_bytes_to_save(parallel: ParallelContext, run: RunConfig) -> dict[str, int]:
    """Of each tensor that this rank saves after a step, and so copies first when it goes on training meanwhile."""
    checkpoint = Checkpoint(run.model.checkpoint)
    engine = Engine(resolve_run(run), parallel)
    engine.step(next(batches(run, checkpoint, dp_rank=parallel.dp_rank, dp_size=parallel.dp_size)), lr=1e-3)
    return {name: tensor.part.nbytes for name, tensor in state_tensors(engine).items()}


def collectives_of_a_step(parallel: ParallelContext, run: RunConfig) -> dict[str, int]:
    """How often each collective is called in the second step of the run."""
    checkpoint = Checkpoint(run.model.checkpoint)
    engine = Engine(resolve_run(run), parallel)
    own = batches(run, checkpoint, dp_rank=parallel.dp_rank, dp_size=parallel.dp_size)
    engine.step(next(own), lr=run.optimizer.lr)
    with _Counting() as counting:
        engine.step(next(own), lr=run.optimizer.lr)
    return counting.times


def gathered_gradients(parallel: ParallelContext, run: RunConfig) -> dict[str, Tensor]:
    """The gradients of the run's first batch, of each parameter the whole, on the first rank of those that share it."""
    checkpoint = Checkpoint(run.model.checkpoint)
    engine = Engine(resolve_run(run), parallel)
    engine.accumulate(next(batches(run, checkpoint, dp_rank=parallel.dp_rank, dp_size=parallel.dp_size)))
    return {name: gather_parameter(p.grad, parallel) for name, p in engine.parameters.items() if p.grad is not None}


def step_that_overflows_on(parallel: ParallelContext, run: RunConfig, rank: int) -> tuple[bool, dict[str, float], bool]:
    """Whether a step that overflows on ``rank`` is taken, the loss scale after it, and whether a weight changes."""
    checkpoint = Checkpoint(run.model.checkpoint)
    engine = Engine(resolve_run(run), parallel)
    before = {name: local_tensor(parameter).clone() for name, parameter in engine.parameters.items()}
    if parallel.rank == rank:
        cut = next(name for name, spec in engine.specs.items() if spec.shard_dim is not None)  # no replica has it
        engine.parameters[cut].register_hook(lambda gradient: gradient * float("inf"))
    own = batches(run, checkpoint, dp_rank=parallel.dp_rank, dp_size=parallel.dp_size)
    result = engine.step(next(own), lr=run.optimizer.lr)
    assert engine.loss_scale is not None
    has_changed = any(not torch.equal(before[name], local_tensor(p)) for name, p in engine.parameters.items())
    return result.is_taken, engine.loss_scale.state(), has_changed


def masked(batch: Batch) -> Batch:
    """The batch with every fourth sample, and a third of the others' tokens, left out of the loss."""
    positions = torch.arange(batch.loss_mask.shape[1])
    numbers = batch.sample_ids.unsqueeze(-1)
    learned = (numbers % 4 != 0) & ((numbers * 7 + positions * 5) % 3 != 0)
    return replace(batch, loss_mask=learned.to(batch.loss_mask.dtype))


def masked_gradients(parallel: ParallelContext, run: RunConfig) -> tuple[float, dict[str, Tensor]]:
    """As :func:`gathered_gradients`, with the loss, of the :func:`masked` batch."""
    checkpoint = Checkpoint(run.model.checkpoint)
    engine = Engine(resolve_run(run), parallel)
    batch = next(batches(run, checkpoint, dp_rank=parallel.dp_rank, dp_size=parallel.dp_size))
    loss, _ = engine.accumulate(masked(batch))
    return loss, {
        name: gather_parameter(p.grad, parallel) for name, p in engine.parameters.items() if p.grad is not None
    }


SEGMENTS = [
    [7, 2, 1, 2],
    [12],
    [1, 11],
    [3, 3, 3, 3],
    [2, 7, 3],
    [1] * 12,
    [11, 1],
    [5, 7],
]
"""How long the segments of samples 0 to 7 are; of the last two samples the last segment is padding."""


def segmented(batch: Batch) -> Batch:
    """The batch with segments of the lengths in :data:`SEGMENTS`, and a loss that counts most tokens but no padding."""
    numbers = [torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in SEGMENTS]
    segments = torch.stack([numbers[int(sample) % 8] for sample in batch.sample_ids]).to(torch.int32)
    positions = torch.arange(batch.loss_mask.shape[1])
    learned = (batch.sample_ids.unsqueeze(-1) * 7 + positions * 5) % 6 != 0
    learned &= ~((batch.sample_ids.unsqueeze(-1) % 8 >= 6) & (segments == 1))
    return replace(batch, loss_mask=learned.to(batch.loss_mask.dtype), segments=segments)


def segmented_gradients(parallel: ParallelContext, run: RunConfig) -> tuple[float, dict[str, Tensor]]:
    """The loss of the :func:`segmented` first batch of the run, and its gradients, whole where this rank has them."""
    checkpoint = Checkpoint(run.model.checkpoint)
    engine = Engine(resolve_run(run), parallel)
    batch = next(batches(run, checkpoint, dp_rank=parallel.dp_rank, dp_size=parallel.dp_size))
    loss, _ = engine.accumulate(segmented(batch))
    return loss, {
        name: gather_parameter(p.grad, parallel)
        if parallel.sizes.dp_shard > 1
        else gather_tensor(p.grad, engine.specs[name], parallel)
        for name, p in engine.parameters.items()
        if p.grad is not None
    }


def train_on_what_each_sees(parallel: ParallelContext, runs: list[RunConfig]) -> None:
    """Train each rank by a run file of its own."""
    train_on_rank(parallel, resolve_run(runs[parallel.rank]))


def evaluated(parallel: ParallelContext, run: RunConfig, split: Split = "valid") -> Evaluation:
    """What comes of the evaluation of the model that the run starts from."""
    resolved = resolve_run(run)
    evaluation = Evaluator(resolved, Engine(resolved, parallel)).evaluate(split, iteration=0)
    assert evaluation is not None
    return evaluation


def gradients_held_after_evaluation(parallel: ParallelContext, run: RunConfig) -> int:
    """How many elements the gradients have that this rank holds, in buffers or not, after an evaluation alone."""
    resolved = resolve_run(run)
    engine = Engine(resolved, parallel, trains=False)
    Evaluator(resolved, engine).evaluate("valid", iteration=0)
    return sum(0 if parameter.grad is None else parameter.grad.numel() for parameter in engine.parameters.values())


def evaluated_until_rank_1_is_asked_to_stop(parallel: ParallelContext, run: RunConfig) -> Evaluation | None:
    """What comes of an evaluation that goes on until its second batch."""
    resolved = resolve_run(run)
    asked = iter([False, True])
    return Evaluator(resolved, Engine(resolved, parallel)).evaluate(
        "valid", iteration=0, wants_stop=lambda: parallel.rank == 1 and next(asked)
    )


def trained_and_evaluated(parallel: ParallelContext, run: RunConfig) -> tuple[list[Step], list[Evaluation]]:
    """Train as the run says; what was told on the way, on this rank if it is the first."""
    evaluations: list[Evaluation] = []
    return steps_on_rank(parallel, run, on_evaluation=evaluations.append), evaluations


def share_of_certain(scores: TokenScores) -> Sums:
    """A metric of a user's own: how many tokens have a loss below 3."""
    return (scores.losses < 3).sum(), float(scores.losses.numel())


def ends_after_a_minute(parallel: ParallelContext, slow_rank: int | None = None) -> str | None:
    """Why a run ends that may take a minute, where for one of its ranks two are over."""
    minutes = 2.0 if parallel.rank == slow_rank else 0.0
    return early_exit(TrainingSection(train_iters=10, exit_duration_in_mins=1), 1, minutes=minutes, parallel=parallel)


def scores_of_tokens(parallel: ParallelContext, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The scores of ``targets`` by a head of ``weight``, of which each rank takes its rows."""
    first, last = chunk_bounds(len(weight), parallel.tp_size, parallel.tp_rank)
    return token_scores(hidden, weight[first:last], targets, vocab_size=len(weight), parallel=parallel)
