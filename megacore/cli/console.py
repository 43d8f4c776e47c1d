"""What a person sees of a run: a line a step or, on a terminal, a panel that is kept up to date."""

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
_NUM_LINES = 8
"""Lines of steps that the panel holds, and leaves behind."""

_NUM_LOSSES = 400
"""Of which the sparkline shows the mean of each of a few stretches."""

_REDRAWS = 4.0
"""Of the panel in a second, at most: they take a few milliseconds each."""


class Console:
    """Shows steps and evaluations. Where the panel is shown, it is there between entering and leaving this.

    Args:
        log_interval: steps from one line to the next; the first here, the last, and where a run stops are told too.
        plain: lines only, on a terminal too.
    """

    def __init__(self, *, log_interval: int = 1, plain: bool = False) -> None:
        self.log_interval = log_interval
        self.plain = plain
        self._pace = Pace()
        self._losses: deque[float] = deque(maxlen=_NUM_LOSSES)
        self._lines: deque[str] = deque(maxlen=_NUM_LINES)
        self._last: Step | None = None
        self._live: Live | None = None

    def __enter__(self) -> Console:
        self._pace.start()
        if not self.plain and sys.stdout.isatty():
            from rich.live import Live

            self._live = Live(get_renderable=self._panel, refresh_per_second=_REDRAWS, vertical_overflow="visible")
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
        """Show a step."""
        self._pace.done(step.iteration)
        if self._last is None and self._live is None and step.peak_flops_per_second is not None:
            peak = with_unit(step.peak_flops_per_second)
            print_note(f"matrix products were measured at {peak}FLOP/s, which is what shares of the peak are of")
        self._losses.append(step.loss)
        is_first, self._last = self._last is None, step
        if is_first or step.is_logged(self.log_interval):
            line = step_line(step, seconds_left=self._pace.seconds_left(step))
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
        """Show an evaluation. It stays, above the panel too, whose lines the next steps take the place of."""
        self._print(evaluation_line(evaluation))

    def _print(self, line: str) -> None:
        """Print a line, above the panel where that is shown."""
        with printing():
            if self._live is None:
                click.echo(line)
            else:
                self._live.console.print(line, markup=False, highlight=False)

    def _panel(self) -> RenderableType:
        """The last lines, and what a person wants to know at a glance."""
        from rich.console import Group
        from rich.panel import Panel
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        step = self._last
        if step is None:
            return Text("the first step is under way …")
        facts = Table.grid(padding=(0, 2))
        facts.add_row("loss", f"{step.loss:.4f}", sparkline(self._losses))
        facts.add_row("lr", f"{step.lr:.3e}", f"grad norm {step.grad_norm:.4f}{_scale(step)}")
        peak = step.peak_flops_per_second
        measured = "" if peak is None else f", which was measured to be {with_unit(peak)}FLOP/s"
        facts.add_row("speed", f"{step.tokens_per_second:,.0f} tokens/s", flops_told(step) + measured)
        bar = Table.grid(padding=(0, 2))
        left = self._pace.seconds_left(step)
        bar.add_row(
            f"iteration {step.iteration}/{step.train_iters}",
            ProgressBar(total=step.train_iters, completed=step.iteration, width=30),
            "done" if step.iteration == step.train_iters else f"{duration(left)} left" if left is not None else "",
        )
        lines = Text("\n".join(self._lines), style="dim", no_wrap=True, overflow="ellipsis")
        return Group(lines, Panel(Group(bar, facts), expand=False))


class Pace:
    """How fast a run goes, by so many steps that evaluations and saving have the part in it that they will have."""

    def __init__(self) -> None:
        self._marks: deque[tuple[int, float]] = deque(maxlen=10_000)

    def start(self) -> None:
        """The first step begins."""
        self._marks.clear()

    def done(self, iteration: int) -> None:
        """A step is done."""
        self._marks.append((iteration, time.monotonic()))

    def seconds_left(self, step: Step) -> float | None:
        """Until the last step is done; ``None`` where a single one is too little to tell by."""
        (first, began), (last, ended) = self._marks[0], self._marks[-1]
        if first == last:
            return None
        return (step.train_iters - step.iteration) * (ended - began) / (last - first)


def step_line(step: Step, *, seconds_left: float | None = None) -> str:
    """The line that tells of one step."""
    left = f" | {duration(seconds_left)} left" if seconds_left is not None and step.iteration < step.train_iters else ""
    return (
        f"iteration {step.iteration:>5}/{step.train_iters} | loss {step.loss:.6f} | lr {step.lr:.3e} | "
        f"grad norm {step.grad_norm:.4f} | {step.tokens_per_second:,.0f} tokens/s | {flops_told(step)}"
        f"{_scale(step)}{'' if step.is_taken else ' | not taken'}{left}"
    )


def evaluation_line(evaluation: Evaluation) -> str:
    """The line that tells of one evaluation."""
    told = " | ".join(f"{name.replace('_', ' ')} {value:.6g}" for name, value in evaluation.values.items())
    when = f" at iteration {evaluation.iteration}" if evaluation.iteration else ""
    return f"{evaluation.split}{when} | {told}"


def flops_told(step: Step) -> str:
    """What the run achieves, and which share that is of the peak that was measured, if it was."""
    told = f"{with_unit(step.flops_per_second)}FLOP/s"
    if step.peak_flops_per_second is None:
        return told
    return f"{told}, {step.flops_per_second / step.peak_flops_per_second:.1%} of peak"


def _scale(step: Step) -> str:
    scale = "" if step.loss_scale is None else f" | loss scale {step.loss_scale:g}"
    return scale + (f" | skipped {step.num_skipped}" if step.num_skipped or step.loss_scale is not None else "")


def with_unit(number: float) -> str:
    """A number with three digits and the prefix of a unit."""
    for prefix in ("", "k", "M", "G", "T", "P"):
        if number < 999.5:
            return f"{number:.3g} {prefix}"
        number /= 1000
    return f"{number:.3g} E"


def duration(seconds: float) -> str:
    """A time to wait, to the precision that a person needs."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


def sparkline(values: Iterable[float], *, width: int = 40) -> str:
    """The values as a row of at most ``width`` bars, each the mean of a stretch of them; one that is no number is ×."""
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
