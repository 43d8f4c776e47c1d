"""``metrics.jsonl``: one JSON object a line, of each start, each step and each evaluation of a run.

    {"time": 1764000000.0, "start": 0}
    {"time": …, "iteration": 1, "loss": 2.77, "lr": 6.7e-05, "grad_norm": 3.32, "tokens": 2048, "seconds": 0.9, …}
    {"time": …, "iteration": 100, "split": "valid", "values": {"loss": 2.5}}

A run that starts again from an earlier iteration goes on in the same file: a start supersedes what was written before
it of later iterations, and of two lines on the same iteration the last holds. A process that is killed may leave half a
line, which the next start removes and a reader leaves out. Numbers that are not finite are ``null``, since JSON has
none.
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

_YEAR_10000 = 253_402_300_799
"""In seconds since 1970, less one: dates end there."""


class MetricsFile:
    """Appends to a metrics file, which one process at a time may do. Each line is handed to the system at once.

    Raises:
        OutputError: when another process has the file, or it cannot be written.
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
        self._is_cut = False

    def start(self, iteration: int) -> None:
        """Note that the run starts after ``iteration``, which supersedes what is there of later ones."""
        self._append({"start": iteration})

    def step(self, iteration: int, values: Mapping[str, float]) -> None:
        """Write what is known of a step."""
        self._append({"iteration": iteration} | dict(values))

    def evaluation(self, iteration: int, split: str, values: Mapping[str, float]) -> None:
        """Write what came of an evaluation after ``iteration``."""
        self._append({"iteration": iteration, "split": split, "values": dict(values)})

    def close(self) -> None:
        """Wait until all is on the disk, and let others write the file."""
        with self._stack:
            os.fsync(self._descriptor)

    def _append(self, entry: dict[str, Any]) -> None:
        line = orjson.dumps({"time": time.time()} | entry) + b"\n"
        if self._is_cut:
            line = b"\n" + line
        written = os.write(self._descriptor, line)
        self._is_cut = written < len(line)
        if self._is_cut:  # what is left of the line cannot be written: the disk is full
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))


def _truncate_partial_line(descriptor: int) -> None:
    """Cut off what a killed process has left behind the last end of a line."""
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
    """Values over iterations, which rise; a value that is not known or not finite is NaN."""

    iterations: array[int] = field(default_factory=lambda: array("q"))
    values: dict[str, array[float]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.iterations)

    def add(self, iteration: int, values: Mapping[str, Any]) -> None:
        """Add the values at ``iteration``, in the place of what is there of it and of later ones."""
        if self.iterations and iteration <= self.iterations[-1]:
            self.forget_after(iteration - 1)
        for name in values.keys() - self.values.keys():
            self.values[name] = array("d", [math.nan]) * len(self.iterations)
        for name, column in self.values.items():
            value = values.get(name)
            column.append(float(value) if isinstance(value, int | float) else math.nan)
        self.iterations.append(iteration)

    def forget_after(self, iteration: int) -> None:
        """Drop what is there of later iterations."""
        kept = bisect_left(self.iterations, iteration + 1)
        del self.iterations[kept:]
        for column in self.values.values():
            del column[kept:]


@dataclass
class Metrics:
    """What a metrics file says, without what was superseded.

    Attributes:
        steps: ``loss``, ``lr``, ``grad_norm`` and so on, over iterations.
        evaluations: likewise, by the name of the split.
        starts: after which iteration the run was started, each time; of the first it is 0.
        num_damaged: lines that are no JSON object, or of no iteration or time that can be; they were left out.
    """

    steps: Series = field(default_factory=Series)
    evaluations: dict[str, Series] = field(default_factory=dict)
    starts: list[int] = field(default_factory=list)
    num_damaged: int = 0


def read_metrics(path: Path) -> Metrics:
    """Read a metrics file, of a run that may still be going on.

    Raises:
        DataError: when it cannot be read.
    """
    metrics = Metrics()
    try:
        with path.open("rb") as file:
            for entry in _entries(file, metrics):
                _take(entry, metrics)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    return metrics


def _entries(lines: Iterator[bytes], metrics: Metrics) -> Iterator[dict[str, Any]]:
    for line in lines:
        if not line.endswith(b"\n"):
            return  # that a process is writing, or was when it was killed
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
    """Whether a line is of an iteration and, if it says one, of a time that a run can have."""
    iteration, written = entry.get("start", entry.get("iteration")), entry.get("time", 0)
    return (
        isinstance(iteration, int)
        and 0 <= iteration < 2**63
        and isinstance(written, int | float)
        and 0 <= written < _YEAR_10000
    )


def _take(entry: dict[str, Any], metrics: Metrics) -> None:
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
