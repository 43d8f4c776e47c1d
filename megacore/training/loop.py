"""The training loop."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megacore.checkpoint import Checkpoint
from megacore.checkpoint.staging import require_absent
from megacore.data import DatasetDescription, IndexedDataset, SampleOrder, TokenWindows
from megacore.errors import DataError
from megacore.model import DecoderModel, load_model
from megacore.parallel import (
    ParallelContext,
    check_tensor_parallel,
    describe_imbalance,
    is_first_process,
    on_ranks,
    vocab_parallel_cross_entropy,
)
from megacore.plugins import get_family
from megacore.training.optimizer import build_optimizer, clip_gradients
from megacore.training.run_config import RunConfig
from megacore.training.saving import save_model
from megacore.training.schedule import learning_rate

DTYPES = {"fp32": torch.float32, "fp64": torch.float64}


@dataclass(frozen=True)
class Step:
    """One optimizer step.

    Attributes:
        iteration: from 1.
        train_iters: of the whole run.
        loss: mean over the tokens of the global batch, in nats, before the step.
        lr: that the step was taken with.
        grad_norm: before clipping.
        tokens_per_second: of the whole step, all ranks together.
    """

    iteration: int
    train_iters: int
    loss: float
    lr: float
    grad_norm: float
    tokens_per_second: float


def train(
    run: RunConfig, *, on_note: Callable[[str], None] | None = None, on_step: Callable[[Step], None] | None = None
) -> list[Step]:
    """Train as ``run`` says and save a native checkpoint at the end. Starts the processes that it needs.

    Args:
        run: see :func:`~megacore.training.run_config.read_run_config`.
        on_note: is told what a person should know at the start.
        on_step: is told of each step as it is done; a function of a module, since another process calls it.

    Raises:
        MegacoreError: in one of its kinds; what can be checked is checked before the model is loaded.
    """
    checkpoint = Checkpoint(run.model.checkpoint)
    get_family(checkpoint.manifest.family)
    check_tensor_parallel(checkpoint.manifest.specs, run.parallel.tensor_parallel)
    require_absent(run.output.checkpoint)
    TokenWindows(_dataset(run, checkpoint), run.data.seq_length)
    if on_note and is_first_process():
        for note in _notes(run, checkpoint):
            on_note(note)
    return on_ranks(
        _train_on_rank,
        run,
        on_step,
        tp=run.parallel.tensor_parallel,
        sequence_parallel=run.parallel.sequence_parallel,
    )


def _notes(run: RunConfig, checkpoint: Checkpoint) -> Iterator[str]:
    """What a person should know before the run starts."""
    if imbalance := describe_imbalance(checkpoint.manifest.specs, run.parallel.tensor_parallel):
        yield imbalance
    context = checkpoint.manifest.config["max_position_embeddings"]
    if run.data.seq_length > context:
        yield f"data.seq_length {run.data.seq_length} is more than the {context} positions the model was made for"


def _train_on_rank(parallel: ParallelContext, run: RunConfig, on_step: Callable[[Step], None] | None) -> list[Step]:
    checkpoint = Checkpoint(run.model.checkpoint)
    batches = _batches(run, checkpoint)
    model = load_model(checkpoint, parallel, dtype=DTYPES[run.model.dtype])
    optimizer = build_optimizer(model, run.optimizer)
    steps = []
    for iteration in range(1, run.training.train_iters + 1):
        started = time.perf_counter()
        lr = learning_rate(iteration, optimizer=run.optimizer, train_iters=run.training.train_iters)
        for group in optimizer.param_groups:
            group["lr"] = lr
        batch = next(batches)
        loss = accumulate_gradients(model, batch, micro_batch_size=run.training.micro_batch_size)
        grad_norm = clip_gradients(model, run.optimizer.clip_grad)
        optimizer.step()
        optimizer.zero_grad()
        tokens = batch.shape[0] * (batch.shape[1] - 1)
        rate = tokens / (time.perf_counter() - started)
        steps.append(Step(iteration, run.training.train_iters, loss, lr, grad_norm, rate))
        if on_step is not None and parallel.tp_rank == 0:
            on_step(steps[-1])
    save_model(
        run.output.checkpoint,
        model,
        parallel,
        started_from=checkpoint,
        details={"iterations": run.training.train_iters, "dtype": run.model.dtype},
    )
    return steps


def accumulate_gradients(model: DecoderModel, batch: Tensor, *, micro_batch_size: int) -> float:
    """Add to the gradients those of the mean loss over all tokens of ``batch``; return that loss.

    Args:
        model: as loaded; its gradients are added to.
        batch: token ids, ``[samples, sequence + 1]``.
        micro_batch_size: samples that are computed at once; the result does not depend on it.
    """
    parallel = model.parallel
    num_tokens = batch.shape[0] * (batch.shape[1] - 1)
    total = torch.zeros((), dtype=torch.float64, device=parallel.device)
    for micro_batch in batch.to(parallel.device).split(micro_batch_size):
        logits = model(micro_batch[:, :-1])
        losses = vocab_parallel_cross_entropy(
            logits, micro_batch[:, 1:], vocab_size=model.config.vocab_size, parallel=parallel
        )
        loss = losses.sum() / num_tokens
        loss.backward()
        total += loss.detach()
    return total.item()


def _batches(run: RunConfig, checkpoint: Checkpoint) -> Iterator[Tensor]:
    """The global batches of the run, ``[global_batch_size, seq_length + 1]``, the same on every rank."""
    windows = TokenWindows(_dataset(run, checkpoint), run.data.seq_length)
    order = SampleOrder(len(windows), run.data.seed)
    size = run.training.global_batch_size
    vocab_size = checkpoint.manifest.config["vocab_size"]
    for iteration in range(run.training.train_iters):
        positions = range(iteration * size, (iteration + 1) * size)
        batch = torch.stack([torch.from_numpy(windows[order[position]]) for position in positions])
        if (largest := int(batch.max())) >= vocab_size:
            raise _beyond_vocabulary(run.data.prefix, largest, vocab_size)
        yield batch


def _dataset(run: RunConfig, checkpoint: Checkpoint) -> IndexedDataset:
    """Open the run's dataset; what it was tokenized with must fit the checkpoint, where the dataset says so."""
    dataset = IndexedDataset(run.data.prefix)
    description = DatasetDescription.read(run.data.prefix)
    vocab_size = checkpoint.manifest.config["vocab_size"]
    if description is not None and description.vocab_size > vocab_size:
        raise _beyond_vocabulary(run.data.prefix, description.vocab_size - 1, vocab_size)
    return dataset


def _beyond_vocabulary(prefix: Path, largest: int, vocab_size: int) -> DataError:
    return DataError(
        f"the dataset {prefix} has token ids up to {largest}, and the checkpoint's vocabulary ends at "
        f"{vocab_size - 1}: tokenize with the checkpoint's own tokenizer"
    )
