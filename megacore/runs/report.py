"""The report on one or several runs: their curves, differing settings and environments."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any

from megacore.atomic_output import write_file
from megacore.errors import DataError, OutputError
from megacore.runs.chart import COLOURS, Curve, chart, format_number, thin_curve
from megacore.runs.directory import RunDirectory, differences
from megacore.runs.metrics_file import RunMetrics, Series, read_metrics
from megacore.runs.page import MARK, page, table

_CHARTS = {
    "loss": ("loss", "nats per token"),
    "lr": ("learning rate", ""),
    "grad_norm": ("gradient norm", "before clipping"),
    "tokens_per_second": ("speed", "tokens/s"),
    "flops_per_second": ("model FLOP/s", ""),
    "share_of_peak": ("utilization", "share of the measured peak FLOP/s"),
    "loss_scale": ("loss scale", ""),
}
"""Heading and unit of the step metrics that have a chart, in the order of the charts."""


@dataclass(frozen=True)
class _Run:
    name: str
    settings: dict[str, dict[str, Any]]
    starts: list[dict[str, Any]]
    metrics: RunMetrics


def report(runs: Path | str | Sequence[Path | str], out: Path | str | None = None) -> Path:
    """Write a self-contained HTML page on ``runs``, and return its path.

    Args:
        runs: The directories that ``output.directory`` named; the runs need not have ended.
        out: The page, by default ``report.html`` in the directory of a single run. An earlier report is replaced.

    Raises:
        DataError: A path is not the directory of a run, or cannot be read.
        OutputError: ``out`` is something other than a report, or cannot be written.
    """
    paths = [Path(run) for run in ([runs] if isinstance(runs, Path | str) else runs)]
    if not paths:
        raise DataError("a report needs the directory of at least one run")
    if out is None and len(paths) > 1:
        raise OutputError("a report on several runs needs a name: give it with --out FILE.html")
    opened = []
    for path, name in zip(paths, _names(paths), strict=True):
        directory = RunDirectory(path)
        opened.append(_Run(name, directory.settings(), directory.starts(), read_metrics(directory.metrics_file)))
    target = Path(out) if out is not None else paths[0] / "report.html"
    _require_replaceable(target)
    text = page("megacore: " + ", ".join(run.name for run in opened), _body(opened))
    write_file(target, text)
    return target


def _require_replaceable(out: Path) -> None:
    if not out.absolute().parent.is_dir():
        raise OutputError(f"{out.absolute().parent}, which {out.name} is to be written into, is not a directory")
    if out.is_dir():
        raise OutputError(f"{out} is a directory: give the report the name of a file")
    if out.exists() and MARK.encode() not in out.open("rb").readline():
        raise OutputError(f"{out} exists and is not a report, so it is not replaced: give the report another name")


def _names(paths: Sequence[Path]) -> list[str]:
    """Return the shortest ends of the paths that are all different."""
    parts = [path.absolute().parts for path in paths]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(path_parts[-length:]) for path_parts in parts]
        if len(set(names)) == len(names):
            return names
    raise DataError(f"{', '.join(map(str, paths))}: a run is given twice")


def _body(runs: Sequence[_Run]) -> Iterator[str]:
    yield "".join(
        f'<label class="run{number}"><input type="checkbox" checked data-run="{number}"> '
        f'<span class="dot" style="background: {COLOURS[number % len(COLOURS)]}"></span> {escape(run.name)}</label> '
        for number, run in enumerate(runs)
    )
    yield table(["", *(run.name for run in runs)], _summary(runs))
    yield '<div class="charts">'
    for key, (heading, unit) in _CHARTS.items():
        yield chart(heading, unit, [_curve(number, run.metrics.steps, key) for number, run in enumerate(runs)])
    for split, key, evaluated in _evaluations(runs):
        curves = [_curve(number, series, key) for number, series in enumerate(evaluated)]
        yield chart(f"{split}: {key.replace('_', ' ')}", "", curves)
    yield "</div>"
    if len(runs) > 1:
        yield "<h2>Differing settings</h2>"
        differing = differences([run.settings for run in runs])
        yield table(["", *(run.name for run in runs)], [(key, *map(_value, row)) for key, row in differing.items()])
    yield "<h2>Environment</h2>"
    environments = [_flat(run.starts[-1]) if run.starts else {} for run in runs]
    keys = dict.fromkeys(key for environment in environments for key in environment)
    yield table(
        ["", *(run.name for run in runs)],
        [(key, *(environment.get(key, "") for environment in environments)) for key in keys],
    )
    for run in runs:
        rows = [(f"{s}.{key}", _value(value)) for s, entries in run.settings.items() for key, value in entries.items()]
        yield f"<details><summary>Run file of {escape(run.name)}</summary>{table(['', ''], rows)}</details>"


def _evaluations(runs: Sequence[_Run]) -> Iterator[tuple[str, str, list[Series]]]:
    """Yield each split and metric of an evaluation, with the series of the split in each run."""
    for split, key in dict.fromkeys(
        (split, key) for run in runs for split, series in run.metrics.evaluations.items() for key in series.values
    ):
        yield split, key, [run.metrics.evaluations.get(split, Series()) for run in runs]


def _curve(number: int, series: Series, key: str) -> Curve:
    values = series.values.get(key)
    return Curve(number, [] if values is None else thin_curve(series.iterations, values))


def _summary(runs: Sequence[_Run]) -> Iterator[tuple[str, ...]]:
    yield ("Iterations", *(_iterations(run) for run in runs))
    yield ("Final loss", *(_last(run.metrics.steps, "loss") for run in runs))
    for split, key, evaluated in _evaluations(runs):
        yield (f"Final {split} {key.replace('_', ' ')}", *(_last(series, key) for series in evaluated))
    yield ("Tokens", *(_total(run.metrics.steps, "tokens") for run in runs))
    yield ("Training time (s)", *(_total(run.metrics.steps, "seconds") for run in runs))
    yield ("Last update", *(_when(run.metrics.steps) for run in runs))
    if any(len(run.metrics.starts) > 1 for run in runs):
        yield ("Starts after iteration", *(", ".join(map(str, run.metrics.starts)) for run in runs))
    if any(run.metrics.num_damaged for run in runs):
        yield ("Skipped damaged lines", *(str(run.metrics.num_damaged) for run in runs))


def _iterations(run: _Run) -> str:
    done = run.metrics.steps.iterations[-1] if len(run.metrics.steps) else 0
    train_iters = run.settings.get("training", {}).get("train_iters")
    return str(done) if train_iters is None else f"{done} of {train_iters}"  # a run may be limited by samples or epochs


def _last(series: Series, key: str) -> str:
    values = series.values.get(key)
    return f"{values[-1]:.6g}" if values else "–"


def _total(series: Series, key: str) -> str:
    return format_number(sum(value for value in series.values.get(key, ()) if math.isfinite(value)))


def _when(series: Series) -> str:
    times = series.values.get("time")
    known = times and math.isfinite(times[-1])  # a line may have no time
    return datetime.fromtimestamp(times[-1], UTC).isoformat(" ", "seconds") if times and known else "–"


def _value(value: Any) -> str:
    return "–" if value is None else json.dumps(value, ensure_ascii=False)


def _flat(entry: Mapping[str, Any]) -> dict[str, str]:
    """Return the entries of a start as text, with tables in a line each."""
    return {
        key: ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)
        for key, value in entry.items()
        if key != "iteration"
    }
