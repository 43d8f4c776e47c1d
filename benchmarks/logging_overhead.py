"""The time to log one step: to the run directory, to TensorBoard, as a line, on the live panel.

    python benchmarks/logging_overhead.py

The last column is relative to a step of 100 milliseconds; few steps are shorter.
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
    log: Callable[[Step], None], *, wait: Callable[[], None] = lambda: None, group_size: int = 100
) -> float:
    """Return the seconds to log a step, from the fastest group of steps, so that other work on the machine counts less.

    Args:
        log: The function to measure.
        wait: Waits until a background thread has processed all steps.
        group_size: Number of steps that are timed together.
    """
    times = []
    for first in range(1, NUM_STEPS, group_size):
        steps = [a_step(iteration) for iteration in range(first, first + group_size)]
        started = time.perf_counter()
        for step in steps:
            log(step)
        wait()
        times.append(time.perf_counter() - started)
    return min(times) / group_size


def print_row(target: str, seconds: float) -> None:
    print(f"{target:<34}{seconds * 1e6:>9.1f} µs per step{seconds / STEP:>9.3%} of a step of {STEP * 1e3:.0f} ms")


def panel_seconds(place: Path) -> float:
    """Return the CPU time of this thread and of the one that draws, per step of 100 milliseconds."""
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
        print_row("run directory", seconds_a_step(opened.enter_context(open_run_log(a_run(place / "one"), alone)).step))
        log = opened.enter_context(open_run_log(a_run(place / "two", loggers=["tensorboard"]), alone))
        # The thread that writes for TensorBoard shares the interpreter with the thread that trains, so its time counts.
        print_row("run directory and TensorBoard", seconds_a_step(log.step, wait=log.loggers[0].waiting.join))
        with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere), Console() as console:
            seconds = seconds_a_step(console)
        print_row("line", seconds)
        print_row("panel, four times a second", panel_seconds(place))


if __name__ == "__main__":
    main()
