"""``metrics.jsonl``: one JSON object per line for each start, step and evaluation of a run.

    {"time": 1764000000.0, "start": 0}
    {"time": …, "iteration": 1, "loss": 2.77, "lr": 6.7e-05, "grad_norm": 3.32, "tokens": 2048, "seconds": 0.9, …}
    {"time": …, "iteration": 100, "split": "valid", "values": {"loss": 2.5}}

A run that resumes from an earlier iteration continues the same file: a start supersedes earlier lines of later
iterations, and the last of several lines of one iteration is valid. A process that is killed may leave a partial line,
which the next start removes and readers skip. Numbers that are not finite are ``null``, since JSON has none.
"""

from __future__ import annotations

import errno
import math
import os
import time
from array import array
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from megacore.atomic_output import lock_output, output_errors
from megacore.errors import DataError

_YEAR_10000 = 253_402_300_799  # the last second, counted from 1970, that ``datetime`` can represent


class MetricsFile:
    """Appends to a metrics file, one process at a time. Each line is passed to the system at once.

    Raises:
        OutputError: Another process writes the file, or it cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        refusal = f"{path} is being written by another run: wait for it, or give output.directory another name"
        with output_errors(path), ExitStack() as stack:
            stack.enter_context(lock_output(path, refusal=refusal))
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o666)
            stack.callback(os.close, self._descriptor)
            _truncate_partial_line(self._descriptor)
            self._stack = stack.pop_all()
        self._is_partial = False

    def start(self, iteration: int) -> None:
        """Write a start of the run after ``iteration``, which supersedes lines of later iterations."""
        self._append({"start": iteration})

    def step(self, iteration: int, values: Mapping[str, float]) -> None:
        """Write the metrics of a step."""
        self._append({"iteration": iteration} | dict(values))

    def evaluation(self, iteration: int, split: str, values: Mapping[str, float]) -> None:
        """Write the metrics of an evaluation after ``iteration``."""
        self._append({"iteration": iteration, "split": split, "values": dict(values)})

    def close(self) -> None:
        """Wait until everything is on the disk, and release the lock."""
        with self._stack:
            os.fsync(self._descriptor)

    def _append(self, entry: dict[str, Any]) -> None:
        line = orjson.dumps({"time": time.time()} | entry) + b"\n"
        if self._is_partial:
            line = b"\n" + line
        written = os.write(self._descriptor, line)
        self._is_partial = written < len(line)
        if self._is_partial:  # the rest of the line cannot be written: the disk is full
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))


def _truncate_partial_line(descriptor: int) -> None:
    """Remove a partial line at the end, which a killed process has left."""
    size = end = os.fstat(descriptor).st_size
    while end > 0:
        first = max(0, end - 65536)
        newline = os.pread(descriptor, end - first, first).rfind(b"\n")
        if newline >= 0:
            end = first + newline + 1
            break
        end = first
    if end < size:
        os.ftruncate(descriptor, end)


@dataclass
class Series:
    """Values by ascending iteration; a value that is unknown or not finite is NaN."""

    iterations: array[int] = field(default_factory=lambda: array("q"))
    values: dict[str, array[float]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.iterations)

    def add(self, iteration: int, values: Mapping[str, Any]) -> None:
        """Add the values of ``iteration``, which replace those of this and later iterations."""
        if self.iterations and iteration <= self.iterations[-1]:
            self.forget_after(iteration - 1)
        for name in values.keys() - self.values.keys():
            self.values[name] = array("d", [math.nan]) * len(self.iterations)
        for name, column in self.values.items():
            value = values.get(name)
            column.append(float(value) if isinstance(value, int | float) else math.nan)
        self.iterations.append(iteration)

    def forget_after(self, iteration: int) -> None:
        """Drop the values of later iterations."""
        kept = bisect_left(self.iterations, iteration + 1)
        del self.iterations[kept:]
        for column in self.values.values():
            del column[kept:]


@dataclass
class RunMetrics:
    """The metrics of each step and of the evaluations of each split, without superseded values."""

    steps: Series = field(default_factory=Series)
    evaluations: dict[str, Series] = field(default_factory=dict)
    starts: list[int] = field(default_factory=list)
    """The iteration after which the run was started, for each start; 0 for the first one."""
    num_damaged: int = 0
    """Number of skipped lines that are not a JSON object with a possible iteration and time."""


def read_metrics(path: Path) -> RunMetrics:
    """Read the metrics file of a run, which may still write it. Raises :class:`DataError` if it cannot be read."""
    metrics = RunMetrics()
    try:
        with path.open("rb") as file:
            for entry in _entries(file, metrics):
                _take(entry, metrics)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    return metrics


def _entries(lines: Iterator[bytes], metrics: RunMetrics) -> Iterator[dict[str, Any]]:
    for line in lines:
        if not line.endswith(b"\n"):
            return  # a process is writing this line, or was killed while it did
        if not line.strip():
            continue
        try:
            entry = orjson.loads(line)
        except orjson.JSONDecodeError:
            entry = None
        if isinstance(entry, dict) and _is_possible(entry):
            yield entry
        else:
            metrics.num_damaged += 1


def _is_possible(entry: dict[str, Any]) -> bool:
    """Return whether the iteration of a line, and its time if it has one, are in the possible range."""
    iteration, written = entry.get("start", entry.get("iteration")), entry.get("time", 0)
    return (
        isinstance(iteration, int)
        and 0 <= iteration < 2**63
        and isinstance(written, int | float)
        and 0 <= written < _YEAR_10000
    )


def _take(entry: dict[str, Any], metrics: RunMetrics) -> None:
    if "start" in entry:
        metrics.starts.append(entry["start"])
        for series in (metrics.steps, *metrics.evaluations.values()):
            series.forget_after(entry["start"])
        return
    iteration = entry.pop("iteration")
    if "split" not in entry:
        metrics.steps.add(iteration, entry)
    elif isinstance(entry.get("values"), dict):
        metrics.evaluations.setdefault(str(entry["split"]), Series()).add(iteration, entry["values"])
    else:
        metrics.num_damaged += 1
