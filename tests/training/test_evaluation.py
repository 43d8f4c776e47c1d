"""Evaluation: the losses and metrics of transformers on the same samples, in any layout, and nothing left behind."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch.nn import functional as F  # noqa: N812
from transformers import LlamaForCausalLM

import megacore
import tiny_run
from in_soak import all_but
from megacore.checkpoint import Checkpoint
from megacore.cli import cli
from megacore.data import IndexedDataset, SampleOrder, TokenWindows
from megacore.errors import ConfigError
from megacore.parallel import ParallelContext, ParallelSizes
from megacore.parallel.pipeline.forward_only import forward_plan
from megacore.parallel.tensor.loss import CHUNK_BYTES
from megacore.training import Engine, Evaluation, RunConfig, Step, batches
from megacore.training.evaluation.metrics import TokenScores, resolve_metrics
from megacore.training.resolved import parallel_sizes, resolve_run
from recorded_steps import train_steps
from tiny_llama import write_dataset
from training_on_rank import (
    evaluated,
    evaluated_until_rank_1_is_asked_to_stop,
    gradients_held_after_evaluation,
    scores_of_tokens,
    trained_and_evaluated,
)

METRICS = 'evaluation.metrics=["perplexity", "accuracy", "count_loss_mask"]'

LAYOUTS = {
    "one process": [],
    "one process, 4 at once": ["training.micro_batch_size=4"],
    "tp 3 with sequence parallelism": ["parallel.tensor_parallel=3", "parallel.sequence_parallel=true"],
    "tp 2 × dp 2, sharded": [
        "parallel.tensor_parallel=2", "parallel.nproc_per_node=4", "parallel.data_parallel=sharded",
    ],
    "pp 2 × dp 2, sharded": [
        "parallel.pipeline_parallel=2", "parallel.nproc_per_node=4", "parallel.data_parallel=sharded",
    ],
    "pp 2, interleaved, tp 2": [
        "parallel.pipeline_parallel=2", "parallel.tensor_parallel=2", "parallel.pipeline_schedule=Interleaved1F1B",
    ],
    "pp 2, DualPipeV": ["parallel.pipeline_parallel=2", "parallel.pipeline_schedule=DualPipeV"],
    "dp 2": ["parallel.nproc_per_node=2"],
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    place = tiny_run.prepare(tmp_path_factory.mktemp("evaluation"))
    write_dataset(place / "valid", num_tokens=241)  # 20 samples, which batches of 8 do not divide
    return place


def run_of(place: Path, out: Path, *overrides: str) -> RunConfig:
    base = ("model.dtype=fp64", f"data.valid_prefix={place / 'valid'}", "data.eod_mask_loss=true")
    return tiny_run.run_of(place, out, *base, *overrides)


def with_transformers(place: Path, num_samples: int) -> dict[str, float]:
    """Loss and metrics of the first samples, all tokens together."""
    model = LlamaForCausalLM.from_pretrained(place / "published", dtype=torch.float64, attn_implementation="eager")
    windows = TokenWindows(IndexedDataset(place / "valid"), 12)
    order = SampleOrder(len(windows), seed=1234)
    tokens = torch.stack([torch.from_numpy(windows[order[position]]) for position in range(num_samples)])
    starts = torch.tensor([[windows.start(order[position])] for position in range(num_samples)])
    is_learned = (starts + torch.arange(1, 13)) % 50 != 0  # documents are of 50 tokens
    with torch.no_grad():
        logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
    losses = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none").view(num_samples, 12)
    loss = losses[is_learned].mean()
    return {
        "loss": loss.item(),
        "perplexity": loss.exp().item(),
        "accuracy": (logits.argmax(-1) == tokens[:, 1:])[is_learned].double().mean().item(),
        "count_loss_mask": is_learned.sum().item() / num_samples,
    }


# What any other layout evaluates is compared with a single process in test_layouts.py.
@pytest.mark.parametrize("layout", all_but(["one process", "pp 2, interleaved, tp 2"], LAYOUTS))
def test_any_layout_has_the_loss_and_the_resolve_metrics_transformers_on_all_samples(place, ranks, tmp_path, layout):
    run = run_of(place, tmp_path / "out", METRICS, "evaluation.iters=all", *LAYOUTS[layout])

    evaluations = ranks.run(evaluated, run, sizes=parallel_sizes(run.parallel))

    expected = with_transformers(place, 20)
    one_process = evaluated(ParallelContext.single(), run_of(place, tmp_path / "one", METRICS, "evaluation.iters=all"))
    for evaluation in evaluations:
        assert list(evaluation.values) == list(expected)
        assert dict(evaluation.values) == pytest.approx(expected, rel=1e-6)  # its norms are in single precision
        assert dict(evaluation.values) == pytest.approx(dict(one_process.values), rel=1e-12)


def test_a_number_of_batches_is_that_of_the_first_samples(place, tmp_path):
    run = run_of(place, tmp_path / "out", METRICS, "evaluation.iters=2")

    evaluation = evaluated(ParallelContext.single(), run)

    assert dict(evaluation.values) == pytest.approx(with_transformers(place, 16), rel=1e-6)


@pytest.mark.parametrize("layout", all_but(["one process", "tp 2 × dp 2, sharded", "pp 2, DualPipeV", "dp 2"], LAYOUTS))
def test_evaluation_changes_nothing_about_training_and_comes_when_it_is_due(place, ranks, tmp_path, layout):
    settings = ("training.train_iters=3", "data.eod_mask_loss=true", "dropout.hidden=0.1", *LAYOUTS[layout])
    plain = tiny_run.run_of(place, tmp_path / "plain", *settings, "model.dtype=bf16")
    split = (f"data.test_prefix={place / 'valid'}", "evaluation.interval=2", "evaluation.iters=all")
    often = run_of(place, tmp_path / "often", *settings, *split, "model.dtype=bf16")

    (expected, none), *_ = ranks.run(trained_and_evaluated, plain, sizes=parallel_sizes(plain.parallel))
    (steps, evaluations), *_ = ranks.run(trained_and_evaluated, often, sizes=parallel_sizes(often.parallel))

    assert [(step.loss, step.grad_norm) for step in steps] == [(step.loss, step.grad_norm) for step in expected]
    assert none == []
    assert [(told.split, told.iteration) for told in evaluations] == [("valid", 2), ("valid", 3), ("test", 3)]
    assert evaluations[1].values == evaluations[2].values != evaluations[0].values
    trained, without = tiny_run.weights(tmp_path / "often"), tiny_run.weights(tmp_path / "plain")
    assert [name for name in without if not torch.equal(trained[name], without[name])] == []


def test_no_copy_of_a_weight_is_kept_after_an_evaluation(place, tmp_path):
    run = run_of(place, tmp_path / "out", "model.dtype=bf16")
    checkpoint = Checkpoint(run.model.checkpoint)
    engine = Engine(resolve_run(run), ParallelContext.single())

    engine.score(next(batches(run, checkpoint)))

    assert [name for name, module in engine.stages[0].named_modules() if getattr(module, "casts", None)] == []


def test_nothing_is_dropped_in_evaluation(place, tmp_path):
    settings = ("dropout.hidden=0.5", "dropout.attention=0.5", "evaluation.iters=2", METRICS)

    evaluation = evaluated(ParallelContext.single(), run_of(place, tmp_path / "out", *settings))

    assert dict(evaluation.values) == pytest.approx(with_transformers(place, 16), rel=1e-6)


# --- asked to stop


def stopping_at(*iterations: int) -> Callable[[Step | Evaluation], None]:
    """Sends this process a SIGTERM when it is told of these iterations."""

    def told(of: Step | Evaluation) -> None:
        if of.iteration in iterations:
            signal.raise_signal(signal.SIGTERM)

    return told


EVERY_SECOND = ("training.train_iters=4", "evaluation.interval=2", "evaluation.iters=all")


@pytest.mark.parametrize("iteration", [2, 4], ids=["an evaluation on the way", "the last one"])
def test_an_evaluation_that_a_signal_interrupts_is_made_when_the_run_goes_on(place, tmp_path, iteration):
    settings = (*EVERY_SECOND, f"data.test_prefix={place / 'valid'}")
    whole: list[Evaluation] = []
    megacore.train(run_of(place, tmp_path / "whole", *settings), on_evaluation=whole.append)
    run = run_of(place, tmp_path / "out", *settings)
    before: list[Evaluation] = []
    after: list[Evaluation] = []

    steps = train_steps(run, on_step=stopping_at(iteration), on_evaluation=before.append)
    assert (steps[-1].iteration, steps[-1].stopped_by) == (iteration, "SIGTERM")
    assert not (tmp_path / "out").exists()
    steps = train_steps(run, resume=True, on_evaluation=after.append)

    assert [step.iteration for step in steps] == list(range(iteration + 1, 5))
    assert [(told.split, told.iteration) for told in whole] == [("valid", 2), ("valid", 4), ("test", 4)]
    assert [*before, *after] == whole
    assert (tmp_path / "out").is_dir()


def test_a_signal_during_an_evaluation_that_is_made_up_ends_the_program_and_leaves_it_to_be_made(place, tmp_path):
    run = run_of(place, tmp_path / "out", *EVERY_SECOND, f"data.test_prefix={place / 'valid'}")
    megacore.train(run, on_step=stopping_at(4))

    with pytest.raises(SystemExit) as left:
        megacore.train(run, resume=True, on_evaluation=stopping_at(4))

    assert left.value.code == 128 + signal.SIGTERM
    told: list[Evaluation] = []
    megacore.train(run, resume=True, on_evaluation=told.append)
    assert [of.split for of in told] == ["valid", "test"]


def test_a_signal_to_one_rank_ends_the_evaluation_on_all(place, ranks, tmp_path):
    run = run_of(place, tmp_path / "out", *EVERY_SECOND, "parallel.nproc_per_node=2")

    evaluations = ranks.run(evaluated_until_rank_1_is_asked_to_stop, run, sizes=parallel_sizes(run.parallel))

    assert evaluations == [None, None]


# --- without training


@pytest.mark.parametrize("layout", ["one process", "tp 2 × dp 2, sharded", "pp 2, DualPipeV", "dp 2"])
def test_a_model_is_evaluated_by_itself_in_any_layout_and_nothing_is_written(place, tmp_path, layout):
    settings = (METRICS, "evaluation.iters=all", f"data.test_prefix={place / 'valid'}", *LAYOUTS[layout])
    run = run_of(place, tmp_path / "out", *settings)
    before = sorted(tmp_path.rglob("*"))

    valid, test = megacore.evaluate(run)

    assert (valid.split, valid.iteration, test.split) == ("valid", 0, "test")
    assert dict(valid.values) == pytest.approx(with_transformers(place, 20), rel=1e-6)
    assert test.values == valid.values
    assert sorted(tmp_path.rglob("*")) == before


def test_no_memory_is_taken_for_gradients_where_nothing_is_trained(place, ranks, tmp_path):
    run = run_of(place, tmp_path / "out", *LAYOUTS["dp 2"])

    assert ranks.run(gradients_held_after_evaluation, run, sizes=parallel_sizes(run.parallel)) == [0, 0]


def test_what_a_run_has_saved_is_evaluated_as_the_run_did(place, tmp_path):
    run = run_of(place, tmp_path / "out", "training.train_iters=4", "evaluation.interval=2", "checkpoints.interval=2")
    during: list[Evaluation] = []
    megacore.train(run, on_evaluation=during.append)
    saved = tmp_path / "out-checkpoints"

    for load, expected in (("iteration-0000002", during[0]), ("", during[1]), ("../out", during[1])):
        assert megacore.evaluate(run, load=saved / load) == [expected]


def test_only_the_data_to_evaluate_on_need_be_there(place, tmp_path):
    run = run_of(place, tmp_path / "out", f"data.prefix={place / 'elsewhere'}")

    [evaluation] = megacore.evaluate(run)

    assert evaluation.split == "valid"


def test_the_command_prints_a_line_a_split_and_says_how_much_it_looks_at(place, tmp_path):
    run_of(place, tmp_path / "out")
    given = ["evaluate", str(tmp_path / "out.toml"), "--set", f"data.valid_prefix={place / 'valid'}"]
    given += ["--set", "evaluation.iters=2"]

    line, objects = (CliRunner().invoke(cli, words) for words in (given, [*given, "--json"]))

    assert (line.exit_code, objects.exit_code) == (0, 0), line.output + objects.output
    assert re.fullmatch(r"valid \| loss \d\.\d+ \| perplexity \d+\.?\d*\n", line.stdout)
    assert "evaluation.iters selects the first 16 of these samples" in line.stderr
    found = json.loads(objects.stdout)
    assert found["split"] == "valid"
    assert found["values"]["loss"] == pytest.approx(float(line.stdout.split()[3]), rel=1e-5)


def test_a_run_file_with_nothing_to_evaluate_on_is_refused(place, tmp_path):
    with pytest.raises(ConfigError, match=r"there is nothing to evaluate on: name it with data\.valid_prefix or"):
        megacore.evaluate(tiny_run.run_of(place, tmp_path / "out"))


# --- scores of tokens


@pytest.mark.parametrize("chunk", [None, 3])
def test_scores_are_the_losses_of_torch_and_what_argmax_says(ranks, monkeypatch, chunk):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 5, 8, generator=generator, dtype=torch.float64)
    weight = torch.randn(99, 8, generator=generator, dtype=torch.float64)
    logits = hidden @ weight.T
    targets = torch.where(torch.arange(10).view(2, 5) % 3 == 0, logits.argmax(-1), torch.arange(10).view(2, 5) * 9)
    if chunk:
        monkeypatch.setitem(CHUNK_BYTES, "cpu", chunk * 4 * 99)
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(2, 5)

    alone = scores_of_tokens(ParallelContext.single(), hidden, weight, targets)

    for found in (alone, *ranks.run(scores_of_tokens, hidden, weight, targets, sizes=ParallelSizes(tp=2))):
        torch.testing.assert_close(found[..., 0], expected, rtol=1e-13, atol=1e-13)
        assert torch.equal(found[..., 1] > 0, logits.argmax(-1) == targets)


def test_of_equally_probable_tokens_the_first_is_the_one(ranks):
    """As they are wherever 16 bit cannot tell them apart."""
    hidden, targets = torch.ones(1, 4, 2), torch.tensor([[0, 3, 60, 98]])
    weight = torch.zeros(99, 2)
    weight[[3, 60, 98]] = 1.0  # on either rank

    for found in ranks.run(scores_of_tokens, hidden, weight, targets, sizes=ParallelSizes(tp=2)):
        assert found[0, :, 1].tolist() == [0, 1, 0, 0]
    assert scores_of_tokens(ParallelContext.single(), hidden, weight, targets)[0, :, 1].tolist() == [0, 1, 0, 0]


# --- metrics


def scores(**given: list[list[float]]) -> TokenScores:
    return TokenScores(
        losses=torch.tensor(given["losses"], dtype=torch.float64),
        is_top=torch.tensor(given["is_top"]) > 0,
        loss_mask=torch.tensor(given["loss_mask"], dtype=torch.float64),
        is_assistant=torch.tensor(given["is_assistant"]) > 0,
    )


SCORES = scores(
    losses=[[1, 2, 3], [4, 5, 6]],
    is_top=[[1, 0, 1], [1, 1, 0]],
    loss_mask=[[1, 0.5, 0], [0.5, 1, 1]],
    is_assistant=[[1, 0, 0], [0, 1, 1]],
)
"""Of two samples; of the tokens to learn three are right, of the assistant's two."""


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("perplexity", np.exp((1 + 2 * 0.5 + 4 * 0.5 + 5 + 6) / 4)),
        ("accuracy", 3 / 5),
        ("instruct_accuracy", 2 / 3),
        ("count_loss_mask", 5 / 2),
        ("count_instruct_mask", 3 / 2),
    ],
)
def test_a_metric_is_of_the_tokens_that_its_mask_has(name, expected):
    metric = resolve_metrics([name], conversations=True)[name]

    total, count = metric.sums(SCORES)

    assert metric.finish(float(total) / float(count)) == pytest.approx(expected)


@pytest.mark.parametrize("loss", [0.0, 3.0, 1e4, np.inf, np.nan])
def test_the_perplexity_is_the_exponential_of_any_loss(loss):
    perplexity = resolve_metrics(["perplexity"], conversations=False)["perplexity"]
    with np.errstate(over="ignore"):
        assert perplexity.finish(loss) == pytest.approx(np.exp(loss), nan_ok=True)


def test_a_metric_of_ones_own_is_named_by_its_module(place, tmp_path):
    run = run_of(place, tmp_path / "out", 'evaluation.metrics=["training_on_rank:share_of_certain"]')

    values = evaluated(ParallelContext.single(), run).values

    assert list(values) == ["loss", "share_of_certain"]
    assert 0 < values["share_of_certain"] < 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "instruct_accuracy",
            r'instruct_accuracy needs conversations, and data\.kind is "text": choose from accuracy,',
        ),
        ("acuracy", r"there is no metric acuracy; available are perplexity, accuracy, .*package\.module:function"),
        ("nowhere.at_all:metric", r"nowhere\.at_all:metric cannot be imported: No module named 'nowhere'"),
        ("math:metric", r"math:metric cannot be imported: module 'math' has no attribute 'metric'"),
        ("math:pi", r"math:pi is not a function but 3\.14"),
        ("loss", r"there is no metric loss"),
    ],
)
def test_a_metric_that_is_not_there_is_refused_before_training(place, tmp_path, name, message):
    with pytest.raises(ConfigError, match=rf"evaluation\.metrics: {message}"):
        megacore.train(run_of(place, tmp_path / "out", f'evaluation.metrics=["{name}"]'))


def test_all_metrics_are_those_that_fit_the_data():
    assert list(resolve_metrics(["all"], conversations=False)) == ["perplexity", "accuracy", "count_loss_mask"]
    assert len(resolve_metrics(["all"], conversations=True)) == 5


def test_evaluation_without_data_for_it_is_refused(place, tmp_path):
    with pytest.raises(ConfigError, match=r"\[evaluation\] needs something to evaluate on: give data\.split"):
        tiny_run.run_of(place, tmp_path / "out", "evaluation.interval=2")


def test_the_command_prints_evaluations_and_why_it_stops(place, tmp_path):
    run_of(place, tmp_path / "out")
    settings = {
        "data.valid_prefix": place / "valid", "evaluation.interval": 1, "training.skip_iters": [1],
        "training.exit_interval": 2,
    }  # fmt: skip
    overrides = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]

    result = CliRunner().invoke(cli, ["train", str(tmp_path / "out.toml"), *overrides])

    assert result.exit_code == 0, result.output
    skipped, first, step, second, stopped = result.stdout.splitlines()
    assert "| not taken" in skipped and "not taken" not in step
    assert re.fullmatch(r"valid at iteration 1 \| loss \d\.\d+ \| perplexity \d+\.?\d*", first)
    assert re.fullmatch(r"valid at iteration 2 \| loss \d\.\d+ \| perplexity \d+\.?\d*", second)
    assert stopped == "Stopped by training.exit_interval (2) after iteration 2; resume with --resume."
    assert not (tmp_path / "out").exists()


# --- stages run forward only


@pytest.mark.parametrize("owners", [[0, 1, 2], [0, 1, 0, 1], [0, 1, 1, 0], [0, 1, 2, 2, 1, 0]])
@pytest.mark.parametrize("num_micro_batches", [1, 2, 7])
def test_micro_batches_go_through_all_stages_in_order_and_no_process_does_two_things_at_once(owners, num_micro_batches):
    plan = forward_plan(owners, num_micro_batches)

    done: set[tuple[int, int]] = set()
    for step in plan:
        for process, (stage, micro_batch) in step.items():
            assert owners[stage] == process
            assert stage == 0 or (stage - 1, micro_batch) in done
        done |= set(step.values())
    assert done == {(stage, number) for stage in range(len(owners)) for number in range(num_micro_batches)}
    least = num_micro_batches * len(owners) // (max(owners) + 1)
    assert len(plan) <= least + 2 * len(owners)
