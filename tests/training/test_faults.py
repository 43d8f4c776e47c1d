"""What goes wrong while training: signals, dead and hanging ranks, steps that blow up, full disks."""

from __future__ import annotations

import errno
import math
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

import megacore
import tiny_run
from faults_on_rank import (
    fail_on_rank_0_when_a_checkpoint_is_completed,
    fail_while_the_second_is_saved,
    train_with_little_room,
    train_without_room_for,
)
from megacore.checkpoint import Checkpoint, safetensors_file
from megacore.errors import ConfigError, DataError, DiskFullError, TrainingError, WorkerError
from megacore.training import Engine, RunConfig
from megacore.training.resolved import parallel_sizes
from recorded_steps import train_steps
from tiny_run import weights
from warm_commands import Command

BOUND = 120
"""Seconds within which a command must be over; it takes a tenth of that on an idle machine."""

TWO = ("parallel.nproc_per_node=2",)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tiny_run.prepare(tmp_path_factory.mktemp("faults"), num_hidden_layers=1)


def run_of(place: Path, out: Path, *overrides: str) -> RunConfig:
    return tiny_run.run_of(place, out, *overrides)


def command(place: Path, out: Path, *overrides: str, options: tuple[str, ...] = ()) -> list[str | Path]:
    """The words after ``megacore`` that train, with a run file beside ``out``."""
    run_of(place, out)
    settings = [word for override in overrides for word in ("--set", override)]
    return ["train", out.with_suffix(".toml"), *options, *settings]


PYTHON = (sys.executable, "-m", "megacore")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run")


def started(arguments: list[str | Path]) -> Command:
    return Command(*arguments, start_new_session=True)


def python_started(*words: str | Path) -> subprocess.Popen[str]:
    """Start Python itself, which takes seconds to import torch."""
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def steps_in(directory: Path) -> list[int]:
    return sorted(int(path.name[10:]) for path in directory.glob("iteration-*"))


def wait_for_line(process: Command | subprocess.Popen[str], beginning: str) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(beginning):
            return
    assert process.stderr is not None
    raise AssertionError(f"it ended without {beginning}: {process.stderr.read()}")


# --- signals


@pytest.mark.parametrize(
    ("number", "layout"),
    [
        (signal.SIGTERM, ()),
        (signal.SIGINT, TWO),
        pytest.param(signal.SIGINT, (), marks=pytest.mark.soak),
        pytest.param(signal.SIGTERM, TWO, marks=pytest.mark.soak),
    ],
    ids=["SIGTERM", "SIGINT to two ranks", "SIGINT", "SIGTERM to two ranks"],
)
def test_a_signal_saves_a_checkpoint_and_exits_0_and_the_run_goes_on_from_there(place, tmp_path, number, layout):
    out = tmp_path / "out"
    process = started(command(place, out, *layout, "training.train_iters=100000"))
    wait_for_line(process, "iteration     2/")

    os.killpg(process.pid, number)  # as a terminal does: to the ranks too
    if layout:
        time.sleep(0.02)
        process.send_signal(number)  # as one does that wraps the command, and passes on what the terminal has sent
    printed, errors = process.communicate(timeout=BOUND)

    assert process.returncode == 0, errors
    name = "SIGTERM" if layout else number.name  # which is what the ranks get
    [stopped] = steps_in(tmp_path / "out-checkpoints")
    assert printed.splitlines()[-1] == (f"Stopped by {name} after iteration {stopped}; resume with --resume.")
    assert f"Note: {name}: stopping once the last step is saved" in errors
    assert "Traceback" not in errors
    assert not out.exists()
    Checkpoint(tmp_path / "out-checkpoints" / "latest").check()
    [step] = train_steps(run_of(place, out, f"training.train_iters={stopped + 1}"), resume=True)
    assert step.iteration == stopped + 1


def test_a_signal_that_ends_who_reads_the_output_too_saves_a_checkpoint_all_the_same(place, tmp_path):
    process = Command(*command(place, tmp_path / "out", "training.train_iters=100000"), stderr=subprocess.STDOUT)
    wait_for_line(process, "iteration     2/")

    assert process.stdout is not None
    process.stdout.close()  # as Ctrl-C ends `tee` in `megacore train run.toml 2>&1 | tee log`
    process.send_signal(signal.SIGINT)

    assert process.wait(timeout=BOUND) == 0
    assert len(steps_in(tmp_path / "out-checkpoints")) == 1


def test_a_second_signal_ends_a_run_at_once_whose_step_does_not_end(place, tmp_path):
    process = started(command(place, tmp_path / "out", *TWO, "training.train_iters=100000"))
    wait_for_line(process, "iteration     1/")
    os.kill(ranks_of(process)[-1], signal.SIGSTOP)
    process.send_signal(signal.SIGINT)
    time.sleep(1.5)
    assert process.poll() is None

    sent_at = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=BOUND)

    assert process.returncode == 130
    assert time.monotonic() - sent_at < 10
    assert "Traceback" not in errors


def ranks_of(process: Command) -> list[int]:
    """The process ids of the ranks that a command has started."""
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True)
    return [int(pid) for pid in children.stdout.split()]


def test_signals_that_come_at_once_are_one_request_and_a_later_one_ends_the_process(tmp_path):
    script = """
import sys, time
from megacore.parallel import stop_requests
with stop_requests() as request:
    print("ready", flush=True)
    while True:
        time.sleep(0.05)
"""
    process = Command(script, module="-c", start_new_session=True)
    wait_for_line(process, "ready")
    process.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)  # a batch system signals the launcher, which passes it on, and every process
    time.sleep(1.3)
    assert process.poll() is None

    process.send_signal(signal.SIGTERM)

    assert process.wait(timeout=5) == 128 + signal.SIGTERM
    assert process.stderr is not None
    assert process.stderr.read() == "Note: SIGTERM: stopping once the last step is saved; again ends at once.\n"


@pytest.mark.parametrize("is_within", [True, False], ids=["within it", "after it"])
def test_a_signal_in_the_last_step_does_not_keep_a_run_from_its_result(place, tmp_path, monkeypatch, is_within):
    accumulate = Engine._accumulate

    def signalled(engine, batch, wants_stop):
        if int(batch.sample_ids[0]) == 4 * 8:
            signal.raise_signal(signal.SIGTERM)
        return accumulate(engine, batch, wants_stop)

    def at_the_last(step):
        if step.iteration == 5:
            signal.raise_signal(signal.SIGTERM)

    if is_within:
        monkeypatch.setattr(Engine, "_accumulate", signalled)

    steps = train_steps(run_of(place, tmp_path / "out"), on_step=None if is_within else at_the_last)

    assert (steps[-1].iteration, steps[-1].stopped_by) == (5, None)
    Checkpoint(tmp_path / "out").check()


@pytest.mark.parametrize("delay", [0.5, 2.0])
def test_an_interrupt_while_the_program_starts_ends_it_without_a_traceback(place, tmp_path, delay):
    process = python_started(*PYTHON, *command(place, tmp_path / "out", "training.train_iters=100000"))
    time.sleep(delay)

    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=BOUND)

    assert process.returncode in (130, 0, -signal.SIGINT)  # before Python has begun, by itself
    assert "Traceback" not in errors or delay < 1
    assert not (tmp_path / "out").exists()


# --- ranks that die


def test_torchruns_elastic_restart_goes_on_from_the_last_checkpoint(place, tmp_path):
    overrides = ("model.dtype=fp64", "training.train_iters=60", "checkpoints.interval=5")
    own = command(place, tmp_path / "out", *overrides, "parallel.data_parallel=sharded")
    process = python_started(
        *(*TORCHRUN, "--standalone", "--nproc-per-node", "2"),
        *("--max-restarts", "1", "--monitor-interval", "0.2", "-m", "megacore", *own),
    )
    wait_for_line(process, "iteration    20/")
    found = subprocess.run(["pgrep", "-f", f"train {tmp_path}/out.toml"], capture_output=True, text=True, check=True)

    os.kill(max(int(pid) for pid in found.stdout.split() if is_rank(int(pid))), signal.SIGKILL)
    printed, errors = process.communicate(timeout=BOUND)

    assert process.returncode == 0, errors
    [resumed_from] = map(int, re.findall(r"resuming after iteration (\d+)", errors))
    assert resumed_from >= 15
    losses = dict(re.findall(r"^iteration +(\d+)/60 \| loss ([\d.]+)", printed, re.MULTILINE))
    expected = train_steps(run_of(place, tmp_path / "whole", *overrides))
    assert [f"{step.loss:.6f}" for step in expected[resumed_from:]] == list(losses.values())[-60 + resumed_from :]


@pytest.mark.soak
def test_torchruns_elastic_restart_goes_on_on_two_nodes_of_which_one_has_failed(place, tmp_path):
    overrides = ("model.dtype=fp64", "training.train_iters=200", "checkpoints.interval=5")
    sharded = (*overrides, "parallel.data_parallel=sharded")
    own = command(place, tmp_path / "out", *sharded, "parallel.timeout=60")
    with socket.create_server(("localhost", 0)) as free:
        endpoint = f"localhost:{free.getsockname()[1]}"
    torchrun = [*TORCHRUN, "--nnodes", "2", "--nproc-per-node", "1", "--max-restarts", "1"]
    meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint, "--local-addr", "localhost"]
    nodes = [python_started(*torchrun, *meeting, "-m", "megacore", *own) for _ in range(2)]
    ranks: dict[int, int] = {}
    while len(ranks) < 2 or not any(step >= 20 for step in steps_in(tmp_path / "out-checkpoints")):
        assert [node.poll() for node in nodes] == [None, None]
        time.sleep(0.05)
        found = subprocess.run(["pgrep", "-f", f"train {tmp_path}/out.toml"], capture_output=True, text=True)
        ranks = {rank_of(int(pid)): int(pid) for pid in found.stdout.split() if is_rank(int(pid))}

    os.kill(ranks[1], signal.SIGKILL)
    told = [node.communicate(timeout=BOUND) for node in nodes]

    assert [node.returncode for node in nodes] == [0, 0], told
    [resumed_from] = [int(found) for _, errors in told for found in re.findall(r"on after iteration (\d+)", errors)]
    assert 20 <= resumed_from < 200
    megacore.train(run_of(place, tmp_path / "whole", *sharded, "parallel.nproc_per_node=2"))
    expected = weights(tmp_path / "whole")
    assert all(torch.equal(matrix, expected[name]) for name, matrix in weights(tmp_path / "out").items())


@pytest.mark.soak
def test_a_rank_of_torchrun_that_hangs_is_named_by_the_others(place, tmp_path):
    settings = ("training.global_batch_size=6", "training.train_iters=100000", "parallel.timeout=8")
    own = command(place, tmp_path / "out", *settings)
    process = python_started(*TORCHRUN, "--standalone", "--nproc-per-node", "3", "-m", "megacore", *own)
    wait_for_line(process, "iteration     2/")
    found = subprocess.run(["pgrep", "-f", f"train {tmp_path}/out.toml"], capture_output=True, text=True, check=True)
    [hanging] = [int(pid) for pid in found.stdout.split() if b"\0RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes()]

    os.kill(hanging, signal.SIGSTOP)
    _, errors = process.communicate(timeout=BOUND)

    for rank in (0, 2):
        assert f"Error on rank {rank}: rank {rank} timed out waiting for rank 1, which hangs or is gone:" in errors


def is_rank(pid: int) -> bool:
    return b"RANK=" in Path(f"/proc/{pid}/environ").read_bytes()


def rank_of(pid: int) -> int:
    [rank] = re.findall(rb"\0RANK=(\d+)\0", Path(f"/proc/{pid}/environ").read_bytes())
    return int(rank)


@pytest.mark.soak
@pytest.mark.parametrize("layout", ["dp 2, sharded", "tp 2"])
def test_a_run_whose_ranks_are_killed_at_random_ends_with_the_weights_of_one_that_was_not(place, tmp_path, layout):
    """15 kills at each of two layouts, each at a random moment, with a checkpoint every 3 steps.

    Every fifth is at the start. The others are so many steps later, so that a busy machine gets as far as an idle one.
    """
    how = {
        "dp 2, sharded": (*TWO, "parallel.data_parallel=sharded"),
        "tp 2": ("parallel.tensor_parallel=2",),
    }[layout]
    overrides = (*how, "checkpoints.interval=3", "training.train_iters=600", "checkpoints.keep_last=2")
    whole = started(command(place, tmp_path / "whole", *overrides))
    assert whole.communicate() and whole.returncode == 0
    chance = random.Random(layout)
    out, num_killed, resumed_from = tmp_path / "out", 0, []

    while num_killed < 15:
        process = started(command(place, out, *overrides, options=("--resume", "auto")))
        if num_killed % 5 == 4:
            while len(ranks_of(process)) < 2:
                assert process.poll() is None
                time.sleep(0.05)
            time.sleep(chance.uniform(0, 5))
        else:
            for _ in range(chance.randint(1, 9)):
                wait_for_line(process, "iteration ")
            time.sleep(chance.uniform(0, 0.2))
        os.kill(chance.choice(ranks_of(process)), signal.SIGKILL)
        _, errors = process.communicate(timeout=BOUND)
        assert process.returncode == 1, errors
        assert re.search(r"rank \d was killed by SIGKILL", errors)
        num_killed += 1
        resumed_from += re.findall(r"resuming after iteration (\d+)", errors)
        if found := steps_in(tmp_path / "out-checkpoints"):
            Checkpoint(tmp_path / "out-checkpoints" / f"iteration-{found[-1]:07d}").check()

    process = started(command(place, out, *overrides, options=("--resume", "auto")))
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert len(set(resumed_from)) > 5
    expected = weights(tmp_path / "whole")
    assert all(torch.equal(matrix, expected[name]) for name, matrix in weights(out).items())


# --- what fails beside the training


@pytest.mark.parametrize("layout", [(), pytest.param(TWO, marks=pytest.mark.soak)], ids=["one process", "two ranks"])
def test_a_checkpoint_that_is_being_written_when_a_run_fails_is_completed(place, tmp_path, monkeypatch, layout):
    monkeypatch.setattr(safetensors_file, "_write_all", safetensors_file._write_all)  # is put back at the end
    run = run_of(place, tmp_path / "out", *layout, "checkpoints.interval=2")

    with pytest.raises(DataError, match="after iteration 3"):
        megacore.train(run, on_step=fail_while_the_second_is_saved)

    assert steps_in(tmp_path / "out-checkpoints") == [2]
    Checkpoint(tmp_path / "out-checkpoints" / "latest").check()


def test_a_failure_that_all_ranks_are_told_of_is_told_as_that_of_the_rank_that_failed(place, tmp_path):
    run = run_of(place, tmp_path / "out", *TWO, "checkpoints.interval=2", "checkpoints.asynchronous=false")

    with pytest.raises(WorkerError) as raised:
        megacore.train(run, on_step=fail_on_rank_0_when_a_checkpoint_is_completed)

    assert str(raised.value).startswith("rank 0 failed:\nTraceback")
    assert "in fail\n" in str(raised.value)  # its own traceback
    assert str(raised.value).endswith("ZeroDivisionError: one over nothing")


# --- steps that blow up


def blowing_up(monkeypatch, iterations: set[int], factor: float = math.nan) -> None:
    """Let the gradient of one parameter be multiplied by ``factor`` at these iterations."""
    accumulate, counted = Engine._accumulate, [0]

    def accumulate_too_much(self, batch, wants_stop):
        counted[0] = int(batch.sample_ids[0]) // self.run.training.global_batch_size + 1
        loss, norm, is_to_stop = accumulate(self, batch, wants_stop)
        return (loss, norm * factor, is_to_stop) if counted[0] in iterations else (loss, norm, is_to_stop)

    monkeypatch.setattr(Engine, "_accumulate", accumulate_too_much)


def test_a_step_that_is_not_finite_is_skipped_and_counted_and_its_data_are_consumed(place, tmp_path, monkeypatch):
    blowing_up(monkeypatch, {3})
    steps = train_steps(run_of(place, tmp_path / "out"))

    assert [step.num_skipped for step in steps] == [0, 0, 1, 1, 1]
    blowing_up(monkeypatch, set())
    monkeypatch.undo()
    whole = train_steps(run_of(place, tmp_path / "whole"))
    assert [step.loss for step in steps[:3]] == [step.loss for step in whole[:3]]
    assert steps[3].loss != whole[3].loss


def test_a_spike_is_skipped_and_leaves_weights_and_optimizer_as_they_were(place, tmp_path, monkeypatch):
    blowing_up(monkeypatch, {5}, factor=30)
    settings = ("faults.spike_factor=5", "faults.spike_window=4", "checkpoints.interval=1", "checkpoints.keep_last=9")

    steps = train_steps(run_of(place, tmp_path / "out", *settings, "training.train_iters=6"))

    assert [step.num_skipped for step in steps] == [0, 0, 0, 0, 1, 1]
    before, after = (Checkpoint(tmp_path / "out-checkpoints" / f"iteration-000000{i}") for i in (4, 5))
    assert before.manifest.training is not None and after.manifest.training is not None
    for name, tensor in before.manifest.training.tensors.items():
        for chunk in tensor.chunks:
            assert torch.equal(before.chunk(name, chunk), after.chunk(name, chunk)), name
    assert after.manifest.training.num_samples == 5 * 8


def test_the_median_and_the_count_go_on_when_a_run_is_resumed(place, tmp_path, monkeypatch):
    blowing_up(monkeypatch, {2, 4}, factor=1e6)
    settings = ("faults.spike_factor=5", "faults.spike_window=2", "checkpoints.interval=3", "training.train_iters=6")
    steps = train_steps(run_of(place, tmp_path / "out", *settings))

    load = tmp_path / "out-checkpoints" / "iteration-0000003"
    resumed = train_steps(run_of(place, tmp_path / "resumed", *settings), load=load)

    assert [step.num_skipped for step in steps] == [0, 1, 1, 2, 2, 2]
    assert [(step.loss, step.num_skipped) for step in resumed] == [(step.loss, step.num_skipped) for step in steps[3:]]


def test_too_many_skipped_in_a_row_end_the_run_with_a_checkpoint_of_the_weights_before(place, tmp_path, monkeypatch):
    blowing_up(monkeypatch, {1, 3, 4})
    run = run_of(place, tmp_path / "out", "faults.max_skipped_in_a_row=2")

    with pytest.raises(TrainingError, match=r"iteration 4: .* so 2 steps in a row were skipped.* in (.*)") as raised:
        megacore.train(run)

    kept = Path(str(raised.value).rpartition(" in ")[2])
    assert kept == tmp_path / "out-checkpoints" / "iteration-0000004"
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    before = tmp_path / "before"
    monkeypatch.setattr(
        "megacore.training.checkpointing.manager.RunCheckpoints.is_due", lambda self, iteration: iteration == 2
    )
    blowing_up(monkeypatch, {1})
    megacore.train(run_of(place, before, "training.train_iters=5", "checkpoints.directory=" + str(tmp_path / "two")))
    expected = weights(tmp_path / "two" / "iteration-0000002")
    assert all(torch.equal(matrix, expected[name]) for name, matrix in weights(kept).items())
    assert [step.iteration for step in train_steps(run, resume=True)] == [5]


def test_too_many_skipped_in_a_row_are_told_of_where_no_checkpoint_can_be_saved(place, tmp_path, monkeypatch):
    def save(self, progress, *, waits):
        raise DiskFullError("there is no room")

    blowing_up(monkeypatch, {1, 2})
    monkeypatch.setattr("megacore.training.checkpointing.manager.RunCheckpoints.save", save)

    with pytest.raises(TrainingError, match=r"so 2 steps in a row .* could not be saved: there is no room"):
        megacore.train(run_of(place, tmp_path / "out", "faults.max_skipped_in_a_row=2"))


def test_a_run_whose_last_steps_were_skipped_is_no_result_when_it_goes_on(place, tmp_path, monkeypatch):
    blowing_up(monkeypatch, {4, 5})
    run = run_of(place, tmp_path / "out", "faults.max_skipped_in_a_row=2")
    with pytest.raises(TrainingError, match="iteration 5: "):
        megacore.train(run)
    monkeypatch.undo()

    with pytest.raises(ConfigError, match="is after the last iteration, and the 2 steps up to it were skipped"):
        megacore.train(run, resume=True)

    longer = run_of(place, tmp_path / "out", "faults.max_skipped_in_a_row=2", "training.train_iters=6")
    assert [step.iteration for step in train_steps(longer, resume=True)] == [6]


def test_who_resumes_after_too_many_skipped_steps_gives_the_run_as_many_again(place, tmp_path, monkeypatch):
    blowing_up(monkeypatch, {3, 4, 5, 6, 8})
    run = run_of(place, tmp_path / "out", "faults.max_skipped_in_a_row=2", "training.train_iters=8")
    with pytest.raises(TrainingError, match="iteration 4: "):
        megacore.train(run)

    more = run_of(place, tmp_path / "out", "faults.max_skipped_in_a_row=3", "training.train_iters=8")

    assert [step.iteration for step in train_steps(more, resume=True)] == [5, 6, 7, 8]


# --- disks that are full


@pytest.mark.parametrize("layout", [(), TWO], ids=["one process", "two ranks"])
def test_a_disk_that_is_full_keeps_the_old_checkpoint_and_training_goes_on(ranks, place, tmp_path, layout):
    run = run_of(place, tmp_path / "out", *layout, "checkpoints.interval=2", "training.train_iters=7")
    started_from = tmp_path / "out-checkpoints"

    if layout:
        results = ranks.run(train_with_little_room, run, 2, sizes=parallel_sizes(run.parallel))
    else:
        results = [train_with_little_room(None, run, 2)]

    told, error = results[0]
    assert "NO CHECKPOINT was saved after iteration 4, the 1st that failed: there is no room for " in told[0]
    assert all("after iteration 6, the 2nd that failed" in note for note in told[1:])  # if it is told before the end
    assert error.startswith(f"{tmp_path / 'out'} is saved, but not the last training checkpoint, from which ")
    assert "there is no room for" in error
    assert steps_in(started_from) == [2]
    Checkpoint(started_from / "latest").check()
    assert [path.name for path in started_from.iterdir() if "incomplete" in path.name] == []
    Checkpoint(tmp_path / "out").check()


@pytest.mark.parametrize(
    "settings",
    [
        (),
        ("checkpoints.interval=1000",),
        ("checkpoints.interval=1000", *TWO, "parallel.data_parallel=sharded"),
        ("checkpoints.interval=1000", "parallel.tensor_parallel=2"),
    ],
    ids=["without an interval", "with one", "dp 2, sharded", "tp 2"],
)
def test_a_run_whose_result_cannot_be_written_saves_its_last_checkpoint(ranks, place, tmp_path, settings):
    run = run_of(place, tmp_path / "out", *settings)

    if len(settings) > 1:
        errors = ranks.run(train_without_room_for, run, ".out.incomplete", sizes=parallel_sizes(run.parallel))
    else:
        errors = [train_without_room_for(None, run, ".out.incomplete")]

    kept = tmp_path / "out-checkpoints" / "iteration-0000005"
    assert set(errors) == {
        f"there is no room for {tmp_path / 'out'} (No space left on device): what was begun of it was removed. All of "
        f"the training is in {kept}: once this is fixed, --resume makes the result of it"
    }
    assert not (tmp_path / "out").exists() and not (tmp_path / ".out.incomplete").exists()
    Checkpoint(kept).check()
    assert megacore.train(run_of(place, tmp_path / "out"), resume=True).last_step is None
    trained, expected = weights(tmp_path / "out"), weights(kept)
    assert all(torch.equal(matrix, expected[name]) for name, matrix in trained.items())


def test_a_run_that_can_save_nothing_at_its_end_names_the_checkpoint_to_go_on_from(place, tmp_path):
    run = run_of(place, tmp_path / "out", "checkpoints.interval=2")
    megacore.train(run_of(place, tmp_path / "out", "checkpoints.interval=2", "training.exit_interval=2"))

    full = OSError(errno.ENOSPC, "No space left on device")
    with (
        patch.object(safetensors_file, "_write_all", side_effect=full),
        pytest.raises(
            DiskFullError, match=r"no room for .*/out \(.* Nor could the last .*: there is no room"
        ) as raised,
    ):
        megacore.train(run, resume=True)

    left = tmp_path / "out-checkpoints" / "iteration-0000002"
    assert str(raised.value).endswith(f". --resume resumes from {left}")
    assert steps_in(tmp_path / "out-checkpoints") == [2]
