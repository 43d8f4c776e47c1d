"""The directory of a run: its files, going on in it, and reading the metrics back."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest

import megacore
from megacore.errors import DataError, OutputError
from megacore.parallel import ParallelContext
from megacore.runs import MetricsFile, RunDirectory, read_metrics
from megacore.training import read_run_config
from megacore.training.config import explicit_tables
from megacore.training.loggers.dispatch import open_run_log
from recorded_steps import StepRecorder, steps_on_rank, train_steps
from tiny_run import prepare, run_of


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return prepare(tmp_path_factory.mktemp("run directory"))


@pytest.fixture(scope="module")
def trained(place) -> tuple[Path, list]:
    directory = place / "runs" / "first"  # neither exists
    run = run_of(place, place / "first out", f"output.directory={directory}")
    recorder = StepRecorder(place / "first steps")
    megacore.train(run, on_step=recorder)
    return directory, recorder.steps()


RUNS = {
    "least": (),
    "mixture": ('data.prefix=[{prefix="a b", weight=0.7}, {prefix="ü", weight=1}]', "data.split=[0.9,0.1]"),
    "conversations": ("data.kind=instruction", "data.packing=true", "data.scalar_loss_mask=0.25"),
    "many": (
        "parallel.data_parallel=hybrid", "parallel.shard_size=2", "optimizer.lr=1.5e-05", "logging.loggers=['wandb']",
        "parallel.pipeline_parallel=2", "parallel.layers_per_stage=[3,2]", 'logging.name="a \\"quoted\\" name"',
    ),
}  # fmt: skip


@pytest.mark.parametrize("overrides", RUNS.values(), ids=RUNS)
def test_the_resolved_run_file_gives_the_same_run_with_every_default_in_it(place, tmp_path, overrides):
    run = run_of(place, tmp_path / "out", *overrides)

    RunDirectory(tmp_path / "directory").create(explicit_tables(run), {}, iteration=0)

    read = read_run_config(tmp_path / "directory" / "run.toml")
    assert read == run
    given = {(section, key) for section, table in explicit_tables(run).items() for key in table}
    missing = {
        f"{section}.{key}"
        for section, table in run
        for key in type(table).model_fields
        if getattr(table, key) is not None and (section, key) not in given
    }
    other_kind = {"optimizer.sgd_momentum"}
    conversations = {"data.packing", "data.variable_seq_lengths", "data.overlong", "data.scalar_loss_mask"}
    text = {"data.document_boundaries", "data.reset_position_ids", "data.reset_attention_mask", "data.eod_mask_loss"}
    missing -= {"evaluation.interval", "evaluation.iters", "evaluation.metrics"} if len(run.data.splits) == 1 else set()
    assert missing == other_kind | (text if run.data.kind == "instruction" else conversations)


def test_a_run_leaves_its_run_file_what_ran_and_a_line_for_each_step(place, trained):
    directory, steps = trained

    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    [start] = json.loads((directory / "versions.json").read_text())["starts"]

    assert sorted(file.name for file in directory.iterdir()) == ["metrics.jsonl", "run.toml", "versions.json"]
    assert read_run_config(directory / "run.toml").output.directory == directory
    assert lines[0].keys() == {"time", "start"} and lines[0]["start"] == 0
    assert [line["iteration"] for line in lines[1:]] == [1, 2, 3, 4, 5]
    for line, step in zip(lines[1:], steps, strict=True):
        assert line["loss"] == step.loss and line["lr"] == step.lr and line["grad_norm"] == step.grad_norm
        assert line["tokens"] == step.num_tokens == 96
        assert line["tokens_per_second"] == step.tokens_per_second == pytest.approx(96 / step.seconds)
        assert line["share_of_peak"] == step.flops_per_second / step.peak_flops_per_second
    assert start["iteration"] == 0 and start["megacore"] and start["torch"] and start["python"]
    assert start["plugins"].keys() >= {"megacore-llama"} and sum(start["devices"].values()) == 1


def test_only_the_first_rank_writes_and_what_runs_is_told_of_all_of_them(ranks, place, tmp_path):
    from megacore.training.resolved import parallel_sizes

    run = run_of(
        place, tmp_path / "out", "parallel.tensor_parallel=2", f"output.directory={tmp_path / 'run'}",
        "logging.measure_peak=false",
    )  # fmt: skip

    ranks.run(steps_on_rank, run, sizes=parallel_sizes(run.parallel))

    metrics = read_metrics(tmp_path / "run" / "metrics.jsonl")
    [start] = RunDirectory(tmp_path / "run").starts()
    assert list(metrics.steps.iterations) == [1, 2, 3, 4, 5]
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 6
    assert sum(start["devices"].values()) == 2 and start["layout"].startswith("tp 2")
    assert "share_of_peak" not in metrics.steps.values


def test_nothing_of_the_environment_is_in_the_directory(place, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "sesame-0123456789")
    megacore.train(run_of(place, tmp_path / "out", f"output.directory={tmp_path / 'run'}"))
    megacore.report(tmp_path / "run")

    files = [file for file in (tmp_path / "run").rglob("*") if file.is_file()]
    assert len(files) == 4
    assert not [file for file in files if b"sesame" in file.read_bytes()]


# --- going on


def test_a_directory_of_another_run_is_refused_with_the_difference(place, trained, tmp_path):
    directory, _ = trained
    before = (directory / "metrics.jsonl").read_bytes()
    run = run_of(place, place / "first out", f"output.directory={directory}", "optimizer.lr=0.02")
    (place / "first out").rename(tmp_path / "elsewhere")

    with pytest.raises(OutputError, match=r"holds another run, which differs in optimizer\.lr \(0\.01 there, 0\.02 "):
        megacore.train(run)

    assert (directory / "metrics.jsonl").read_bytes() == before


def test_the_same_run_may_start_again_and_one_with_other_settings_from_a_training_checkpoint(place, tmp_path):
    run = run_of(place, tmp_path / "out", f"output.directory={tmp_path / 'run'}")
    changed = run_of(place, tmp_path / "out", f"output.directory={tmp_path / 'run'}", "optimizer.lr=0.02")
    told_otherwise = run_of(place, tmp_path / "out", f"output.directory={tmp_path / 'run'}", "logging.log_interval=9")
    directory = RunDirectory(tmp_path / "run")
    directory.create(explicit_tables(run), {"torch": "2"}, iteration=0)

    directory.check(explicit_tables(run))
    directory.check(explicit_tables(told_otherwise))
    with pytest.raises(OutputError, match="another run"):
        directory.check(explicit_tables(changed))
    directory.check(explicit_tables(changed), resumed_run_id="a run of which nothing is known there")

    directory.create(explicit_tables(changed), {"torch": "3"}, iteration=7)
    assert read_run_config(tmp_path / "run" / "run.toml") == changed
    assert read_run_config(tmp_path / "run" / "run-until-7.toml") == run
    assert directory.starts() == [{"iteration": 0, "torch": "2"}, {"iteration": 7, "torch": "3"}]


def test_a_resumed_run_does_not_go_on_in_the_directory_of_another(place, trained, tmp_path):
    directory, _ = trained
    first = run_of(place, tmp_path / "out", f"output.directory={tmp_path / 'run'}", "checkpoints.interval=3")
    megacore.train(first)
    checkpoints = tmp_path / "run" / "checkpoints"
    longer = (f"output.directory={directory}", "training.train_iters=6", f"checkpoints.directory={checkpoints}")
    run = run_of(place, tmp_path / "out", *longer)

    with pytest.raises(OutputError, match="holds another run than the resumed one"):
        megacore.train(run, resume=True)

    own = run_of(place, tmp_path / "out", f"output.directory={tmp_path / 'run'}", "training.train_iters=6")
    assert [step.iteration for step in train_steps(own, resume=True)] == [6]
    starts = RunDirectory(tmp_path / "run").starts()
    started_from = [place / "checkpoint", checkpoints / "iteration-0000005"]
    assert [start["started_from"] for start in starts] == list(map(str, started_from))
    assert starts[0]["run_id"] == starts[1]["run_id"]


def test_a_file_in_the_place_of_the_directory_is_refused_before_training(place, tmp_path):
    (tmp_path / "run").write_text("a file")
    with pytest.raises(OutputError, match="exists, and is not a directory"):
        megacore.train(run_of(place, tmp_path / "out", f"output.directory={tmp_path / 'run'}"))


def test_two_runs_do_not_write_the_same_metrics(place, tmp_path):
    run = run_of(place, tmp_path / "out", f"output.directory={tmp_path / 'run'}")
    with (
        open_run_log(run, ParallelContext.single()),
        pytest.raises(OutputError, match="being written by another run"),
        open_run_log(run, ParallelContext.single()),
    ):
        pass
    with open_run_log(run, ParallelContext.single()):  # the first has ended
        pass


# --- the metrics file


def written(path: Path, *parts: tuple[int, list[int]]) -> None:
    """Starts, each after an iteration, and the iterations of the steps that follow, whose loss tells of both."""
    for number, (start, iterations) in enumerate(parts):
        file = MetricsFile(path)
        file.start(start)
        for iteration in iterations:
            file.step(iteration, {"loss": 100 * number + iteration})
        file.close()


def test_a_run_that_starts_again_supersedes_what_came_after_its_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    written(path, (0, [1, 2, 3, 4, 5, 6]), (3, [4, 5]))

    metrics = read_metrics(path)

    assert list(metrics.steps.iterations) == [1, 2, 3, 4, 5]  # 6 was not reached again
    assert list(metrics.steps.values["loss"]) == [1, 2, 3, 104, 105]
    assert metrics.starts == [0, 3]
    assert len(path.read_text().splitlines()) == 10  # nothing is lost


def test_evaluations_are_superseded_as_steps_are(tmp_path):
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path)
    for iteration in (2, 4):
        file.evaluation(iteration, "valid", {"loss": float(iteration)})
    file.evaluation(4, "test", {"loss": 8.0, "perplexity": 2.0})
    file.start(3)
    file.evaluation(4, "valid", {"loss": 40.0, "accuracy": 0.5})
    file.close()

    metrics = read_metrics(path)

    assert list(metrics.evaluations["valid"].iterations) == [2, 4]
    assert list(metrics.evaluations["valid"].values["loss"]) == [2.0, 40.0]
    assert [math.isnan(value) for value in metrics.evaluations["valid"].values["accuracy"]] == [True, False]
    assert len(metrics.evaluations["test"]) == 0


def test_of_two_lines_on_an_iteration_the_last_holds(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"iteration": 1, "loss": 3}\n{"iteration": 2, "loss": 2}\n{"iteration": 2, "loss": 1}\n')
    assert list(read_metrics(path).steps.values["loss"]) == [3, 1]


@pytest.mark.parametrize("rest", ['{"iteration": 2, "lo', "{", "x" * 200_000])
def test_half_a_line_after_a_kill_is_left_out_and_does_not_spoil_the_next(tmp_path, rest):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"iteration": 1, "loss": 3}\n' + rest)

    assert list(read_metrics(path).steps.iterations) == [1]
    written(path, (1, [2]))

    metrics = read_metrics(path)
    assert list(metrics.steps.values["loss"]) == [3, 2]
    assert metrics.num_damaged == 0


def test_a_file_of_nothing_but_half_a_line_begins_anew(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"itera')
    written(path, (0, [1]))
    assert path.read_text().startswith('{"time"')


def test_damaged_lines_are_counted_and_the_rest_is_read(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"iteration": 1, "loss": 3}\n\x00\x00\n[1]\n{"iteration": "2"}\n{"iteration": 3, "loss": 1}\n')
    metrics = read_metrics(path)
    assert list(metrics.steps.iterations) == [1, 3]
    assert metrics.num_damaged == 3


def test_numbers_that_are_not_finite_are_null_and_read_as_none(tmp_path):
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path)
    file.step(1, {"loss": 2.0, "grad_norm": math.inf})
    file.close()
    assert json.loads(path.read_text())["grad_norm"] is None  # JSON has no Infinity
    assert math.isnan(read_metrics(path).steps.values["grad_norm"][0])


def test_each_line_is_handed_over_at_once(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.step(1, {"loss": 2.0})
    assert list(read_metrics(tmp_path / "metrics.jsonl").steps.iterations) == [1]
    file.close()


def test_a_full_disk_ends_neither_the_training_nor_the_next_line(place, tmp_path, monkeypatch, caplog):
    """os.write takes half of the third step's line, as where the disk is full; then there is room again."""
    real, full = os.write, []

    def write(descriptor, data):
        if b'"iteration":3' in data and not full:
            full.append(True)
            return real(descriptor, data[:20])
        return real(descriptor, data)

    monkeypatch.setattr(os, "write", write)
    monkeypatch.setattr("megacore.training.loggers.dispatch._RETRY_INTERVAL", 0.0)
    steps = train_steps(run_of(place, tmp_path / "out", f"output.directory={tmp_path / 'run'}"))

    metrics = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert len(steps) == 5
    assert list(metrics.steps.iterations) == [1, 2, 4, 5]
    assert metrics.num_damaged == 1
    [warning] = caplog.messages
    assert "metrics.jsonl failed at iteration 3: OSError" in warning and "No space left" in warning


def test_a_file_of_metrics_that_is_not_there_is_named(tmp_path):
    with pytest.raises(DataError, match=r"metrics\.jsonl cannot be read: No such file"):
        read_metrics(tmp_path / "metrics.jsonl")
