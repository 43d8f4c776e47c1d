"""What it costs to be told of a step: by the run's directory, by TensorBoard, by a line, by the panel.

    python benchmarks/logging_overhead.py

The last column is a share of a step of 100 milliseconds; few are shorter.
"""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, redirect_stdout
from pathlib import Path

from rich import console as rich_console
from rich.live import Live

from megacore.cli.console import Console
from megacore.parallel import ParallelContext
from megacore.training import RunConfig, Step
from megacore.training.loggers.dispatch import open_run_log

NUM_STEPS = 5000
STEP = 0.1


def a_step(iteration: int) -> Step:
    return Step(
        iteration,
        NUM_STEPS,
        2.0 + 1 / iteration,
        1e-4,
        1.5,
        1000.0,
        num_tokens=100,
        seconds=STEP,
        flops_per_second=1e12,
        peak_flops_per_second=2e12,
    )


def a_run(place: Path, **logging: object) -> RunConfig:
    return RunConfig.model_validate(
        {
            "model": {"checkpoint": "none"},
            "data": {"prefix": "none", "seq_length": 1},
            "optimizer": {"lr": 0.1},
            "training": {"train_iters": NUM_STEPS},
            "output": {"checkpoint": "none", "directory": str(place)},
            "logging": logging,
        }
    )


def seconds_a_step(
    tell: Callable[[Step], None], *, wait: Callable[[], None] = lambda: None, at_once: int = 100
) -> float:
    """Of the fastest hundred steps: a machine that has other work to do is slower now and then.

    ``wait`` waits until a thread has done what it was given.
    """
    taken = []
    for first in range(1, NUM_STEPS, at_once):
        steps = [a_step(iteration) for iteration in range(first, first + at_once)]
        started = time.perf_counter()
        for step in steps:
            tell(step)
        wait()
        taken.append(time.perf_counter() - started)
    return min(taken) / at_once


def row(what: str, seconds: float) -> None:
    print(f"{what:<34}{seconds * 1e6:>9.1f} µs a step{seconds / STEP:>9.3%} of a step of {STEP * 1e3:.0f} ms")


def panel_seconds(place: Path) -> float:
    """The time of this thread and of the one that draws, of each 100 milliseconds."""
    with (place / "screen").open("w") as screen:
        console = Console()
        console._live = Live(
            get_renderable=console._panel,
            refresh_per_second=4.0,
            console=rich_console.Console(file=screen, force_terminal=True, width=150, height=40),
        )
        with console._live:
            before, began = time.process_time(), time.perf_counter()
            for iteration in range(1, 41):
                console(a_step(iteration))
                time.sleep(STEP)
            assert threading.active_count() > 1
            return (time.process_time() - before) / ((time.perf_counter() - began) / STEP)


def main() -> None:
    with tempfile.TemporaryDirectory() as directory, ExitStack() as opened:
        place = Path(directory)
        alone = ParallelContext.single()
        row("the run's directory", seconds_a_step(opened.enter_context(open_run_log(a_run(place / "one"), alone)).step))
        log = opened.enter_context(open_run_log(a_run(place / "two", loggers=["tensorboard"]), alone))
        # In a thread of its own, which takes its time from the one that trains all the same.
        row("the run's directory, TensorBoard", seconds_a_step(log.step, wait=log.loggers[0].waiting.join))
        with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere), Console() as console:
            seconds = seconds_a_step(console)
        row("a line", seconds)
        row("the panel, four times a second", panel_seconds(place))


if __name__ == "__main__":
    main()
