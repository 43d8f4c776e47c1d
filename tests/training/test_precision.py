"""What is computed in 16 bit and what is not, recomputation, and what data parallelism communicates."""

from __future__ import annotations

import math
from itertools import accumulate
from pathlib import Path

import pytest
import torch

import megacore
import tiny_run
from megacore.checkpoint import Checkpoint
from megacore.data import IndexedDatasetWriter
from megacore.errors import TrainingError
from megacore.parallel import ParallelContext
from megacore.training import Engine, RunConfig, Step, batches
from megacore.training.config import LossScaleSection
from megacore.training.loss_scale import LossScale
from megacore.training.resolved import parallel_sizes, resolve_run
from recorded_steps import steps_on_rank, train_steps
from tiny_run import weights
from training_on_rank import collectives_of_a_step, gathered_gradients, num_elements_held, step_that_overflows_on


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tiny_run.prepare(tmp_path_factory.mktemp("precision"))


def run_of(place: Path, out: Path, *overrides: str, dtype: str = "fp32") -> RunConfig:
    return tiny_run.run_of(place, out, f"model.dtype={dtype}", "training.train_iters=6", *overrides)


def losses(steps: list[Step]) -> list[float]:
    return [step.loss for step in steps]


# --- 16 bit


@pytest.fixture(scope="module")
def in_fp32(place) -> list[Step]:
    return train_steps(run_of(place, place / "fp32"))


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_16_bit_losses_are_near_those_of_32_bit_and_not_the_same(place, in_fp32, tmp_path, dtype):
    steps = train_steps(run_of(place, tmp_path / "out", dtype=dtype))

    assert losses(steps) == pytest.approx(losses(in_fp32), rel=0.01)
    assert losses(steps)[0] != losses(in_fp32)[0]


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_weights_are_held_and_saved_in_32_bit_so_that_steps_too_small_for_16_bit_add_up(place, tmp_path, dtype):
    megacore.train(run_of(place, tmp_path / "out", "optimizer.lr=1e-6", "optimizer.weight_decay=0", dtype=dtype))

    before, after = weights(place / "checkpoint"), weights(tmp_path / "out")
    for name, matrix in after.items():
        moved = (matrix - before[name]).abs()
        assert matrix.dtype == torch.float32
        assert 1e-6 < moved.max() < 1e-5, name  # of numbers near 0.2, where bfloat16 counts in steps of 1e-3


@pytest.mark.parametrize(("recompute", "copies"), [("none", 1), ("selective", 1), ("full", 0)])
def test_micro_batches_whose_backward_pass_is_to_come_share_one_16_bit_copy_of_the_weights(
    place, tmp_path, recompute, copies
):
    run = run_of(place, tmp_path / "out", f"recompute.granularity={recompute}", dtype="bf16")
    engine = Engine(resolve_run(run), ParallelContext.single())
    [model] = engine.stages
    weight = model.get_parameter("decoder.layers.0.mlp.linear_fc1.weight").flatten(0, -2)
    tokens = torch.zeros((1, run.data.seq_length), dtype=torch.int64)
    kept = []

    def keep(tensor):
        if tensor.dtype == torch.bfloat16 and tensor.shape in (weight.shape, weight.t().shape):
            kept.append(tensor.detach())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        graphs = [model(tokens, targets=tokens, token_weights=torch.ones(tokens.shape)) for _ in range(2)]

    assert len(graphs) == 2
    storages = {tensor.untyped_storage().data_ptr() for tensor in kept}
    assert len(storages) == copies * model.config.num_layers


DATA_PARALLEL = {
    "replicated": ["parallel.nproc_per_node=2"],
    "sharded": ["parallel.nproc_per_node=2", "parallel.data_parallel=sharded"],
    "hybrid": ["parallel.nproc_per_node=4", "parallel.data_parallel=hybrid", "parallel.shard_size=2"],
}


@pytest.mark.parametrize("layout", DATA_PARALLEL)
def test_gradients_in_bf16_are_summed_over_micro_batches_and_processes_in_32_bit(place, ranks, tmp_path, layout):
    expected = gathered_gradients(ParallelContext.single(), run_of(place, tmp_path / "one", dtype="bf16"))
    run = run_of(place, tmp_path / "out", *DATA_PARALLEL[layout], dtype="bf16")

    found = ranks.run(gathered_gradients, run, sizes=parallel_sizes(run.parallel))[0]

    # The same micro-batches, so the same roundings in each; sums in bfloat16 would be 4e-3 apart.
    for name, gradient in found.items():
        assert gradient.dtype == torch.float32
        scale = expected[name].abs().max()
        torch.testing.assert_close(gradient / scale, expected[name] / scale, rtol=0, atol=2e-6)


@pytest.mark.parametrize("layout", DATA_PARALLEL)
def test_bf16_trains_alike_in_every_form_of_data_parallelism(place, ranks, tmp_path, layout):
    expected = train_steps(run_of(place, tmp_path / "one", dtype="bf16"))
    run = run_of(place, tmp_path / "out", *DATA_PARALLEL[layout], dtype="bf16")

    steps = ranks.run(steps_on_rank, run, sizes=parallel_sizes(run.parallel))[0]

    assert losses(steps) == pytest.approx(losses(expected), rel=2e-3)


# --- the loss scale


def test_steps_that_overflow_in_fp16_are_skipped_and_counted_until_the_scale_fits(place, in_fp32, tmp_path):
    settings = ("loss_scale.initial=1e9", "loss_scale.hysteresis=1", "training.train_iters=20")

    steps = train_steps(run_of(place, tmp_path / "out", *settings, dtype="fp16"))

    overflowed = [not math.isfinite(step.grad_norm) for step in steps]
    assert overflowed[:5] == [True] * 5
    assert overflowed[-1] is False
    for step, num_skipped in zip(steps, accumulate(overflowed), strict=True):
        assert (step.num_skipped, step.loss_scale) == (num_skipped, 1e9 / 2**num_skipped)


def test_a_skipped_step_leaves_the_weights_as_they_were(place, tmp_path):
    run = run_of(place, tmp_path / "out", "loss_scale.initial=1e12", dtype="fp16")
    checkpoint = Checkpoint(run.model.checkpoint)
    engine = Engine(resolve_run(run), ParallelContext.single())
    before = {name: parameter.detach().clone() for name, parameter in engine.parameters.items()}

    result = engine.step(next(batches(run, checkpoint)), lr=0.01)

    assert not result.is_taken
    assert [name for name, parameter in engine.parameters.items() if not torch.equal(parameter, before[name])] == []


def test_a_run_that_overflows_at_the_smallest_scale_again_and_again_ends_without_a_result(place, tmp_path):
    settings = ("loss_scale.initial=4e12", "loss_scale.minimum=1e12", "loss_scale.hysteresis=1")
    settings += ("faults.max_skipped_in_a_row=3",)

    with pytest.raises(TrainingError, match=r"iteration 5: .* norm of the gradient .*so 3 steps in a row"):
        megacore.train(run_of(place, tmp_path / "out", *settings, dtype="fp16"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("layout", ["one process", "tp 2", "dp 2, sharded"])
def test_the_gradient_of_a_frequent_token_is_summed_in_32_bit(place, ranks, tmp_path, layout):
    """Of a token that is everywhere: sums in bfloat16 stand still once they are 256 times what is added."""
    with IndexedDatasetWriter(tmp_path / "data", "uint16") as writer:
        writer.add_document([7] * 4000)
    overrides = {
        "one process": [],
        "tp 2": ["parallel.tensor_parallel=2"],
        "dp 2, sharded": DATA_PARALLEL["sharded"],
    }[layout]
    more = [f"data.prefix={tmp_path / 'data'}", "data.seq_length=400", "training.micro_batch_size=4", *overrides]
    expected = gathered_gradients(ParallelContext.single(), run_of(place, tmp_path / "out", *more[:3]))
    run = run_of(place, tmp_path / "out", *more, dtype="bf16")

    found = ranks.run(gathered_gradients, run, sizes=parallel_sizes(run.parallel))[0]

    name = "embedding.word_embeddings.weight"
    error = (found[name][7] - expected[name][7]).norm() / expected[name][7].norm()
    assert error < 0.05


def test_the_reported_loss_and_norm_do_not_depend_on_the_scale(place, tmp_path):
    one, other = (
        train_steps(run_of(place, tmp_path / scale, f"loss_scale.initial={scale}", dtype="fp16"))[0]
        for scale in ("64", "1024")
    )

    assert one.loss == pytest.approx(other.loss, rel=1e-3)
    assert one.grad_norm == pytest.approx(other.grad_norm, rel=1e-3)


IN_EVERY_WAY = ["parallel.tensor_parallel=2", "parallel.pipeline_parallel=2", "parallel.nproc_per_node=8"]


def test_fp16_overflows_and_trains_alike_on_many_processes(place, ranks, tmp_path):
    settings = ("loss_scale.initial=1e7", "loss_scale.hysteresis=1")
    expected = train_steps(run_of(place, tmp_path / "one", *settings, dtype="fp16"))
    run = run_of(place, tmp_path / "out", *settings, *IN_EVERY_WAY, dtype="fp16")

    steps = ranks.run(steps_on_rank, run, sizes=parallel_sizes(run.parallel))[0]

    assert [(step.num_skipped, step.loss_scale) for step in steps] == [
        (step.num_skipped, step.loss_scale) for step in expected
    ]
    assert 0 < expected[-1].num_skipped < len(expected)
    assert losses(steps) == pytest.approx(losses(expected), rel=1e-2)


@pytest.mark.parametrize("rank", [0, 5])
def test_a_step_that_overflows_on_one_rank_is_taken_on_none(place, ranks, tmp_path, rank):
    run = run_of(place, tmp_path / "out", *IN_EVERY_WAY, dtype="fp16")

    outcomes = ranks.run(step_that_overflows_on, run, rank, sizes=parallel_sizes(run.parallel))

    scale = LossScale(run.loss_scale)
    scale.overflowed()
    assert outcomes == [(False, scale.state(), False)] * 8


def test_the_scale_halves_after_as_many_overflows_as_it_is_patient_with_and_doubles_after_a_window():
    scale = LossScale(LossScaleSection(initial=1024.0, minimum=256.0, window=3, hysteresis=2))

    factors = []
    for overflow in (True, False, True, True, True, False, False, False, True, True):
        scale.overflowed() if overflow else scale.stepped()
        factors.append(scale.factor)

    assert factors == [1024, 1024, 512, 256, 256, 256, 256, 512, 512, 256]


# --- recomputation


@pytest.fixture(scope="module")
def kept(place) -> dict[str, list[Step]]:
    """Runs that recompute nothing, by their dtype."""
    return {dtype: train_steps(run_of(place, place / f"kept {dtype}", dtype=dtype)) for dtype in ("fp32", "bf16")}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "recompute",
    [["granularity=selective"], ["granularity=full"], ["granularity=full", "num_layers=2"]],
    ids=["selective", "full", "full, two layers at a time"],
)
def test_recomputing_gives_the_same_losses_and_weights_to_the_bit(place, kept, tmp_path, recompute, dtype):
    settings = [f"recompute.{setting}" for setting in recompute]
    steps = train_steps(run_of(place, tmp_path / "recomputed", *settings, dtype=dtype))

    assert [(s.loss, s.grad_norm) for s in steps] == [(s.loss, s.grad_norm) for s in kept[dtype]]
    expected, recomputed = weights(place / f"kept {dtype}"), weights(tmp_path / "recomputed")
    assert [name for name in expected if not torch.equal(expected[name], recomputed[name])] == []


RECOMPUTED_ON_RANKS = {
    "tp 2, sequence parallel": ["parallel.tensor_parallel=2", "parallel.sequence_parallel=true"],
    "pp 2": ["parallel.pipeline_parallel=2"],
    "dp 2, sharded": DATA_PARALLEL["sharded"],
}


@pytest.mark.parametrize(
    ("layout", "granularity"),
    [
        ("tp 2, sequence parallel", "selective"),
        ("pp 2", "full"),
        ("dp 2, sharded", "full"),
        pytest.param("tp 2, sequence parallel", "full", marks=pytest.mark.soak),
        pytest.param("pp 2", "selective", marks=pytest.mark.soak),
        pytest.param("dp 2, sharded", "selective", marks=pytest.mark.soak),
    ],
)
def test_recomputing_gives_the_same_to_the_bit_on_several_ranks(place, ranks, tmp_path, layout, granularity):
    outcomes = []
    for chosen in ("none", granularity):
        settings = (f"recompute.granularity={chosen}", *RECOMPUTED_ON_RANKS[layout])
        run = run_of(place, tmp_path / chosen, *settings)
        steps = ranks.run(steps_on_rank, run, sizes=parallel_sizes(run.parallel))[0]
        outcomes.append([(step.loss, step.grad_norm) for step in steps])

    assert outcomes[0] == outcomes[1]
    kept, recomputed = weights(tmp_path / "none"), weights(tmp_path / granularity)
    assert [name for name in kept if not torch.equal(kept[name], recomputed[name])] == []


# --- what data parallelism holds and communicates


def test_replicas_hold_all_parameters_and_shards_their_part(place, ranks, tmp_path):
    def held(*overrides: str) -> list[int]:
        run = run_of(place, tmp_path / "out", *overrides)
        return ranks.run(num_elements_held, run, sizes=parallel_sizes(run.parallel))

    whole = held("parallel.nproc_per_node=1")[0]

    assert held(*DATA_PARALLEL["replicated"]) == [whole] * 2
    assert sum(held(*DATA_PARALLEL["sharded"])) == whole
    assert max(held(*DATA_PARALLEL["sharded"])) < 0.51 * whole
    assert sum(held(*DATA_PARALLEL["hybrid"])) == 2 * whole


@pytest.mark.parametrize("layout", DATA_PARALLEL)
def test_gradients_are_reduced_once_a_step_however_many_micro_batches_it_has(place, ranks, tmp_path, layout):
    def counted(micro_batch_size: int) -> dict[str, int]:
        settings = [*DATA_PARALLEL[layout], f"training.micro_batch_size={micro_batch_size}"]
        run = run_of(place, tmp_path / "out", *settings)
        counts = ranks.run(collectives_of_a_step, run, sizes=parallel_sizes(run.parallel))[0]
        return {name: times for name, times in counts.items() if "reduce" in name}

    assert counted(1) == counted(2)
    assert sum(counted(1).values()) > 0
