"""Tokens that are not to be learned: the loss is the mean over those that are, of the whole global batch."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F  # noqa: N812

import tiny_run
from in_soak import all_but
from megacore.checkpoint import Checkpoint
from megacore.model import load_model
from megacore.parallel import ParallelContext
from megacore.training import Engine, RunConfig, batches
from megacore.training.resolved import parallel_sizes, resolve_run
from training_on_rank import masked, masked_gradients

LAYOUTS = {
    "one process": [],
    "one process, 4 at once": ["training.micro_batch_size=4"],
    "dp 2, each with other numbers of tokens": ["parallel.nproc_per_node=2"],
    "dp 4, one of them with a sample that counts for nothing": ["parallel.nproc_per_node=4"],
    "dp 8, two of them with nothing to learn": ["parallel.nproc_per_node=8"],
    "dp 2, sharded, 2 at once": [
        "parallel.nproc_per_node=2", "parallel.data_parallel=sharded", "training.micro_batch_size=2",
    ],
    "pp 2 × dp 2": ["parallel.nproc_per_node=4", "parallel.pipeline_parallel=2"],
    "tp 2 × dp 2": ["parallel.nproc_per_node=4", "parallel.tensor_parallel=2"],
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tiny_run.prepare(tmp_path_factory.mktemp("mask"))


def run_of(place: Path, out: Path, *overrides: str) -> RunConfig:
    return tiny_run.run_of(place, out, "model.dtype=fp64", "training.train_iters=1", *overrides)


# Masks are in every kind of layout in test_layouts.py; here are those whose processes have nothing to learn.
ORDINARY = ["one process", *(layout for layout in LAYOUTS if layout.startswith(("dp 4", "dp 8")))]


@pytest.mark.parametrize("layout", all_but(ORDINARY, LAYOUTS))
def test_the_loss_and_its_gradients_are_of_the_mean_over_all_tokens_to_learn_in_any_layout(
    place, ranks, tmp_path, layout
):
    run = run_of(place, tmp_path / "out", *LAYOUTS[layout])
    checkpoint = Checkpoint(run.model.checkpoint)
    batch = masked(next(batches(run, checkpoint)))
    model = load_model(checkpoint, ParallelContext.single(), dtype=torch.float64)
    losses = F.cross_entropy(model(batch.tokens[:, :-1]).flatten(0, 1), batch.tokens[:, 1:].flatten(), reduction="none")
    expected = losses[batch.loss_mask.flatten() == 1].mean()
    expected.backward()

    results = ranks.run(masked_gradients, run, sizes=parallel_sizes(run.parallel))

    assert all(loss == pytest.approx(expected.item(), rel=1e-12) for loss, _ in results)
    if "tensor_parallel" not in str(LAYOUTS[layout]):
        gradients = {name: gradient for _, found in reversed(results) for name, gradient in found.items()}
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=0, atol=1e-12)


def test_the_loss_is_a_mean_even_where_all_targets_together_count_less_than_one(place, tmp_path):
    run = run_of(place, tmp_path / "out")
    checkpoint = Checkpoint(run.model.checkpoint)
    batch = next(batches(run, checkpoint))
    faint = dataclasses.replace(batch, loss_mask=torch.zeros_like(batch.loss_mask))
    faint.loss_mask[0, 3] = faint.loss_mask[1, 5] = 0.125
    model = load_model(checkpoint, ParallelContext.single(), dtype=torch.float64)
    losses = F.cross_entropy(model(batch.tokens[:, :-1]).transpose(1, 2), batch.tokens[:, 1:], reduction="none")
    expected = (losses[0, 3] + losses[1, 5]) / 2

    loss, _ = Engine(resolve_run(run), ParallelContext.single()).accumulate(faint)

    assert loss == pytest.approx(expected.item(), rel=1e-12)
