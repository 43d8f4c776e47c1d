"""The console output of a run: lines and, on a terminal, the panel."""

from __future__ import annotations

import math
import os
import pickle
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megacore.cli.console import Console, format_duration, format_si, sparkline
from megacore.training import Evaluation, Step
from tiny_run import prepare, run_of


def a_step(iteration: int, *, loss: float = 2.5, peak: float | None = None, **more) -> Step:
    speed = {"num_tokens": 96, "seconds": 0.5, "flops_per_second": 2.5e12, "peak_flops_per_second": peak}
    return Step(iteration, 1000, loss, 1e-4, 1.25, 12345.6, **speed, **more)


def shown(capsys, console: Console, *steps: Step) -> list[str]:
    with console:
        for step in steps:
            console(step)
    return capsys.readouterr().out.splitlines()


def test_a_line_has_the_share_of_the_peak_and_the_loss_scale(capsys):
    [line] = shown(capsys, Console(), a_step(1, peak=10e12, loss_scale=1024.0, num_skipped=3))
    assert line == (
        "iteration     1/1000 | loss 2.500000 | lr 1.000e-04 | grad norm 1.2500 | 12,346 tokens/s | "
        "2.5 TFLOP/s, 25.0% of peak | loss scale 1024 | skipped 3"
    )


def test_output_that_cannot_be_written_is_discarded_with_a_note():
    script = """
import click
from megacore.cli.notes import printing
for line in ("one", "two"):
    with printing():
        click.echo(line)
"""
    with Path("/dev/full").open("w") as full:
        ended = subprocess.run([sys.executable, "-c", script], stdout=full, stderr=subprocess.PIPE, text=True)

    note = "Note: nothing more is printed, since the output cannot be written (No space left on device).\n"
    assert (ended.returncode, ended.stderr) == (0, note)


def test_without_a_measured_peak_a_line_has_no_share(capsys):
    [line] = shown(capsys, Console(), a_step(7))
    assert line.endswith("| 2.5 TFLOP/s")


def test_the_measured_peak_is_printed_once(capsys):
    console = Console()
    with console:
        console(a_step(1, peak=4e12))
        console(a_step(2, peak=4e12))
    assert capsys.readouterr().err == (
        "Note: matrix products were measured at 4 TFLOP/s, the reference for % of peak.\n"
    )


def test_the_time_left_follows_from_the_steps_so_far_not_the_first(capsys, monkeypatch):
    now = 0.0
    monkeypatch.setattr("megacore.cli.console.time.monotonic", lambda: now)
    console = Console()
    with console:
        for iteration, now in ((1, 500.0), (2, 502.0), (3, 506.0)):  # noqa: B007
            console(a_step(iteration))
    first, second, third = capsys.readouterr().out.splitlines()
    assert first.endswith("FLOP/s")
    assert second.endswith("| 33 min 16 s left")  # 998 steps of 2 seconds
    assert third.endswith("| 49 min 51 s left")  # 997 of 3


@pytest.mark.parametrize("first", [1, 11], ids=["begun", "resumed"])
def test_every_nth_step_is_printed_and_the_first_the_last_and_the_one_that_stops(capsys, first):
    steps = [a_step(number) for number in (first, 12, 13, 14, 15, 16, 1000)]
    steps[2] = a_step(13, stopped_by="SIGTERM")

    lines = shown(capsys, Console(log_interval=3), *steps)

    assert [int(re.match(r"iteration +(\d+)", line)[1]) for line in lines] == [first, 12, 13, 15, 1000]


def test_a_note_is_whole_however_narrow_the_terminal(capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "40")
    note = "NO CHECKPOINT was saved after iteration 7: there is no room for [3 MB] in /a/long/path/of/directories"
    with Console() as console:
        console(a_step(7, notes=(note,)))
        for number in range(8, 30):
            console(a_step(number))

    assert f"Note: {note}." in " ".join(capsys.readouterr().out.split())


def test_an_evaluation_is_a_line(capsys):
    Console(log_interval=100).evaluation(Evaluation(50, "valid", {"loss": 1.25, "token_accuracy": 0.5}))
    assert capsys.readouterr().out == "valid at iteration 50 | loss 1.25 | token accuracy 0.5\n"


def test_evaluations_stay_above_the_panel_however_many_steps_follow(capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    with Console() as console:
        for number in range(1, 100):
            console(a_step(number))
            if number in (1, 50):
                console.evaluation(Evaluation(number, "valid", {"loss": number / 8, "a[b]": 0.5}))

    shown = " ".join(capsys.readouterr().out.split())
    assert shown.count("valid at iteration 1 | loss 0.125 | a[b] 0.5 ") == 1
    assert shown.count("valid at iteration 50 | loss 6.25 | a[b] 0.5 ") == 1


def test_a_console_can_be_sent_to_another_process():
    assert pickle.loads(pickle.dumps(Console(log_interval=7))).log_interval == 7


@pytest.mark.parametrize(
    "values, bars",
    [
        ([1, 2, 3, 4, 5, 6, 7, 8], "▁▂▃▄▅▆▇█"),
        ([5, 5], "▁▁"),
        ([1, math.nan, 2, math.inf], "▁×█×"),
        ([math.nan], "×"),
        ([], ""),
        ([0, 0, 7, 7, 7, 7, 7], "▁█"),  # of width 2: four and three of them
    ],
)
def test_a_sparkline_has_a_bar_for_each_stretch(values, bars):
    assert sparkline(values, width=2 if len(values) == 7 else 40) == bars


@pytest.mark.parametrize(
    "seconds, text",
    [(0.4, "0 s"), (59.6, "1 min 00 s"), (3599, "59 min 59 s"), (3661, "1 h 01 min"), (200_000, "2 d 7 h")],
)
def test_a_duration_is_formatted_in_its_two_largest_units(seconds, text):
    assert format_duration(seconds) == text


@pytest.mark.parametrize("number, text", [(999.6, "1 k"), (12_340, "12.3 k"), (989e12, "989 T"), (1.5e18, "1.5 E")])
def test_a_rate_has_three_digits_and_a_prefix(number, text):
    assert format_si(number) == text


# --- the whole command on a terminal


def on_terminal(*arguments: str) -> str:
    """Return what the command writes to a terminal of 150 columns."""
    child, terminal = pty.fork()
    if child == 0:
        os.environ |= {"COLUMNS": "150", "LINES": "40", "TERM": "xterm"}
        os.execv(sys.executable, [sys.executable, "-m", "megacore", *arguments])
    written = b""
    while True:
        try:
            part = os.read(terminal, 65536)
        except OSError:  # the other side is closed
            break
        if not part:
            break
        written += part
    assert os.waitpid(child, 0)[1] == 0, written.decode()
    os.close(terminal)
    return written.decode()


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return prepare(tmp_path_factory.mktemp("console"))


def test_on_a_terminal_the_panel_is_kept_up_to_date_and_its_last_state_stays(place, tmp_path):
    run_of(place, tmp_path / "out", "training.train_iters=12")

    written = on_terminal("train", str(tmp_path / "out.toml"), "--set", "training.train_iters=12")

    last = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", written[written.rindex("\x1b[2K") :])
    lines = last.splitlines()
    assert "Note: kernels" in written
    assert "iteration 12/12" in last and "done" in last
    assert re.search(r"loss +\d\.\d+ +[▁▂▃▄▅▆▇█]{12} ", last)
    assert re.search(r"speed .* tokens/s .*FLOP/s, [\d.]+% of peak \(measured: [\d.]+ .FLOP/s\)", last)
    assert [int(n) for n in re.findall(r"iteration +(\d+)/12 \| loss", last)] == list(range(5, 13))
    assert lines[-1] == f"Saved {tmp_path / 'out'}."
    assert written.count("\x1b[?25l") == written.count("\x1b[?25h") == 1  # the cursor is given back


def test_with_plain_a_terminal_gets_lines_only(place, tmp_path):
    run_of(place, tmp_path / "out")
    written = on_terminal("train", str(tmp_path / "out.toml"), "--plain")
    assert "\x1b" not in written
    assert len(re.findall(r"^iteration +\d/5 \|", written, re.MULTILINE)) == 5
