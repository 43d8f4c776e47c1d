"""Parameters that are not trained: untouched in any layout, while the others are trained as ever."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import torch
from torch import Tensor

import megacore
import tiny_run
from megacore.errors import ConfigError
from megacore.parallel import ParallelContext
from megacore.training import Engine, RunConfig, Step
from megacore.training.resolved import parallel_sizes, resolve_run
from recorded_steps import steps_on_rank, train_steps
from training_on_rank import whole_gradients

FROZEN = ["embedding.*", "decoder.layers.[0-2].*", "*.4.mlp.linear_fc?.weight"]
"""With two stages, all of the first one; a whole layer and a part of another elsewhere."""

LAYOUTS = {
    "dp 2": ["parallel.nproc_per_node=2"],
    "dp 2, sharded, tp 2": [
        "parallel.nproc_per_node=4", "parallel.tensor_parallel=2", "parallel.data_parallel=sharded",
    ],
    "pp 2, sharded": [
        "parallel.nproc_per_node=4", "parallel.pipeline_parallel=2", "parallel.data_parallel=sharded",
    ],
    "pp 2, DualPipeV": ["parallel.pipeline_parallel=2", "parallel.pipeline_schedule=DualPipeV"],
}  # fmt: skip

MORE_LAYOUTS = {
    "pp 2 × dp 2": ["parallel.nproc_per_node=4", "parallel.pipeline_parallel=2"],
    "pp 2, InterleavedZeroBubble": [
        "parallel.pipeline_parallel=2", "parallel.pipeline_schedule=InterleavedZeroBubble",
    ],
    "pp 2, ZBVZeroBubble": ["parallel.pipeline_parallel=2", "parallel.pipeline_schedule=ZBVZeroBubble"],
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    place = tiny_run.prepare(tmp_path_factory.mktemp("freezing"))
    tiny_run.prepare(place / "tied", tie_word_embeddings=True)
    return place


def run_of(place: Path, out: Path, *overrides: str, freeze: list[str] | None = None) -> RunConfig:
    patterns = FROZEN if freeze is None else freeze
    base = ("model.dtype=fp64", f"training.freeze={patterns}", "training.train_iters=3", "optimizer.weight_decay=0.5")
    return tiny_run.run_of(place, out, *base, *overrides)


def is_frozen(name: str) -> bool:
    return (
        name.startswith(("embedding.", "decoder.layers.0.", "decoder.layers.1.", "decoder.layers.2."))
        or name in {"decoder.layers.4.mlp.linear_fc1.weight", "decoder.layers.4.mlp.linear_fc2.weight"}
    )  # fmt: skip


@pytest.fixture(scope="module")
def unfrozen(place) -> tuple[float, dict[str, Tensor]]:
    """The loss and the gradients without anything frozen."""
    return whole_gradients(ParallelContext.single(), run_of(place, place / "unfrozen", freeze=[]))


@pytest.mark.parametrize(
    ("patterns", "layout"),
    [
        (FROZEN, []),
        (FROZEN, ["parallel.nproc_per_node=2"]),
        (["embedding.*", "decoder.*"], []),
        (["output_layer.*"], []),
    ],
    ids=["several", "several, dp 2", "all but the head", "the head"],
)
def test_the_others_have_the_gradients_that_they_have_without(place, ranks, unfrozen, tmp_path, patterns, layout):
    run = run_of(place, tmp_path / "out", *layout, freeze=patterns)

    results = ranks.run(whole_gradients, run, sizes=parallel_sizes(run.parallel))

    expected_loss, expected = unfrozen
    for loss, gradients in results:
        assert loss == pytest.approx(expected_loss, rel=1e-13)
        assert set(gradients) == {n for n in expected if not any(fnmatchcase(n, pattern) for pattern in patterns)}
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, expected[name], rtol=0, atol=1e-13)


@pytest.fixture(scope="module")
def alone(place) -> list[Step]:
    """The steps of one process, which saves ``alone``."""
    return train_steps(run_of(place, place / "alone"))


def check(ranks, place: Path, out: Path, layout: list[str], expected: list[Step]) -> None:
    run = run_of(place, out, *layout)

    steps, *_ = ranks.run(steps_on_rank, run, sizes=parallel_sizes(run.parallel))

    assert [step.loss for step in steps] == pytest.approx([step.loss for step in expected], rel=1e-12)
    assert [step.grad_norm for step in steps] == pytest.approx([step.grad_norm for step in expected], rel=1e-10)
    before, alone = tiny_run.weights(place / "checkpoint"), tiny_run.weights(place / "alone")
    for name, trained in tiny_run.weights(out).items():
        assert torch.equal(trained, before[name].to(trained.dtype)) == is_frozen(name), name
        torch.testing.assert_close(trained, alone[name], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_frozen_parameters_do_not_change_in_any_layout_and_the_others_change_as_in_one_process(
    place, ranks, alone, tmp_path, layout
):
    check(ranks, place, tmp_path / "out", LAYOUTS[layout], alone)


@pytest.mark.soak
@pytest.mark.parametrize("layout", MORE_LAYOUTS)
def test_nor_do_they_in_more_layouts(place, ranks, alone, tmp_path, layout):
    check(ranks, place, tmp_path / "out", MORE_LAYOUTS[layout], alone)


def test_a_tied_embedding_is_frozen_on_both_stages(place, ranks, tmp_path):
    settings = ("parallel.pipeline_parallel=2", "training.train_iters=2")
    run = run_of(place / "tied", tmp_path / "out", *settings, freeze=["embedding.*"])

    ranks.run(steps_on_rank, run, sizes=parallel_sizes(run.parallel))

    name = "embedding.word_embeddings.weight"
    before, after = tiny_run.weights(place / "tied" / "checkpoint"), tiny_run.weights(tmp_path / "out")
    assert torch.equal(after[name], before[name].to(torch.float64))
    assert not torch.equal(after["decoder.final_layernorm.weight"], before["decoder.final_layernorm.weight"].double())


def test_the_optimizer_holds_nothing_of_frozen_parameters(place, tmp_path):
    run = run_of(place, tmp_path / "out")

    engine = Engine(resolve_run(run), ParallelContext.single())

    held = {id(parameter) for group in engine.optimizer.param_groups for parameter in group["params"]}
    assert held == {id(parameter) for name, parameter in engine.parameters.items() if not is_frozen(name)}


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (
            ["embedding.*", "decoder.layer.*"],
            r"'decoder\.layer\.\*' matches no parameter of the model, which has embed",
        ),
        (["embedding.*", "decoder.*", "output*"], "matches all parameters, so that there would be nothing to train"),
    ],
)
def test_patterns_that_match_nothing_or_everything_are_refused_before_training(place, tmp_path, patterns, message):
    with pytest.raises(ConfigError, match=rf"training\.freeze:? ?{message}"):
        megacore.train(run_of(place, tmp_path / "out", freeze=patterns))
