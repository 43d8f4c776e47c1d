"""What a step takes: its tokens, its floating-point operations, and the peak that these are a share of."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from megacore.training.plan import model_specs_of
from torch.utils.flop_counter import FlopCounterMode

import megacore
from megacore.checkpoint import Checkpoint
from megacore.data import IndexedDatasetWriter
from megacore.model import read_config
from megacore.parallel import ParallelContext, ParallelSizes
from megacore.plugins import get_family
from megacore.training import Batch, Engine, RunConfig, batches, read_run_config
from megacore.training.flops import ModelFlops, local_work, measure_peak_flops
from megacore.training.resolved import parallel_sizes, resolve_run
from recorded_steps import steps_on_rank, train_steps
from tiny_llama import VOCAB, published_model, write_dataset
from tiny_models import falcon_with_linear_biases, tied_multi_query_falcon
from tiny_run import run_of

MODELS = {
    "grouped queries, gated MLP, biases": ("llama", lambda place: published_model(
        place, attention_bias=True, mlp_bias=True)),
    "heads wider than the hidden size, tied": ("llama", lambda place: published_model(
        place, head_dim=20, tie_word_embeddings=True)),
    "multi-query, plain MLP, tied": ("falcon", tied_multi_query_falcon),
    "linear biases": ("falcon", falcon_with_linear_biases),
}  # fmt: skip


@pytest.fixture(scope="module", params=MODELS)
def place(request, tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("work")
    family, publish = MODELS[request.param]
    write_dataset(place / "data")
    publish(place / "published")
    megacore.convert(family, place / "published", place / "checkpoint")
    return place


def flops_of(engine: Engine, checkpoint: Checkpoint) -> ModelFlops:
    return ModelFlops.of(engine.stages[0].config, model_specs_of(checkpoint))


def flops_of_addmm(sum_shape, one_shape, other_shape, *, out_shape=None, **_):
    return 2 * one_shape[0] * one_shape[1] * other_shape[1]


@pytest.mark.parametrize("lengths", [None, (12, 7, 3)], ids=["whole samples", "micro-batches of several lengths"])
def test_the_operations_of_a_step_are_those_that_torch_counts(place, tmp_path, lengths):
    """Attention in single operations, so that torch sees each product."""
    run = run_of(
        place, tmp_path / "out", "training.global_batch_size=6", "training.micro_batch_size=2", "kernels.attention=math"
    )
    checkpoint = Checkpoint(run.model.checkpoint)
    engine = Engine(resolve_run(run), ParallelContext.single())
    batch = next(batches(run, checkpoint))
    batch = Batch(batch.tokens, batch.loss_mask, batch.sample_ids, micro_batch_lengths=lengths)

    # The gradient of the head is summed in place, which torch does not know how to count.
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: flops_of_addmm}) as counter:
        engine.step(batch, lr=0.01)

    work = local_work(batch, flops_of(engine, checkpoint), micro_batch_size=2)
    assert work.flops == counter.get_total_flops()
    assert work.num_tokens == (72 if lengths is None else 2 * (12 + 7 + 3))


# --- on conversations, whose batches are of any length

CHATS = """
model.checkpoint = "{place}/checkpoint"
data = {{ prefix = "{place}/chats", seq_length = 40, kind = "instruction" }}
optimizer = {{ lr = 0.01 }}
training = {{ train_iters = 3, global_batch_size = 8, micro_batch_size = 2 }}
output.checkpoint = "{out}"
"""


@pytest.fixture(scope="module")
def chats(tmp_path_factory) -> Path:
    """A model and 13 conversations of 3 to 50 tokens."""
    place = tmp_path_factory.mktemp("chats")
    published_model(place / "published")
    megacore.convert("llama", place / "published", place / "checkpoint")
    rng = np.random.default_rng(0)
    with (
        IndexedDatasetWriter(place / "chats-text", "uint16") as text,
        IndexedDatasetWriter(place / "chats-role", "uint16") as role,
    ):
        for length in (3, 50, 41, *rng.integers(4, 45, 10)):
            text.add_document(rng.integers(0, VOCAB, length))
            role.add_document(np.full(length, 1))
    return place


def chat_run(chats: Path, out: Path, *overrides: str) -> RunConfig:
    file = out.with_suffix(".toml")
    file.write_text(CHATS.format(place=chats, out=out))
    return read_run_config(file, overrides)


KINDS = {
    "variable lengths": ("data.variable_seq_lengths=true",),
    "packed": ("data.packing=true",),
    "packed, variable lengths": ("data.packing=true", "data.variable_seq_lengths=true"),
    "padded": (),
}


@pytest.mark.parametrize("overrides", KINDS.values(), ids=KINDS)
def test_tokens_and_operations_are_those_of_the_lengths_that_are_computed(chats, tmp_path, overrides):
    run = chat_run(chats, tmp_path / "out", *overrides)
    checkpoint = Checkpoint(run.model.checkpoint)
    flops = ModelFlops.of(read_config(get_family("llama"), checkpoint), model_specs_of(checkpoint))

    steps = train_steps(run)

    for step, batch in zip(steps, batches(run, checkpoint), strict=True):
        num_tokens = num_pairs = 0
        for row in range(8):  # pair by pair
            length = batch.micro_batch_lengths[row // 2] if batch.micro_batch_lengths else 40
            segments = [0] * length if batch.segments is None else batch.segments[row, :length].tolist()
            num_tokens += length
            num_pairs += sum(one == other for one in segments for other in segments)
        expected = num_tokens * flops.per_token + num_pairs * flops.per_pair
        assert step.num_tokens == num_tokens
        assert step.flops_per_second * step.seconds == pytest.approx(expected)
        assert step.tokens_per_second * step.seconds == pytest.approx(num_tokens)
    if run.data.variable_seq_lengths and not run.data.packing:
        assert any(step.num_tokens < 8 * 40 for step in steps)


@pytest.mark.parametrize("data_parallel", ["replicated", "sharded"])
@pytest.mark.parametrize("overrides", list(KINDS.values())[:2], ids=list(KINDS)[:2])
def test_processes_that_see_other_lengths_have_the_tokens_and_operations_of_all(
    ranks, chats, tmp_path, overrides, data_parallel
):
    single = train_steps(chat_run(chats, tmp_path / "single", *overrides))
    spread = (f"parallel.data_parallel={data_parallel}", "parallel.nproc_per_node=2")
    run = chat_run(chats, tmp_path / "two", *overrides, *spread)

    of_all = ranks.run(steps_on_rank, run, sizes=parallel_sizes(run.parallel))

    for steps in of_all:
        for step, expected in zip(steps, single, strict=True):
            assert step.num_tokens == expected.num_tokens
            assert step.flops_per_second * step.seconds == pytest.approx(expected.flops_per_second * expected.seconds)


def test_a_step_begins_with_waiting_for_its_batch_and_ends_before_what_is_done_between_steps(
    chats, tmp_path, monkeypatch
):
    """By a clock that only batches and what is done between steps advance."""
    now = 0.0

    def advance(seconds: float) -> None:
        nonlocal now
        now += seconds

    def slow_batches(*arguments, **keywords):
        for batch in batches(*arguments, **keywords):
            advance(3.0)
            yield batch

    monkeypatch.setattr("megacore.training.stepping.time", SimpleNamespace(perf_counter=lambda: now))
    monkeypatch.setattr("megacore.training.trainer.batches", slow_batches)
    run = chat_run(chats, tmp_path / "out", "data.prefetch=0", "logging.measure_peak=false")

    steps = train_steps(run, on_step=lambda step: advance(100.0))

    assert [step.seconds for step in steps] == [3.0] * 3
    assert steps[0].tokens_per_second == 8 * 40 / 3


# --- the peak


def test_the_measure_peak_flops_is_about_what_a_matrix_product_takes():
    """In order of magnitude: a busy machine gives either of them less at times."""
    one = torch.rand(512, 512)
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        fastest = min(_seconds(lambda: one @ one) for _ in range(20))
        peak = measure_peak_flops(ParallelContext.single(), torch.float32)
    finally:
        torch.set_num_threads(num_threads)

    assert 0.05 < peak / (2 * 512**3 / fastest) < 20


def test_the_peak_of_two_processes_is_the_sum_of_what_both_measure(ranks):
    peaks = ranks.run(measure_peak_flops, torch.float32, sizes=ParallelSizes(tp=2))
    assert peaks[0] == peaks[1] > 0


def test_measuring_leaves_random_numbers_as_they_are():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    measure_peak_flops(ParallelContext.single(), torch.float32)
    assert torch.rand(1) == expected


def test_nothing_is_measured_where_nobody_is_told_or_it_is_switched_off(chats, tmp_path, monkeypatch):
    [step, *_] = train_steps(chat_run(chats, tmp_path / "one"))
    assert step.peak_flops_per_second is None
    steps = []
    megacore.train(chat_run(chats, tmp_path / "two", "logging.measure_peak=false"), on_step=steps.append)
    assert steps[0].peak_flops_per_second is None
    megacore.train(chat_run(chats, tmp_path / "three"), on_step=steps.append)
    assert steps[-1].peak_flops_per_second > 0


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
