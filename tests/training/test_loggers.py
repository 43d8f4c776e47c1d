"""Loggers: each read back with its own library; those of other packages; and failures, which never end a run."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import megacore
from megacore.checkpoint import Checkpoint
from megacore.errors import ConfigError
from megacore.parallel import ParallelContext
from megacore.training import Evaluation, Step
from megacore.training.loggers.dispatch import Guarded, open_run_log
from recorded_steps import train_steps
from tiny_run import prepare, run_of
from warm_commands import run as run_command

POSTCARD = '''
import json, os, threading
from pathlib import Path

answered = threading.Event()

class PostcardLogger:
    """Writes what it is told to a file; fails as the environment says."""

    def __init__(self, run):
        if "FAIL_AT_START" in os.environ:
            raise ConnectionError("no route, key " + os.environ["POSTCARD_API_KEY"])
        self.file = run.directory / "postcards"
        self.run = run
        self.told = [[run.project, run.name, run.iteration, run.settings["optimizer"]["eps"]]]

    def log(self, values, *, iteration):
        if iteration == int(os.environ.get("HANG_AT", 0)):
            answered.wait()
        if iteration == int(os.environ.get("FAIL_AT", 0)):
            raise ConnectionError("no route, key " + os.environ["POSTCARD_API_KEY"] + "\\nmore")
        self.told.append([iteration, dict(values)])

    def close(self):
        if "HANG_AT_CLOSE" in os.environ:
            answered.wait()
        self.file.write_text(json.dumps(self.told))
'''


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return prepare(tmp_path_factory.mktemp("loggers"))


def logged_run(place: Path, out: Path, *loggers: str, overrides: tuple[str, ...] = ()):
    listed = json.dumps(loggers)
    return run_of(place, out, f"output.directory={out.parent / 'run'}", f"logging.loggers={listed}", *overrides)


def a_step(iteration: int, loss: float) -> Step:
    return Step(iteration, 9, loss, 0.1, 2.0, 300.0, num_tokens=96, seconds=0.5, flops_per_second=1e9)


# --- those that come with megacore


def scalars(directory: Path, name: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(directory / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_tensorboard_reads_the_losses_of_the_run(place, tmp_path):
    steps = train_steps(logged_run(place, tmp_path / "out", "tensorboard"))

    assert scalars(tmp_path / "run", "train/loss") == [(s.iteration, pytest.approx(s.loss)) for s in steps]
    assert scalars(tmp_path / "run", "train/lr")[0] == (1, pytest.approx(0.01))


def test_tensorboard_drops_what_a_run_that_starts_again_supersedes_and_has_evaluations(place, tmp_path):
    run = logged_run(place, tmp_path / "out", "tensorboard")
    with open_run_log(run, ParallelContext.single()) as log:
        for iteration in (1, 2, 3, 4):
            log.step(a_step(iteration, loss=iteration))
    with open_run_log(run, ParallelContext.single(), iteration=2) as log:
        log.step(a_step(3, loss=30))
        log.evaluation(Evaluation(3, "valid", {"loss": 5.0}))

    assert scalars(tmp_path / "run", "train/loss") == [(1, 1.0), (2, 2.0), (3, 30.0)]
    assert scalars(tmp_path / "run", "valid/loss") == [(3, 5.0)]


def test_tensorboard_needs_the_run_to_have_a_directory(place, tmp_path):
    with pytest.raises(
        ConfigError, match=r"tensorboard writes into the run's directory: name one in output\.directory"
    ):
        megacore.train(run_of(place, tmp_path / "out", 'logging.loggers=["tensorboard"]'))


def wandb_records(directory: Path) -> list[Any]:
    """What wandb keeps offline: records of protobuf in blocks of 32 KiB, as LevelDB's log has them."""
    from wandb.proto.wandb_internal_pb2 import Record

    records = []
    for file in sorted(directory.glob("wandb/offline-run-*/*.wandb")):
        content, place, whole = file.read_bytes(), 7, b""
        while place < len(content):
            left_of_block = 32768 - place % 32768
            if left_of_block < 7:
                place += left_of_block
                continue
            length, kind = struct.unpack_from("<HB", content, place + 4)
            whole += content[place + 7 : place + 7 + length]
            place += 7 + length
            if kind in (1, 4):  # whole, or the last part
                records.append(Record.FromString(whole))
                whole = b""
    return records


def test_wandb_has_the_losses_and_the_settings_and_goes_on_under_the_same_name(place, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_API_KEY", "5e5a3e" * 7)
    run = logged_run(
        place,
        tmp_path / "out",
        "wandb",
        overrides=("logging.project=cranes", "logging.name=tall", "optimizer.eps=1e-7"),
    )
    with open_run_log(run, ParallelContext.single()) as log:
        log.step(a_step(1, loss=3.5))
        log.step(a_step(2, loss=2.5))
    time.sleep(1.1)  # wandb names what it keeps by the second in which it starts
    with open_run_log(run, ParallelContext.single(), iteration=1) as log:
        log.step(a_step(2, loss=1.5))  # wandb's own step would not fall back to 2
        log.evaluation(Evaluation(2, "valid", {"loss": 9.0}))

    records = wandb_records(tmp_path / "run")
    rows = [
        {(item.key or ".".join(item.nested_key)): json.loads(item.value_json) for item in record.history.item}
        for record in records
        if record.HasField("history")
    ]
    assert [(row["iteration"], row["train/loss"]) for row in rows if "train/loss" in row] == [
        (1, 3.5),
        (2, 2.5),
        (2, 1.5),
    ]
    assert [row["iteration"] for row in rows if row.get("valid/loss") == 9.0] == [2]
    runs = [record.run for record in records if record.HasField("run")]
    assert {(one.project, one.display_name) for one in runs} == {("cranes", "tall")}
    assert len({one.run_id for one in runs}) == 1
    config = {item.key: json.loads(item.value_json) for item in runs[0].config.update}
    assert config["optimizer"]["eps"] == 1e-7
    holding_the_key = [f for f in (tmp_path / "run").rglob("*") if f.is_file() and b"5e5a3e5e5a3e" in f.read_bytes()]
    assert holding_the_key == []


def test_trackio_has_the_losses_and_says_nothing_on_standard_output(place, tmp_path, monkeypatch, capsys):
    from trackio.sqlite_storage import SQLiteStorage

    for module in ("trackio", "trackio.utils", "trackio.sqlite_storage"):
        monkeypatch.setattr(f"{module}.TRACKIO_DIR", tmp_path / "trackio")
    run = logged_run(place, tmp_path / "out", "trackio", overrides=("logging.project=cranes",))
    with open_run_log(run, ParallelContext.single()) as log:
        log.step(a_step(1, loss=3.5))
    with open_run_log(run, ParallelContext.single(), iteration=1) as log:
        log.step(a_step(2, loss=2.5))

    rows = SQLiteStorage.get_logs("cranes", "run")
    assert [(row["step"], row["train/loss"]) for row in rows] == [(1, 3.5), (2, 2.5)]
    assert capsys.readouterr().out == ""


def test_a_logger_whose_package_is_missing_says_what_to_install_before_training(place, tmp_path, monkeypatch):
    monkeypatch.setattr("megacore.training.loggers.find_spec", lambda name: None)
    with pytest.raises(
        ConfigError, match=r"needs the package wandb, which is not installed: pip install 'megacore\[wandb\]'"
    ):
        megacore.train(logged_run(place, tmp_path / "out", "wandb"))
    assert not (tmp_path / "run").exists()


def test_a_logger_that_is_not_there_is_refused_with_the_nearest(place, tmp_path):
    with pytest.raises(ConfigError, match=r"no logger is called 'tensorbord'; did you mean tensorboard\?"):
        megacore.train(logged_run(place, tmp_path / "out", "tensorbord"))


def test_no_library_of_a_logger_is_imported_unless_it_is_named(place, tmp_path):
    run_of(place, tmp_path / "out", f"output.directory={tmp_path / 'run'}", "training.train_iters=1")
    code = (
        f"import sys, megacore; megacore.train({str(tmp_path / 'out.toml')!r}); "
        "print({'wandb', 'trackio', 'tensorboard'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "set()\n"


# --- those of other packages


@pytest.fixture
def postcard(tmp_path, monkeypatch):
    site = tmp_path / "site"
    information = site / "megacore_postcard-1.2.dist-info"
    information.mkdir(parents=True)
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: megacore-postcard\nVersion: 1.2\n")
    (information / "entry_points.txt").write_text("[megacore.loggers]\npostcard = megacore_postcard:PostcardLogger\n")
    (site / "megacore_postcard.py").write_text(POSTCARD)
    monkeypatch.syspath_prepend(site)
    monkeypatch.setenv("POSTCARD_API_KEY", "sesame-0123456789")
    yield information
    sys.modules.pop("megacore_postcard", None)


def postcards(tmp_path: Path) -> list:
    return json.loads((tmp_path / "run" / "postcards").read_text())


def test_an_installed_package_adds_a_logger_by_an_entry_point(place, tmp_path, postcard):
    run = logged_run(place, tmp_path / "out", "postcard", overrides=("logging.project=p", "logging.log_interval=2"))

    steps = train_steps(run)

    about, *told = postcards(tmp_path)
    assert about == ["p", "run", 0, 1e-5]
    assert [iteration for iteration, _ in told] == [1, 2, 4, 5]  # the first, every second, the last
    assert told[-1][1]["train/loss"] == steps[-1].loss
    assert "train/num_skipped" not in told[-1][1]


def test_a_name_that_two_packages_give_is_refused_with_both(place, tmp_path, postcard):
    (postcard / "entry_points.txt").write_text("[megacore.loggers]\nwandb = megacore_postcard:PostcardLogger\n")
    with pytest.raises(ConfigError, match=r"a logger called wandb: megacore itself, megacore-postcard 1\.2; uninstall"):
        megacore.train(logged_run(place, tmp_path / "out", "wandb"))


def test_a_logger_that_fails_is_a_warning_once_and_training_goes_on(place, tmp_path, postcard, monkeypatch, caplog):
    monkeypatch.setenv("FAIL_AT", "3")
    now = 0.0
    monkeypatch.setattr("megacore.training.loggers.dispatch.time.monotonic", lambda: now)

    steps = train_steps(logged_run(place, tmp_path / "out", "postcard"))

    assert len(steps) == 5
    assert [iteration for iteration, _ in postcards(tmp_path)[1:]] == [1, 2]  # left alone for a minute
    [warning] = caplog.messages
    assert "postcard failed at iteration 3: ConnectionError: no route, key <POSTCARD_API_KEY>." in warning
    assert "sesame" not in warning and "more" not in warning
    assert (tmp_path / "out").is_dir()


SECRET = ("HF_TOKEN", "PGPASSWORD", "MYSQL_PASSWD", "SSH_PASSPHRASE", "AWS_CREDENTIAL", "BASIC_AUTH", "AUTHORIZATION")
HARMLESS = ("GIT_AUTHOR_NAME", "GIT_AUTHOR_DATE", "PWD", "XAUTHORITY", "HOSTNAME")


@pytest.mark.parametrize("name", SECRET + HARMLESS)
def test_a_warning_has_no_value_of_a_variable_that_is_named_like_a_secret(name, monkeypatch, caplog):
    monkeypatch.setenv(name, "sesame-0123456789")

    def fail() -> None:
        raise ConnectionError("no route for sesame-0123456789")

    Guarded("postcard", object()).attempt("iteration 1", fail)

    [warning] = caplog.messages
    assert (f"no route for <{name}>." in warning) == (name in SECRET)
    assert ("sesame" in warning) == (name in HARMLESS)


def test_a_logger_that_failed_is_told_again_after_a_minute(place, tmp_path, postcard, monkeypatch, caplog):
    monkeypatch.setenv("FAIL_AT", "2")
    now = 0.0
    monkeypatch.setattr("megacore.training.loggers.dispatch.time.monotonic", lambda: now)
    with open_run_log(logged_run(place, tmp_path / "out", "postcard"), ParallelContext.single()) as log:
        for iteration, now in ((1, 0.0), (2, 1.0), (3, 60.0), (2, 61.5), (4, 122.0)):  # noqa: B007
            log.step(a_step(iteration, loss=iteration))  # the second fails twice
            log.loggers[0].waiting.join()

    assert [iteration for iteration, _ in postcards(tmp_path)[1:]] == [1, 4]
    assert len(caplog.messages) == 1


def test_a_logger_that_hangs_neither_slows_nor_ends_the_run_and_what_it_misses_is_told_once(
    place, tmp_path, postcard, monkeypatch, caplog
):
    monkeypatch.setenv("HANG_AT", "1")
    monkeypatch.setattr("megacore.training.loggers.dispatch._MAX_QUEUED", 2)
    monkeypatch.setattr("megacore.training.loggers.dispatch._SHUTDOWN_TIMEOUT", 0.1)
    with open_run_log(logged_run(place, tmp_path / "out", "postcard"), ParallelContext.single()) as log:
        for iteration in range(1, 8):
            log.step(a_step(iteration, loss=1.0))
            while iteration == 1 and not log.loggers[0].waiting.empty():
                time.sleep(0.01)

    behind, given_up = caplog.messages
    assert behind.startswith(
        "Note: postcard is 2 entries behind at iteration 4. Training continues; further entries are lost"
    )
    assert given_up.startswith("Note: postcard has not finished within 0.1 seconds after the run, and is not waited")
    sys.modules["megacore_postcard"].answered.set()
    log.loggers[0].join()
    assert [iteration for iteration, _ in postcards(tmp_path)[1:]] == [1, 2, 3]


def test_a_logger_that_does_not_close_costs_a_run_of_several_ranks_nothing(place, tmp_path, postcard):
    run = logged_run(place, tmp_path / "out", "postcard")
    settings = ("parallel.nproc_per_node=2", "parallel.timeout=10", "checkpoints.interval=100")
    words = [word for setting in (*settings, f"output.directory={run.output.directory}") for word in ("--set", setting)]
    command = ["train", tmp_path / "out.toml", *words, "--set", 'logging.loggers=["postcard"]']

    done = run_command(*command, environment={"HANG_AT_CLOSE": "1", "PYTHONPATH": str(postcard.parent)})

    assert done.returncode == 0, done.stderr
    assert "Note: postcard has not finished within 5 seconds after the run" in done.stderr
    assert done.stdout.endswith(f"Saved {tmp_path / 'out'}.\n")
    Checkpoint(tmp_path / "out").check()
    Checkpoint(tmp_path / "run" / "checkpoints" / "iteration-0000005").check()


def test_a_logger_that_cannot_start_ends_a_new_run_and_not_one_that_goes_on(
    place, tmp_path, postcard, monkeypatch, caplog
):
    monkeypatch.setenv("FAIL_AT_START", "1")
    run = logged_run(place, tmp_path / "out", "postcard")
    with pytest.raises(
        ConfigError, match="the logger postcard could not start: ConnectionError: no route, key <POSTCARD"
    ):
        megacore.train(run)

    with open_run_log(run, ParallelContext.single(), iteration=3) as log:
        log.step(a_step(4, loss=1.0))
    [warning] = caplog.messages
    assert warning.endswith("Training continues without it.")
