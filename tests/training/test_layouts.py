"""Any layout trains and evaluates as a single process does: on text and conversations, packed and not, with dropout.

The combinations cover every pair of settings that goes together at all, on up to 8 processes. Elsewhere each kind of
samples is compared with transformers, on one process and in what layouts are special for it.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from torch import Tensor

import megacore
import tiny_run
from megacore.data import IndexedDatasetWriter
from megacore.parallel import SCHEDULES, ParallelContext
from megacore.training import Evaluation, RunConfig, Step
from megacore.training.resolved import parallel_sizes
from tiny_llama import VOCAB, published_model, write_dataset
from tiny_models import falcon_with_linear_biases, tied_multi_query_falcon
from tiny_run import weights
from training_on_rank import trained_and_evaluated

STEPS = 5
MAX_WORLD = 8

MODELS = {"grouped queries, untied": 3, "one key-value head, tied": 4, "linear biases, tied": 3}
"""Each with the tensor-parallel size above 2 that it can be cut over."""

SAMPLES = {
    "text": ["data.prefix={place}/data", "data.valid_prefix={place}/valid"],
    "documents apart": [
        "data.prefix={place}/data", "data.valid_prefix={place}/valid", 'data.document_boundaries="reset"',
        "data.eod_mask_loss=true",
    ],
    "conversations": [
        "data.prefix={place}/chats", "data.valid_prefix={place}/valid chats", 'data.kind="instruction"',
        "data.seq_length=24", "data.variable_seq_lengths=true", "data.scalar_loss_mask=0.25",
    ],
    "packed conversations": [
        "data.prefix={place}/chats", "data.valid_prefix={place}/valid chats", 'data.kind="instruction"',
        "data.seq_length=24", "data.packing=true",
    ],
}  # fmt: skip
"""What the model learns from, and is evaluated on. A sample of text is 12 tokens, documents are of 50."""

DROPOUT = {
    "no dropout": [],
    "dropout": ["dropout.hidden=0.3"],
    "LIMA dropout": ["dropout.hidden=0.3", "dropout.lima=true"],
}


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
    model: str
    samples: str
    dropout: str

    def is_possible(self) -> bool:
        """Return whether this says nothing twice, and fits on the processes."""
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
                self.samples,
                self.dropout,
                self.model,
            )
        )

    @property
    def learned(self) -> tuple[str, str, str]:
        """The settings that decide what a single process computes."""
        return self.model, self.samples, self.dropout

    def layout(self) -> list[str]:
        """The settings of a run file that decide how the work is spread."""
        tp = MODELS[self.model] if self.tp == "more" else self.tp
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


LEARNED = list(itertools.product(MODELS, SAMPLES, DROPOUT))

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
    if Combination(*settings, *LEARNED[0]).is_possible()
    for combination in (Combination(*settings, *learned) for learned in LEARNED)
]


def pairs(combinations: list[Combination]) -> NDArray[np.bool_]:
    """Return which combination has which pair of settings, ``[combinations, pairs]``."""
    names = [field.name for field in fields(Combination)]
    values = [[getattr(combination, name) for combination in combinations] for name in names]
    numbers = [np.array([*map([*dict.fromkeys(of_all)].index, of_all)]) for of_all in values]
    has_pair = []
    for one, other in itertools.combinations(numbers, 2):
        kinds, kind_of_each = np.unique(one * 100 + other, return_inverse=True)
        has_pair.append(kind_of_each[:, None] == np.arange(len(kinds)))
    return np.concatenate(has_pair, axis=1)


def world(combination: Combination) -> int:
    return (4 if combination.tp == "more" else int(combination.tp)) * combination.pp * combination.dp


def covering(combinations: list[Combination]) -> list[int]:
    """Return the numbers of few combinations that have every pair that any has; chosen greedily, always the same."""
    has_pair = pairs(combinations)
    number_of_new = has_pair.astype(np.float32)
    cost = np.array([*map(world, combinations)]) / 1000
    uncovered = np.ones(has_pair.shape[1], dtype=np.float32)
    chosen = []
    while uncovered.any():
        chosen.append(int((number_of_new @ uncovered - cost).argmax()))
        uncovered[has_pair[chosen[-1]]] = 0
    return chosen


CHOSEN = covering(ALL)
COMBINATIONS = [ALL[number] for number in CHOSEN]


def test_the_combinations_cover_every_pair_that_is_possible():
    assert len(COMBINATIONS) >= 24
    assert pairs(ALL)[CHOSEN].any(axis=0).all()
    assert {world(combination) for combination in COMBINATIONS} >= {1, 2, 4, 8}


# --- training


def write_conversations(prefix: Path, number: int, seed: int) -> None:
    """Write a dataset of conversations of which some are longer than a sample, and some have nothing to learn."""
    rng = np.random.default_rng(seed)
    lengths = [25, 29, *rng.integers(3, 20, number - 2)]
    for name, limit in (("text", VOCAB), ("role", 3)):
        with IndexedDatasetWriter(f"{prefix}-{name}", "uint16") as writer:
            for length in lengths:
                writer.add_document(rng.integers(0, limit, length).tolist())


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """The datasets, and a native checkpoint of each model, 5 layers and a vocabulary of 99."""
    place = tmp_path_factory.mktemp("layouts")
    write_dataset(place / "data")
    write_dataset(place / "valid", num_tokens=241)  # 20 samples, which batches of 8 do not divide
    write_conversations(place / "chats", 45, seed=0)
    write_conversations(place / "valid chats", 11, seed=1)
    published_model(place / "published llama")
    megacore.convert("llama", place / "published llama", place / "grouped queries, untied")
    for model, publish in (("one key-value", tied_multi_query_falcon), ("linear biases", falcon_with_linear_biases)):
        publish(place / f"published {model}")
        name = next(name for name in MODELS if name.startswith(model))
        megacore.convert("falcon", place / f"published {model}", place / name)
    return place


def run_of(place: Path, out: Path, learned: tuple[str, str, str], dtype: str, *overrides: str) -> RunConfig:
    model, samples, dropout = learned
    base = ("optimizer.min_lr=0.001", "optimizer.warmup_iters=1", "optimizer.weight_decay=0.1", f"model.dtype={dtype}")
    evaluation = ("evaluation.iters=all", 'evaluation.metrics=["all"]')
    data = [setting.format(place=place) for setting in SAMPLES[samples]]
    more = (*base, *evaluation, *data, *DROPOUT[dropout], *overrides)
    return tiny_run.run_of(place, out, *more, checkpoint=model)


@dataclass(frozen=True)
class Trained:
    steps: list[Step]
    evaluations: list[Evaluation]
    weights: dict[str, Tensor]


@pytest.fixture(scope="module")
def single(place) -> Callable[[tuple[str, str, str], str], Trained]:
    """Train by a single process, each model on the same samples and in the same dtype once."""

    @cache
    def trained(learned: tuple[str, str, str], dtype: str) -> Trained:
        out = place / f"{' '.join(learned)} {dtype}"
        steps, evaluations = trained_and_evaluated(ParallelContext.single(), run_of(place, out, learned, dtype))
        return Trained(steps, evaluations, weights(out))

    return trained


def check(ranks, place: Path, out: Path, combination: Combination, dtype: str, expected: Trained) -> None:
    run = run_of(place, out, combination.learned, dtype, *combination.layout())
    tolerance = {"fp64": 1e-10, "fp32": 1e-5}[dtype]

    outcomes = ranks.run(trained_and_evaluated, run, sizes=parallel_sizes(run.parallel), timeout=180)

    (steps, evaluations), *others = outcomes
    assert len(steps) == STEPS
    for step, other in zip(steps, expected.steps, strict=True):
        assert step.loss == pytest.approx(other.loss, rel=tolerance)
        assert step.grad_norm == pytest.approx(other.grad_norm, rel=tolerance)
    figures = [(step.loss, step.grad_norm, step.lr) for step in steps]
    assert all([(step.loss, step.grad_norm, step.lr) for step in other] == figures for other, _ in others)
    assert [told.iteration for told in evaluations] == [STEPS]
    assert dict(evaluations[0].values) == pytest.approx(dict(expected.evaluations[0].values), rel=10 * tolerance)
    trained = weights(out)
    assert trained.keys() == expected.weights.keys()
    for name, matrix in trained.items():
        error = (matrix - expected.weights[name]).norm() / expected.weights[name].norm()
        assert error < tolerance, f"{name} is {error:.2g} off"


@pytest.mark.parametrize("number", range(len(COMBINATIONS)))
def test_a_layout_has_the_losses_and_weights_of_a_single_process(ranks, place, single, tmp_path, number):
    combination = COMBINATIONS[number]
    check(ranks, place, tmp_path / "out", combination, "fp64", single(combination.learned, "fp64"))


@pytest.mark.parametrize("number", range(0, len(COMBINATIONS), 8))
def test_a_layout_has_them_in_single_precision_too(ranks, place, single, tmp_path, number):
    combination = COMBINATIONS[number]
    check(ranks, place, tmp_path / "out", combination, "fp32", single(combination.learned, "fp32"))


@pytest.mark.soak
@pytest.mark.parametrize("dtype", ["fp64", "fp32"])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("combination", COMBINATIONS, ids=str)
def test_every_one_of_these_layouts_has_them_with_either_model(
    ranks, place, single, tmp_path, combination, model, dtype
):
    combination = replace(combination, model=model)
    check(ranks, place, tmp_path / "out", combination, dtype, single(combination.learned, dtype))


@pytest.mark.soak
@pytest.mark.parametrize("combination", random.Random(0).sample(ALL, 120), ids=str)
def test_many_more_layouts_have_them(ranks, place, single, tmp_path, combination):
    dtype = random.Random(str(combination)).choice(["fp64", "fp32"])
    check(ranks, place, tmp_path / "out", combination, dtype, single(combination.learned, dtype))
