"""Learning rate and weight decay of each iteration, against torch and transformers; batches that grow; lengths."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import LlamaForCausalLM

import megacore
import tiny_run
from megacore.checkpoint import Checkpoint
from megacore.data import IndexedDataset, SampleOrder, TokenWindows
from megacore.errors import ConfigError, LayoutError
from megacore.parallel import ParallelSizes
from megacore.training import Step, batches, read_run_config
from megacore.training.config import BatchSizes, OptimizerSection
from megacore.training.resolved import parallel_sizes
from megacore.training.schedule import Progress, Spans, learning_rate, resolve_spans, weight_decay
from recorded_steps import steps_on_rank, train_steps
from training_on_rank import ends_after_a_minute


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tiny_run.prepare(tmp_path_factory.mktemp("schedules"))


# --- learning rate and weight decay


def rates_of(scheduler: Any, num_iterations: int) -> list[float]:
    """What a scheduler of torch has set after 1, 2, … of its steps. At its step 0 the rate may be 0."""
    rates = []
    for _ in range(num_iterations):
        scheduler.optimizer.step()
        scheduler.step()
        rates.append(scheduler.get_last_lr()[0])
    return rates


def sgd() -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)


# The peak is one iteration later there, and the end one too: our first iteration is their second, which is not at 0.
@pytest.mark.parametrize("warmup", [0, 1, 7])
@pytest.mark.parametrize(
    ("settings", "name", "arguments"),
    [
        ({"lr_decay_style": "constant"}, "constant_schedule_with_warmup", lambda w: {}),
        ({"lr_decay_style": "linear"}, "linear_schedule_with_warmup", lambda w: {"num_training_steps": 31}),
        (
            {"lr_decay_style": "cosine", "min_lr": 0.1},
            "cosine_with_min_lr_schedule_with_warmup",
            lambda w: {"num_training_steps": 31, "min_lr": 0.1},
        ),
        ({"lr_decay_style": "inverse-square-root"}, "inverse_sqrt_schedule", lambda w: {}),
        (
            {"lr_decay_style": "WSD", "lr_wsd_decay_iters": 9},
            "wsd_schedule",
            lambda w: {"num_decay_steps": 9, "num_training_steps": 31, "decay_type": "linear"},
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_learning_rates_are_those_of_transformers(settings, name, arguments, warmup):
    scheduler = getattr(transformers, f"get_{name}", None) or getattr(transformers.optimization, f"get_{name}")
    expected = rates_of(scheduler(sgd(), num_warmup_steps=warmup + 1, **arguments(warmup)), 30)

    optimizer = OptimizerSection(lr=0.5, **settings)
    spans = Spans(train_iters=30, warmup_iters=warmup, lr_decay_iters=30)
    rates = [learning_rate(iteration, optimizer=optimizer, spans=spans) for iteration in range(1, 31)]

    assert rates == pytest.approx(expected, rel=1e-12)
    assert min(rates) > 0


@pytest.mark.parametrize("style", ["linear", "cosine", "WSD"])
def test_after_the_decay_the_rate_stays_at_its_lowest(style):
    fall = {"lr_wsd_decay_iters": 4} if style == "WSD" else {}
    optimizer = OptimizerSection(lr=1.0, min_lr=0.25, lr_decay_style=style, **fall)
    spans = Spans(train_iters=50, warmup_iters=2, lr_decay_iters=10)

    rates = [learning_rate(iteration, optimizer=optimizer, spans=spans) for iteration in range(10, 51)]

    assert rates[0] > 0.25
    assert rates[1:] == [0.25] * 40


def test_the_inverse_square_root_does_not_fall_below_the_lowest():
    optimizer = OptimizerSection(lr=1.0, min_lr=0.25, lr_decay_style="inverse-square-root")
    spans = Spans(train_iters=50, warmup_iters=0, lr_decay_iters=50)

    assert learning_rate(15, optimizer=optimizer, spans=spans) > 0.25
    assert learning_rate(17, optimizer=optimizer, spans=spans) == 0.25


@pytest.mark.parametrize("style", ["linear", "cosine"])
def test_weight_decay_goes_from_the_start_to_the_end(style):
    optimizer = OptimizerSection(lr=1, weight_decay_incr_style=style, start_weight_decay=0.02, end_weight_decay=0.1)
    spans = Spans(train_iters=8, lr_decay_iters=8)

    decays = [weight_decay(iteration, optimizer=optimizer, spans=spans) for iteration in range(1, 10)]

    shares = {
        "linear": [i / 8 for i in range(9)],
        "cosine": [0.5 * (math.cos(math.pi * (1 - i / 8)) + 1) for i in range(9)],  # as Megatron-LM writes it
    }
    assert decays == pytest.approx([0.02 + 0.08 * share for share in shares[style]])


def test_without_a_style_weight_decay_is_the_same_throughout():
    spans = Spans(train_iters=8, lr_decay_iters=8)

    assert weight_decay(8, optimizer=OptimizerSection(lr=1, weight_decay=0.3), spans=spans) == 0.3


# --- in training, against torch


def with_torch(place: Path, kind: str) -> list[tuple[float, float]]:
    """Four steps of a transformers model, weight decay from 0.5 to 0.1 along a line, the rate constant."""
    model = LlamaForCausalLM.from_pretrained(place / "published", dtype=torch.float32, attn_implementation="eager")
    named = list(model.named_parameters())
    groups = [{"params": [p for n, p in named if "norm" not in n]}, {"params": [p for n, p in named if "norm" in n]}]
    optimizer = {
        "sgd": lambda: torch.optim.SGD(groups, lr=0.05, momentum=0.8),
        "adamw": lambda: torch.optim.AdamW(groups, lr=0.05, betas=(0.9, 0.95), eps=1e-5),
    }[kind]()
    windows = TokenWindows(IndexedDataset(place / "data"), 12)
    order = SampleOrder(len(windows), seed=1234)
    steps = []
    for step in range(4):
        optimizer.param_groups[0]["weight_decay"] = 0.5 - 0.1 * step
        optimizer.param_groups[1]["weight_decay"] = 0.0
        batch = torch.stack([torch.from_numpy(windows[order[8 * step + i]]) for i in range(8)])
        logits = model(input_ids=batch[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        steps.append((loss.item(), norm.item()))
    return steps


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_weight_decay_that_changes_and_sgd_train_as_with_torch(place, tmp_path, kind):
    file = tmp_path / "run.toml"
    keys = {"adamw": "eps = 1e-5", "sgd": 'kind = "sgd", sgd_momentum = 0.8'}[kind]
    file.write_text(
        f"model.checkpoint = '{place / 'checkpoint'}'\ndata = {{ prefix = '{place / 'data'}', seq_length = 12 }}\n"
        f"optimizer = {{ lr = 0.05, {keys}, lr_decay_style = 'constant', weight_decay_incr_style = 'linear', "
        "start_weight_decay = 0.5, end_weight_decay = 0.1 }\ntraining = { train_iters = 4, global_batch_size = 8 }\n"
        f"output.checkpoint = '{tmp_path / 'out'}'\n"
    )

    steps = train_steps(file)

    expected = with_torch(place, kind)
    assert [step.loss for step in steps] == pytest.approx([loss for loss, _ in expected], rel=1e-5)
    assert [step.grad_norm for step in steps] == pytest.approx([norm for _, norm in expected], rel=1e-4)


# --- batches that grow


GROWING = "training.rampup_batch_size=[4, 2, 12]"
"""Batches of 4, 6 and, after 12 samples, 8; the last of 4 begins at sample 4, the last of 6 at sample 8."""


def test_batches_grow_in_spans_of_equally_many_samples():
    sizes = BatchSizes(12, start=4, increment=4, ramp=24)

    assert [sizes.at(seen) for seen in (0, 8, 11, 12, 23, 24, 1000)] == [4, 4, 4, 8, 8, 12, 12]
    assert list(sizes.sizes) == [4, 8, 12]


@pytest.mark.parametrize(
    "sizes",
    [
        BatchSizes(7),
        BatchSizes(12, 4, 4, 24),
        BatchSizes(12, 3, 3, 1000),
        BatchSizes(40, 2, 2, 30),
        BatchSizes(5, 5, 1, 9),
    ],
)
def test_the_number_of_batches_is_that_of_taking_one_after_the_other(sizes):
    for first in (0, 3, 17, 200):
        for until in (0, 1, 20, 24, 25, 333, 1500):
            batches, seen = 0, first
            while seen < until:
                seen += sizes.at(seen)
                batches += 1
            assert sizes.num_batches(first, until) == batches


@pytest.fixture(scope="module")
def grown(place) -> list[Step]:
    """The steps of one process that takes batches that grow."""
    return train_steps(tiny_run.run_of(place, place / "grown", "model.dtype=fp64", GROWING))


@pytest.mark.parametrize(
    "layout",
    [
        ["parallel.nproc_per_node=2"],
        ["parallel.nproc_per_node=2", "parallel.data_parallel=sharded"],
        ["parallel.pipeline_parallel=2"],
    ],
    ids=["dp 2", "dp 2, sharded", "pp 2"],
)
def test_batches_that_grow_are_the_same_in_any_layout(place, ranks, grown, tmp_path, layout):
    run = tiny_run.run_of(place, tmp_path / "out", "model.dtype=fp64", GROWING, *layout)

    steps, *_ = ranks.run(steps_on_rank, run, sizes=parallel_sizes(run.parallel))

    assert [step.batch_size for step in steps] == [step.batch_size for step in grown] == [4, 4, 6, 8, 8]
    assert [step.loss for step in steps] == pytest.approx([step.loss for step in grown], rel=1e-10)
    assert [step.grad_norm for step in steps] == pytest.approx([step.grad_norm for step in grown], rel=1e-10)


def test_batches_that_grow_see_each_sample_once_and_go_on_anywhere(place, tmp_path):
    run = tiny_run.run_of(place, tmp_path / "out", GROWING)
    whole = list(batches(run, Checkpoint(place / "checkpoint")))
    assert [number for batch in whole for number in batch.sample_ids.tolist()] == list(range(4 + 4 + 6 + 8 + 8))

    rest = list(batches(run, Checkpoint(place / "checkpoint"), progress=Progress(iteration=3, num_samples=14)))

    assert [batch.sample_ids.tolist() for batch in rest] == [batch.sample_ids.tolist() for batch in whole[3:]]


def test_a_batch_size_on_the_way_that_the_processes_cannot_share_is_refused_with_the_remedy(place, tmp_path):
    run = tiny_run.run_of(place, tmp_path / "out", GROWING, "parallel.nproc_per_node=4")

    message = r"rampup_batch_size \(6\) must be a multiple of .* \(4\): let it start with, and grow by, multiples of 4"
    with pytest.raises(LayoutError, match=message):
        megacore.train(run)


# --- lengths


def spans(place: Path, tmp_path: Path, *overrides: str, progress: Progress | None = None) -> Spans:
    """Of a run on data of which an epoch is 83 samples, in batches of 8."""
    file = tmp_path / "run.toml"
    file.write_text(
        f"model.checkpoint = '{place / 'checkpoint'}'\ndata = {{ prefix = '{place / 'data'}', seq_length = 12 }}\n"
        f"optimizer.lr = 0.1\ntraining.global_batch_size = 8\noutput.checkpoint = '{tmp_path / 'out'}'\n"
    )
    return resolve_spans(read_run_config(file, overrides), 83, progress or Progress())


def test_epochs_and_samples_are_turned_into_iterations_that_reach_them(place, tmp_path):
    assert spans(place, tmp_path, "training.epochs=1").train_iters == 11  # 10 batches are 80 samples
    assert spans(place, tmp_path, "training.epochs=2.5").train_iters == 26
    assert spans(place, tmp_path, "training.train_samples=80").train_iters == 10
    assert spans(place, tmp_path, "training.train_samples=81", GROWING).train_iters == 12  # 4 + 4 + 6 + 9 * 8


def test_warmup_and_decay_are_given_in_iterations_in_samples_or_as_a_share(place, tmp_path):
    length = "training.train_iters=100"
    assert spans(place, tmp_path, length).lr_decay_iters == 100
    assert spans(place, tmp_path, length, "optimizer.warmup_fraction=0.29").warmup_iters == 29
    shorter = spans(place, tmp_path, length, "optimizer.warmup_fraction=0.1", "optimizer.lr_decay_iters=50")
    assert shorter == Spans(train_iters=100, warmup_iters=5, lr_decay_iters=50)
    samples = ("optimizer.warmup_samples=33", "optimizer.lr_decay_samples=800")
    assert spans(place, tmp_path, length, *samples) == Spans(train_iters=100, warmup_iters=5, lr_decay_iters=100)


def test_lengths_are_the_same_from_anywhere_in_the_run(place, tmp_path):
    settings = ("training.epochs=3", "optimizer.warmup_samples=20", "optimizer.lr_decay_samples=200", GROWING)
    expected = spans(place, tmp_path, *settings)
    sizes, progress = BatchSizes(8, 4, 2, 12), Progress()
    while progress.iteration < expected.train_iters:
        assert spans(place, tmp_path, *settings, progress=progress) == expected
        progress = Progress(
            iteration=progress.iteration + 1, num_samples=progress.num_samples + sizes.at(progress.num_samples)
        )


def test_a_run_that_goes_on_with_larger_batches_ends_with_the_same_samples(place, tmp_path):
    there = Progress(iteration=10, num_samples=80)

    longer = spans(place, tmp_path, "training.train_samples=400", "training.global_batch_size=32", progress=there)

    assert longer.train_iters == 10 + 10


def test_a_run_that_goes_on_with_smaller_batches_is_not_warmed_up_again(place, tmp_path):
    there = Progress(iteration=3, num_samples=96)  # by batches of 32, now they are of 8

    found = spans(place, tmp_path, "training.train_iters=50", "optimizer.warmup_samples=40", progress=there)

    assert found.warmup_iters == 3


def cosine_after(warmup: int, end: int, iterations: range) -> list[float]:
    """From a peak of 0.01, as the guide writes it."""
    return [0.01 * (1 + math.cos(math.pi * (i - warmup - 1) / (end - warmup))) / 2 for i in iterations]


def test_a_run_that_is_made_longer_keeps_the_warm_up_that_was_a_share_of_it(place, tmp_path):
    def rates(train_iters: int, *overrides: str, resume: bool = True) -> list[float]:
        settings = ("optimizer.warmup_fraction=0.5", "checkpoints.interval=100", f"training.train_iters={train_iters}")
        run = tiny_run.run_of(place, tmp_path / "out", *settings, *overrides)
        return [step.lr for step in train_steps(run, resume=resume)]

    assert rates(4, resume=False) == pytest.approx([0.01 / 3, 0.02 / 3, *cosine_after(2, 4, range(3, 5))])
    assert rates(8) == pytest.approx(cosine_after(2, 8, range(5, 9)))
    assert rates(12) == pytest.approx(cosine_after(2, 12, range(9, 13)))
    other = rates(16, "optimizer.warmup_fraction=0.875")  # 14 iterations, since that was asked for
    assert other == pytest.approx([0.01 * i / 15 for i in (13, 14)] + cosine_after(14, 16, range(15, 17)))


def test_a_run_that_is_made_longer_or_shorter_in_its_warm_up_goes_on_with_the_shorter_one(place, tmp_path):
    def warmup(train_iters: int) -> int:
        there = Progress(iteration=30, num_samples=240, warmup_iters=50)
        settings = ("optimizer.warmup_fraction=0.1", f"training.train_iters={train_iters}")
        return spans(place, tmp_path, *settings, progress=there).warmup_iters

    assert (warmup(500), warmup(2000), warmup(400)) == (50, 50, 40)


def test_raising_the_number_of_iterations_leaves_a_decay_of_its_own_as_it_was(place, tmp_path):
    def rates(train_iters: int) -> list[float]:
        decay = ("optimizer.lr_decay_iters=10", "optimizer.warmup_fraction=0.2")
        found = spans(place, tmp_path, f"training.train_iters={train_iters}", *decay)
        optimizer = OptimizerSection(lr=0.1, warmup_fraction=0.2, lr_decay_iters=10)
        return [learning_rate(iteration, optimizer=optimizer, spans=found) for iteration in range(1, 11)]

    assert rates(10) == rates(25)


# --- steps that are skipped, and runs that end early


def test_a_skipped_iteration_sees_its_samples_and_changes_nothing(place, tmp_path):
    steady = ("optimizer.lr_decay_style=constant", "training.train_iters=3")
    plain = train_steps(tiny_run.run_of(place, tmp_path / "plain", *steady, "training.train_iters=1"))
    steps = train_steps(tiny_run.run_of(place, tmp_path / "out", *steady, "training.skip_iters=[2, 3]"))

    assert [step.is_taken for step in steps] == [True, False, False]
    assert len({step.loss for step in steps}) == 3
    assert steps[0].loss == plain[0].loss
    trained, expected = tiny_run.weights(tmp_path / "out"), tiny_run.weights(tmp_path / "plain")
    assert [name for name in expected if not torch.equal(trained[name], expected[name])] == []


def test_a_skipped_iteration_may_be_one_that_is_not_finite(place, tmp_path):
    wild = ("optimizer.lr=1e200", "optimizer.lr_decay_style=constant", "training.train_iters=2")

    steps = train_steps(tiny_run.run_of(place, tmp_path / "out", *wild, "training.skip_iters=[2]"))

    assert not math.isfinite(steps[1].loss)


@pytest.mark.parametrize(
    ("override", "num_steps", "reason"),
    [
        ("training.exit_interval=2", 2, "training.exit_interval (2)"),
        ("training.exit_duration_in_mins=1e-9", 1, "training.exit_duration_in_mins (1e-09)"),
        ("training.exit_interval=5", 5, None),
    ],
)
def test_a_run_ends_early_and_says_why(place, tmp_path, override, num_steps, reason):
    steps = train_steps(tiny_run.run_of(place, tmp_path / "out", override))

    assert [step.stopped_by for step in steps] == [None] * (num_steps - 1) + [reason]
    saved = tmp_path / ("out" if reason is None else f"out-checkpoints/iteration-{num_steps:07d}")
    assert Checkpoint(saved).manifest.history[-1]["iterations"] == num_steps
    assert (tmp_path / "out").exists() == (reason is None)


def test_all_processes_end_when_one_finds_that_time_is_over(ranks):
    assert ranks.run(ends_after_a_minute, sizes=ParallelSizes(dp_replicate=2)) == [None, None]
    late = ranks.run(ends_after_a_minute, 1, sizes=ParallelSizes(dp_replicate=2))
    assert late == ["training.exit_duration_in_mins (1)"] * 2


# --- what a run file may not say


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["training.epochs=1"], r"training: train_iters and epochs say the same: give one of"),
        (["optimizer.warmup_iters=1", "optimizer.warmup_fraction=0.1"], "warmup_iters and warmup_fraction say the"),
        (["optimizer.sgd_momentum=0.5"], r'optimizer: sgd_momentum belongs to kind = "sgd", and that is "adamw"'),
        (["optimizer.kind=sgd"], r'optimizer: eps belongs to kind = "adamw", and that is "sgd"'),
        (["optimizer.lr_decay_style=constant", "optimizer.lr_decay_iters=3"], "lr_decay_iters belongs to a learning"),
        (["optimizer.lr_decay_style=WSD"], r'lr_wsd_decay_iters belongs to lr_decay_style = "WSD", which needs it'),
        (["optimizer.end_weight_decay=1"], r'end_weight_decay belongs to weight_decay_incr_style "linear" or "cosine"'),
        (["optimizer.weight_decay_incr_style=linear"], r'is "linear": give start_weight_decay, end'),
        (["training.rampup_batch_size=[3, 2, 100]"], r"batches that grow from 3 by 2 do not come to global_batch_size"),
        (["training.rampup_batch_size=[4, 2, 9]", "training.micro_batch_size=4"], r"rampup_batch_size \(6\) must be"),
        (["model.rope_scaling_factor=0.5"], r"model\.rope_scaling_factor: .*greater than or equal to 1, not 0\.5"),
        (["training.skip_iters=[0]"], r"training\.skip_iters\.0: .*greater than 0, not 0"),
    ],
)  # fmt: skip
def test_settings_that_contradict_each_other_are_refused(place, tmp_path, overrides, message):
    with pytest.raises(ConfigError, match=message):
        tiny_run.run_of(place, tmp_path / "out", *overrides)


def test_apex_is_refused_for_sgd(place, tmp_path):
    run = tiny_run.run_of(place, tmp_path / "out", "kernels.optimizer=apex")
    sgd = run.model_copy(update={"optimizer": OptimizerSection(lr=0.1, kind="sgd")})

    with pytest.raises(ConfigError, match=r'kernels\.optimizer = "apex" is an AdamW, and optimizer\.kind is "sgd"'):
        megacore.train(sgd)
