"""The console output of a run: one line per logged step or, on a terminal, a live panel."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Iterable
from types import TracebackType
from typing import TYPE_CHECKING

import click

from megacore.cli.notes import print_note, printing

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.live import Live

    from megacore.training import Evaluation, Step

_BARS = "▁▂▃▄▅▆▇█"
_NUM_LINES = 8  # step lines above the panel
_NUM_LOSSES = 400  # recent losses in the sparkline
_REDRAWS_PER_SECOND = 4.0  # at most; a redraw of the panel takes a few milliseconds


class Console:
    """Prints steps and evaluations. On a terminal, the panel is shown while the context manager is entered.

    Args:
        log_interval: Number of steps between two lines. The first step, the last, and the one that stops the run are
            always printed.
        plain: True to print lines on a terminal too.
    """

    def __init__(self, *, log_interval: int = 1, plain: bool = False) -> None:
        self.log_interval = log_interval
        self.plain = plain
        # So many recent steps that evaluations and saving are averaged in.
        self._completions: deque[tuple[int, float]] = deque(maxlen=10_000)
        self._losses: deque[float] = deque(maxlen=_NUM_LOSSES)
        self._lines: deque[str] = deque(maxlen=_NUM_LINES)
        self._last_step: Step | None = None
        self._live: Live | None = None

    def __enter__(self) -> Console:
        self._completions.clear()
        if not self.plain and sys.stdout.isatty():
            from rich.live import Live

            self._live = Live(
                get_renderable=self._panel, refresh_per_second=_REDRAWS_PER_SECOND, vertical_overflow="visible"
            )
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._live is not None:
            with printing():
                self._live.stop()
            self._live = None

    def __call__(self, step: Step) -> None:
        """Print a step and its notes, or update the panel."""
        self._completions.append((step.iteration, time.monotonic()))
        is_first, self._last_step = self._last_step is None, step
        if is_first and self._live is None and step.peak_flops_per_second is not None:
            peak = format_si(step.peak_flops_per_second)
            print_note(f"matrix products were measured at {peak}FLOP/s, the reference for % of peak")
        self._losses.append(step.loss)
        if is_first or step.is_logged(self.log_interval):
            line = format_step(step, seconds_left=self._seconds_left(step))
            if self._live is None:
                self._print(line)
            else:
                self._lines.append(line)
        for note in step.notes:
            if self._live is None:
                print_note(note)
            else:
                self._print(f"Note: {note}.")

    def evaluation(self, evaluation: Evaluation) -> None:
        """Print an evaluation. On a terminal it stays above the panel, whose own lines scroll."""
        self._print(format_evaluation(evaluation))

    def _print(self, line: str) -> None:
        """Print a line, above the panel if there is one."""
        with printing():
            if self._live is None:
                click.echo(line)
            else:
                self._live.console.print(line, markup=False, highlight=False)

    def _seconds_left(self, step: Step) -> float | None:
        """Return the estimated seconds until the last step is done, ``None`` after a single step or the last one."""
        (first, started), (last, ended) = self._completions[0], self._completions[-1]
        if first == last or step.iteration == step.train_iters:
            return None
        return (step.train_iters - step.iteration) * (ended - started) / (last - first)

    def _panel(self) -> RenderableType:
        """Render the last lines, the current values and a progress bar."""
        from rich.console import Group
        from rich.panel import Panel
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        step = self._last_step
        if step is None:
            return Text("running the first step …")
        values = Table.grid(padding=(0, 2))
        values.add_row("loss", f"{step.loss:.4f}", sparkline(self._losses))
        values.add_row("lr", f"{step.lr:.3e}", f"grad norm {step.grad_norm:.4f}{_format_scale(step)}")
        peak = step.peak_flops_per_second
        measured = "" if peak is None else f" (measured: {format_si(peak)}FLOP/s)"
        values.add_row("speed", f"{step.tokens_per_second:,.0f} tokens/s", format_flops(step) + measured)
        left = self._seconds_left(step)
        remaining = "done" if step.iteration == step.train_iters else ""
        bar = Table.grid(padding=(0, 2))
        bar.add_row(
            f"iteration {step.iteration}/{step.train_iters}",
            ProgressBar(total=step.train_iters, completed=step.iteration, width=30),
            remaining if left is None else f"{format_duration(left)} left",
        )
        lines = Text("\n".join(self._lines), style="dim", no_wrap=True, overflow="ellipsis")
        return Group(lines, Panel(Group(bar, values), expand=False))


def format_step(step: Step, *, seconds_left: float | None = None) -> str:
    """Return the line for a step."""
    left = "" if seconds_left is None else f" | {format_duration(seconds_left)} left"
    return (
        f"iteration {step.iteration:>5}/{step.train_iters} | loss {step.loss:.6f} | lr {step.lr:.3e} | "
        f"grad norm {step.grad_norm:.4f} | {step.tokens_per_second:,.0f} tokens/s | {format_flops(step)}"
        f"{_format_scale(step)}{'' if step.is_taken else ' | not taken'}{left}"
    )


def format_evaluation(evaluation: Evaluation) -> str:
    """Return the line for an evaluation."""
    values = " | ".join(f"{name.replace('_', ' ')} {value:.6g}" for name, value in evaluation.values.items())
    when = f" at iteration {evaluation.iteration}" if evaluation.iteration else ""
    return f"{evaluation.split}{when} | {values}"


def format_flops(step: Step) -> str:
    """Return the achieved FLOP/s and, if the peak was measured, the share of it."""
    achieved = f"{format_si(step.flops_per_second)}FLOP/s"
    if step.peak_flops_per_second is None:
        return achieved
    return f"{achieved}, {step.flops_per_second / step.peak_flops_per_second:.1%} of peak"


def _format_scale(step: Step) -> str:
    scale = "" if step.loss_scale is None else f" | loss scale {step.loss_scale:g}"
    return scale + (f" | skipped {step.num_skipped}" if step.num_skipped or step.loss_scale is not None else "")


def format_si(number: float) -> str:
    """Return a number with three digits and an SI prefix, to be followed by its unit."""
    for prefix in ("", "k", "M", "G", "T", "P"):
        if number < 999.5:
            return f"{number:.3g} {prefix}"
        number /= 1000
    return f"{number:.3g} E"


def format_duration(seconds: float) -> str:
    """Return a duration in its two largest units."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


def sparkline(values: Iterable[float], *, width: int = 40) -> str:
    """Return a row of at most ``width`` bars, each the mean of consecutive values. A mean that is not finite is ×."""
    numbers = list(values)
    size = -(-len(numbers) // width) or 1
    means = [sum(stretch := numbers[first : first + size]) / len(stretch) for first in range(0, len(numbers), size)]
    finite = [mean for mean in means if abs(mean) < float("inf")]
    if not finite:
        return "×" * len(means)
    low, extent = min(finite), (max(finite) - min(finite)) or 1.0
    return "".join(
        _BARS[round((mean - low) / extent * (len(_BARS) - 1))] if abs(mean) < float("inf") else "×" for mean in means
    )
