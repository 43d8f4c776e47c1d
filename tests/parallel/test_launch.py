"""Running a function on ranks: what comes back, how errors arrive, and joining under torchrun."""

from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
import tempfile
import time
from datetime import timedelta
from pathlib import Path

import pytest
from click.testing import CliRunner

import megacore
from launched import (
    OfAPluginError,
    exiting_on,
    hang_on,
    killed_on,
    place_and_sum,
    programming_error_on,
    refuse_on,
    seconds_in_vain,
)
from megacore.checkpoint import Checkpoint
from megacore.cli import cli
from megacore.errors import DataError, WorkerError
from megacore.parallel import ParallelSizes, run_on_ranks
from tiny_llama import VOCAB, published_model, write_dataset
from warm_commands import Command, run, script_environment

BOUND = 45
"""Seconds within which everything here must be over; it takes a fifth of that on an idle machine."""


@pytest.fixture(autouse=True)
def bounded():
    started = time.monotonic()
    yield
    assert time.monotonic() - started < BOUND


# --- results


def test_one_rank_is_this_process(monkeypatch):
    monkeypatch.setattr("torch.distributed.launcher.api.launch_agent", None)  # not needed

    assert run_on_ranks(place_and_sum, 5, sizes=ParallelSizes()) == (0, 1, False, 5.0)


@pytest.mark.usefixtures("cold_ranks")
def test_what_rank_0_returns_comes_back_and_signals_loggers_and_temporary_files_are_as_before(
    monkeypatch, tmp_path, capfd
):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    logger = logging.getLogger("torch.distributed.elastic.agent.server.api")

    def surroundings() -> list:
        signals = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
        return [logger.level, *tmp_path.iterdir(), *(signal.getsignal(number) for number in signals)]

    before = surroundings()

    assert run_on_ranks(place_and_sum, 5, sizes=ParallelSizes(tp=2, sequence_parallel=True)) == (0, 2, True, 15.0)

    assert surroundings() == before
    assert capfd.readouterr() == ("", "")


# --- errors


@pytest.mark.parametrize("kind", [DataError, OfAPluginError], ids=["a kind of the core", "a kind of a plugin"])
def test_a_mistake_found_on_one_rank_arrives_in_the_kind_that_the_core_knows_though_others_wait_for_that_rank(
    kind, tmp_path, monkeypatch, capfd, request
):
    if kind is DataError:  # whose ranks then write where this process does
        request.getfixturevalue("cold_ranks")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    with pytest.raises(DataError) as raised:
        run_on_ranks(refuse_on, 1, kind, sizes=ParallelSizes(tp=2))

    assert type(raised.value) is DataError
    assert str(raised.value) == "line 7: not a number.\nWrite one"
    assert capfd.readouterr() == ("", "")
    assert list(tmp_path.iterdir()) == []


def test_a_programming_error_on_one_rank_arrives_with_its_traceback_and_not_that_of_its_echo_on_another():
    with pytest.raises(WorkerError) as raised:
        run_on_ranks(programming_error_on, 1, sizes=ParallelSizes(tp=2))

    assert str(raised.value).startswith("rank 1 failed:\nTraceback")
    assert str(raised.value).endswith("ZeroDivisionError: one over nothing")


@pytest.mark.usefixtures("cold_ranks")
def test_a_killed_rank_is_named_with_the_signal_and_not_the_one_that_waits_for_it(capfd):
    with pytest.raises(WorkerError, match=r"^rank 1 was killed by SIGKILL: was there too little memory\?$"):
        run_on_ranks(killed_on, 1, sizes=ParallelSizes(tp=2))

    assert capfd.readouterr() == ("", "")


def test_a_rank_that_hangs_ends_the_run_within_the_timeout():
    with pytest.raises(WorkerError) as raised:
        run_on_ranks(hang_on, 1, sizes=ParallelSizes(tp=2), timeout=timedelta(seconds=5))

    assert str(raised.value).startswith("rank 0 timed out waiting for rank 1, which hangs or is gone:\nTraceback")
    assert "Timed out waiting 5000ms" in str(raised.value)


def test_the_groups_of_the_axes_have_the_timeout_too(ranks):
    waited = ranks.run(seconds_in_vain, sizes=ParallelSizes(tp=2, dp_replicate=2))

    assert all(1 <= seconds < 4 for seconds in waited[::2])


@pytest.mark.parametrize(("number", "how"), [(signal.SIGTERM, "SIGTERM"), (None, "exit code 255")])
def test_a_rank_that_leaves_in_the_middle_of_its_work_is_named_with_how(number, how):
    with pytest.raises(WorkerError, match=rf"^rank 1 was ended by {how} in the middle of its work$"):
        run_on_ranks(exiting_on, 1, number, sizes=ParallelSizes(tp=2))


@pytest.mark.parametrize(
    "number",
    [pytest.param(signal.SIGTERM, id="SIGTERM", marks=pytest.mark.soak), pytest.param(signal.SIGINT, id="SIGINT")],
)
def test_a_signal_to_the_launching_process_ends_the_ranks_which_clean_up(tmp_path, number):
    process = Command("sleep", tmp_path / "rank", module="launched")
    while not all((tmp_path / f"rank-{rank}-begun").exists() for rank in (0, 1)):
        assert process.poll() is None
        time.sleep(0.05)

    process.send_signal(number)
    process.communicate(timeout=BOUND)

    expected = {signal.SIGTERM: (128 + signal.SIGTERM,), signal.SIGINT: (130, -signal.SIGINT)}
    assert process.returncode in expected[number]
    assert all((tmp_path / f"rank-{rank}-cleaned-up").exists() for rank in (0, 1))


# --- the command line


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A checkpoint, a dataset that fits it, and one that does not and says nothing of it."""
    place = tmp_path_factory.mktemp("launch")
    published_model(place / "published", num_hidden_layers=1)
    megacore.convert("llama", place / "published", place / "checkpoint")
    write_dataset(place / "data", num_tokens=33)
    write_dataset(place / "foreign", num_tokens=33, vocab_size=VOCAB + 1)
    return place


def run_file(place: Path, out: Path, data: str = "data") -> Path:
    file = out.with_suffix(".toml")
    file.write_text(
        f'model.checkpoint = "{place / "checkpoint"}"\noutput.checkpoint = "{out}"\n'
        f'data = {{ prefix = "{place / data}", seq_length = 8 }}\n'
        "optimizer.lr = 0.01\ntraining = { train_iters = 3, global_batch_size = 4 }\nparallel.tensor_parallel = 2\n"
    )
    return file


def torchrun(num_processes: int, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run ``megacore`` under torchrun; both it and its processes are warm."""
    # OMP_NUM_THREADS is what torchrun would otherwise set, with a warning.
    environment = script_environment() | {"OMP_NUM_THREADS": "1"}
    words = ("--standalone", "--nproc-per-node", str(num_processes), "-m", "megacore", *arguments)
    return run(*words, module="torch.distributed.run", environment=environment, timeout=BOUND)


def test_the_command_tells_a_mistake_that_a_rank_found_in_one_line_and_exits_with_2(place, tmp_path):
    completed = run("train", run_file(place, tmp_path / "out", "foreign"), timeout=BOUND)

    *notes, error = completed.stderr.splitlines()
    assert completed.returncode == 2
    assert completed.stdout == ""
    assert [note.split(":")[1] for note in notes] == [" 2 processes", " kernels", " tp 2 cuts unevenly"]
    assert re.fullmatch(r"Error: .*/foreign has token id 99, and the checkpoint's vocabulary is 0 to 98: .*", error)
    assert [path.name for path in tmp_path.iterdir()] == ["out.toml"]


def test_under_torchrun_the_command_joins_instead_of_starting_more_and_speaks_once(place, tmp_path):
    completed = torchrun(2, "train", run_file(place, tmp_path / "out"))

    assert completed.returncode == 0, completed.stderr
    lines = completed.stdout.splitlines()
    assert [line.split("|")[0].split() for line in lines[:-1]] == [["iteration", f"{i}/3"] for i in (1, 2, 3)]
    assert lines[-1] == f"Saved {tmp_path / 'out'}."
    assert completed.stderr.count("Note: ") == completed.stderr.count("Note: 2 processes: tp 2.") + 3 == 4
    assert Checkpoint(tmp_path / "out").manifest.layout.tp == 2


def test_verify_under_torchrun_joins_too_and_gives_its_verdict_once(place):
    verify = ("verify", place / "checkpoint", "--reference", place / "published", "--tp", "2")

    completed = torchrun(2, *verify, "--random-ids", "--iters", "2", "--seq-length", "8")

    assert completed.returncode == 0, completed.stderr
    assert completed.stdout.count("Iteration ") == 2
    assert completed.stdout.count("Verified in float32, tp 2") == 1


def test_a_world_of_another_size_than_the_run_file_asks_for_is_refused_once(place, tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text(
        'import os, time\nif os.environ.get("LOCAL_RANK") == "0":\n    time.sleep(2)  # so that the others fail first\n'
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)

    completed = torchrun(3, "train", run_file(place, tmp_path / "out"))

    assert completed.returncode == 1  # torchrun's own
    assert re.findall("^Error.*", completed.stderr, re.MULTILINE) == [
        "Error: 3 processes cannot be laid out as tp 2 × pp 1, which takes a multiple of 2. Start 2, 4, 6 …, or choose "
        "tp and pp so that tp × pp is 1 or 3; the rest is data-parallel"
    ]


@pytest.mark.parametrize(
    "place_of_process",
    [{"RANK": "5", "LOCAL_RANK": "1"}, {"SLURM_PROCID": "5", "SLURM_LOCALID": "1"}],
    ids=["torchrun", "srun"],
)
def test_a_mistake_that_the_first_process_does_not_find_is_told_by_another(place_of_process, tmp_path, monkeypatch):
    monkeypatch.setattr("megacore.cli._ERROR_DELAY", 0.0)

    completed = CliRunner().invoke(cli, ["inspect", str(tmp_path / "nothing")], env=place_of_process)

    assert completed.exit_code == 2
    assert completed.stderr.startswith("Error on rank 5: ")
    assert str(tmp_path / "nothing") in completed.stderr
