"""The training loop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megacore.checkpoint import Checkpoint
from megacore.checkpoint.staging import require_absent
from megacore.data import DatasetDescription, IndexedDataset, SampleOrder, TokenWindows, check_token_ids
from megacore.errors import ConfigError, DataError, TrainingError
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
from megacore.training.run_config import RunConfig, read_run_config
from megacore.training.saving import reserve_output, save_model
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
    run: RunConfig | Path | str,
    *,
    on_note: Callable[[str], None] | None = None,
    on_step: Callable[[Step], None] | None = None,
) -> list[Step]:
    """Train as ``run`` says and save a native checkpoint at the end. Starts the processes that it needs.

    A script that trains on several must guard the call with ``if __name__ == "__main__":``, since each imports it.

    Args:
        run: a run file, or what :func:`~megacore.training.run_config.read_run_config` made of one.
        on_note: is told what a person should know at the start.
        on_step: is told of each step as it is done; a function of a module, since another process calls it.

    Raises:
        MegacoreError: in one of its kinds; what can be checked is checked before the model is loaded.
        TrainingError: when the loss or the gradient is no longer finite. Nothing is saved.
    """
    if not isinstance(run, RunConfig):
        run = read_run_config(Path(run))
    if not run.model.checkpoint.is_dir():
        raise ConfigError(
            f"model.checkpoint: {run.model.checkpoint} is not a directory (paths in a run file are relative to the "
            "directory that the command is started in)"
        )
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
    description, tokenizer = DatasetDescription.read(run.data.prefix), checkpoint.manifest.tokenizer
    if description is not None and tokenizer and description.tokenizer_sha256 not in tokenizer.values():
        yield f"the dataset {run.data.prefix} was made with another tokenizer than the checkpoint carries"
    context = checkpoint.manifest.config["max_position_embeddings"]
    if run.data.seq_length > context:
        yield f"data.seq_length {run.data.seq_length} is more than the {context} positions the model was made for"


def _train_on_rank(parallel: ParallelContext, run: RunConfig, on_step: Callable[[Step], None] | None) -> list[Step]:
    checkpoint = Checkpoint(run.model.checkpoint)
    dtype = DTYPES[run.model.dtype]
    num_bytes = sum(math.prod(spec.shape) for spec in checkpoint.manifest.specs.values()) * dtype.itemsize
    with reserve_output(run.output.checkpoint, parallel, started_from=checkpoint, num_bytes=num_bytes) as output:
        model = load_model(checkpoint, parallel, dtype=dtype)
        steps = []
        for step in _steps(model, run, checkpoint):
            steps.append(step)
            if on_step is not None and parallel.tp_rank == 0:
                on_step(step)
        details = {"iterations": run.training.train_iters, "dtype": run.model.dtype}
        save_model(output, model, started_from=checkpoint, details=details)
    return steps


def _steps(model: DecoderModel, run: RunConfig, checkpoint: Checkpoint) -> Iterator[Step]:
    """Take the steps of the run, one at a time."""
    optimizer = build_optimizer(model, run.optimizer)
    train_iters = run.training.train_iters
    for iteration, batch in enumerate(_batches(run, checkpoint), start=1):
        started = time.perf_counter()
        lr = learning_rate(iteration, optimizer=run.optimizer, train_iters=train_iters)
        for group in optimizer.param_groups:
            group["lr"] = lr
        loss = accumulate_gradients(model, batch, micro_batch_size=run.training.micro_batch_size)
        grad_norm = clip_gradients(model, run.optimizer.clip_grad)
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise TrainingError(
                f"iteration {iteration}: the loss is {loss} and the norm of the gradient {grad_norm}; a lower "
                "optimizer.lr may help. Nothing was saved"
            )
        optimizer.step()
        optimizer.zero_grad()
        num_tokens = batch.shape[0] * (batch.shape[1] - 1)
        yield Step(iteration, train_iters, loss, lr, grad_norm, num_tokens / (time.perf_counter() - started))


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
        yield check_token_ids(batch, vocab_size, str(run.data.prefix))


def _dataset(run: RunConfig, checkpoint: Checkpoint) -> IndexedDataset:
    """Open the run's dataset; what it was tokenized with must fit the checkpoint, where the dataset says so."""
    dataset = IndexedDataset(run.data.prefix)
    description = DatasetDescription.read(run.data.prefix)
    vocab_size = checkpoint.manifest.config["vocab_size"]
    if description is not None and description.vocab_size > vocab_size:
        raise DataError(
            f"the dataset {run.data.prefix} was made with a tokenizer of {description.vocab_size} ids, and the "
            f"checkpoint's vocabulary has {vocab_size}: tokenize with the checkpoint's own tokenizer"
        )
    return dataset
