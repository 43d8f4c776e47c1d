"""Any layout trains as a single process does: tensor, pipeline, sequence and data parallelism in every combination.

The combinations cover every pair of settings that goes together at all, on up to 8 processes.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

import megacore
import tiny_run
from megacore.parallel import SCHEDULES
from megacore.training import RunConfig, Step
from megacore.training.resolved import parallel_sizes
from recorded_steps import steps_on_rank, train_steps
from tiny_llama import published_model, write_dataset
from tiny_models import tied_multi_query_falcon
from tiny_run import weights

STEPS = 5
MAX_WORLD = 8

MODELS = {"grouped queries, untied": 3, "one key-value head, tied": 4}
"""Each with the tensor-parallel size above 2 that it can be cut over."""


# --- the combinations


@dataclass(frozen=True)
class Combination:
    """One setting of everything; ``tp`` is 1, 2 or "more"."""

    tp: int | str
    pp: int
    dp: int
    data_parallel: str
    sequence_parallel: bool
    schedule: str
    recompute: str
    micro_batch: int

    def is_possible(self) -> bool:
        """Whether this says nothing twice, and fits on the processes."""
        tp = 4 if self.tp == "more" else self.tp
        assert isinstance(tp, int)
        stages = self.pp * (1 if self.schedule == "1F1B" else 2)
        return (
            tp * self.pp * self.dp <= MAX_WORLD
            and (self.pp > 1 or self.schedule == "1F1B")
            and stages <= 5
            and (self.tp != 1 or not self.sequence_parallel)
            and (self.dp > 1 or self.data_parallel == "replicated")
            and (self.dp == 4 or self.data_parallel != "hybrid")
            and 8 // self.dp // self.micro_batch >= (stages if self.schedule == "DualPipeV" else self.pp)
        )

    def __str__(self) -> str:
        return ", ".join(
            part
            for part in (
                f"tp {self.tp}" + (" with sequence parallelism" if self.sequence_parallel else ""),
                f"pp {self.pp}" + (f" {self.schedule}" if self.pp > 1 else ""),
                f"dp {self.dp}" + (f" {self.data_parallel}" if self.dp > 1 else ""),
                f"recompute {self.recompute}",
                f"{self.micro_batch} at once",
            )
        )

    def overrides(self, model: str) -> list[str]:
        """What the run file is told."""
        tp = MODELS[model] if self.tp == "more" else self.tp
        assert isinstance(tp, int)
        granularity, _, num_layers = self.recompute.partition(" by ")
        return [
            f"parallel.tensor_parallel={tp}",
            f"parallel.pipeline_parallel={self.pp}",
            f"parallel.nproc_per_node={tp * self.pp * self.dp}",
            f"parallel.data_parallel={self.data_parallel}",
            *(["parallel.shard_size=2"] if self.data_parallel == "hybrid" else []),
            f"parallel.sequence_parallel={str(self.sequence_parallel).lower()}",
            f"parallel.pipeline_schedule={self.schedule}",
            f"recompute.granularity={granularity}",
            f"recompute.num_layers={num_layers or 1}",
            f"training.micro_batch_size={self.micro_batch}",
        ]


ALL = [
    combination
    for settings in itertools.product(
        [1, 2, "more"],
        [1, 2, 4],
        [1, 2, 4],
        ["replicated", "sharded", "hybrid"],
        [False, True],
        list(SCHEDULES),
        ["none", "selective", "full", "full by 2"],
        [1, 2],
    )
    if (combination := Combination(*settings)).is_possible()
]


def pairs_of(combination: Combination) -> set[tuple[Any, ...]]:
    settings = [(field.name, getattr(combination, field.name)) for field in fields(combination)]
    return set(itertools.combinations(settings, 2))


def world(combination: Combination) -> int:
    return (4 if combination.tp == "more" else int(combination.tp)) * combination.pp * combination.dp


def covering(combinations: list[Combination]) -> list[Combination]:
    """Few combinations that have every pair that any of ``combinations`` has; chosen greedily, always the same."""
    uncovered = set().union(*map(pairs_of, combinations))
    chosen = []
    while uncovered:
        chosen.append(max(combinations, key=lambda one: (len(pairs_of(one) & uncovered), -world(one))))
        uncovered -= pairs_of(chosen[-1])
    return chosen


COMBINATIONS = covering(ALL)


def test_the_combinations_are_many_and_cover_every_pair_that_is_possible():
    assert len(COMBINATIONS) >= 24
    assert set().union(*map(pairs_of, COMBINATIONS)) == set().union(*map(pairs_of, ALL))
    assert {world(combination) for combination in COMBINATIONS} >= {1, 2, 4, 8}


# --- training


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """The dataset, and a native checkpoint of each model, 5 layers and a vocabulary of 99."""
    place = tmp_path_factory.mktemp("layouts")
    write_dataset(place / "data")
    published_model(place / "published llama")
    megacore.convert("llama", place / "published llama", place / "grouped queries, untied")
    tied_multi_query_falcon(place / "published falcon")
    megacore.convert("falcon", place / "published falcon", place / "one key-value head, tied")
    return place


def run_of(place: Path, out: Path, model: str, *overrides: str) -> RunConfig:
    base = ("optimizer.min_lr=0.001", "optimizer.warmup_iters=1", "optimizer.weight_decay=0.1")
    return tiny_run.run_of(place, out, *base, *overrides, checkpoint=model)


@dataclass(frozen=True)
class Trained:
    steps: list[Step]
    weights: dict[str, Tensor]


@pytest.fixture(scope="module")
def single(place) -> dict[tuple[str, str], Trained]:
    """Each model trained by a single process, in each dtype."""
    results = {}
    for model, dtype in itertools.product(MODELS, ["fp64", "fp32"]):
        out = place / f"{model} {dtype}"
        steps = train_steps(run_of(place, out, model, f"model.dtype={dtype}"))
        results[model, dtype] = Trained(steps, weights(out))
    return results


def check(ranks, place: Path, out: Path, combination: Combination, model: str, dtype: str, expected: Trained) -> None:
    run = run_of(place, out, model, f"model.dtype={dtype}", *combination.overrides(model))
    tolerance = {"fp64": 1e-10, "fp32": 1e-5}[dtype]

    steps, *others = ranks.run(steps_on_rank, run, sizes=parallel_sizes(run.parallel))

    assert len(steps) == STEPS
    for step, other in zip(steps, expected.steps, strict=True):
        assert step.loss == pytest.approx(other.loss, rel=tolerance)
        assert step.grad_norm == pytest.approx(other.grad_norm, rel=tolerance)
    figures = [(step.loss, step.grad_norm, step.lr) for step in steps]
    assert all([(step.loss, step.grad_norm, step.lr) for step in other] == figures for other in others)
    trained = weights(out)
    assert trained.keys() == expected.weights.keys()
    for name, matrix in trained.items():
        error = (matrix - expected.weights[name]).norm() / expected.weights[name].norm()
        assert error < tolerance, f"{name} is {error:.2g} off"


@pytest.mark.parametrize("number", range(len(COMBINATIONS)))
def test_a_layout_has_the_losses_and_weights_of_a_single_process(ranks, place, single, tmp_path, number):
    model = list(MODELS)[number % 2]
    check(ranks, place, tmp_path / "out", COMBINATIONS[number], model, "fp64", single[model, "fp64"])


@pytest.mark.parametrize("number", range(0, len(COMBINATIONS), 8))
def test_a_layout_has_them_in_single_precision_too(ranks, place, single, tmp_path, number):
    model = list(MODELS)[number // 8 % 2]
    check(ranks, place, tmp_path / "out", COMBINATIONS[number], model, "fp32", single[model, "fp32"])


@pytest.mark.soak
@pytest.mark.parametrize("dtype", ["fp64", "fp32"])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("combination", COMBINATIONS, ids=str)
def test_every_one_of_these_layouts_has_them_with_either_model(
    ranks, place, single, tmp_path, combination, model, dtype
):
    check(ranks, place, tmp_path / "out", combination, model, dtype, single[model, dtype])


@pytest.mark.soak
@pytest.mark.parametrize("combination", random.Random(0).sample(ALL, 120), ids=str)
def test_many_more_layouts_have_them(ranks, place, single, tmp_path, combination):
    model, dtype = random.Random(str(combination)).choice(list(itertools.product(MODELS, ["fp64", "fp32"])))
    check(ranks, place, tmp_path / "out", combination, model, dtype, single[model, dtype])
