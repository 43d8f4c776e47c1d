"""The directory of a run.

    DIR/run.toml          the resolved run file with all keys, which `megacore train` accepts
    DIR/versions.json     software versions, devices and layout of each start
    DIR/metrics.jsonl     the metrics; see megacore.runs.metrics_file

When a run resumes with other settings, the earlier run file is kept as ``run-until-ITERATION.toml``. Environment
variables are not written, so no secret is.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from contextlib import suppress
from itertools import chain, count
from pathlib import Path
from typing import Any

import tomli_w

from megacore.atomic_output import output_errors, write_file
from megacore.errors import DataError, OutputError

Tables = Mapping[str, Mapping[str, Any]]
"""A run file: keys and values by section."""


class RunDirectory:
    """The files of a run, in ``path``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.run_file = path / "run.toml"
        self.versions_file = path / "versions.json"
        self.metrics_file = path / "metrics.jsonl"

    def check(self, tables: Tables, *, resumed_run_id: str | None = None) -> None:
        """Refuse the directory of another run: nothing is overwritten, and curves of two runs are not joined.

        The same run may start in it again. A run that resumes from a training checkpoint, which checks its settings,
        may have other settings, but its ID must be that of the run in the directory.

        Raises:
            OutputError: The settings differ, or another run is resumed.
        """
        if self.path.exists() and not self.path.is_dir():
            raise OutputError(f"output.directory: {self.path} exists, and is not a directory")
        if not self.run_file.is_file():
            return
        if resumed_run_id is not None:
            run_ids = {start["run_id"] for start in self.starts() if "run_id" in start}
            if run_ids and resumed_run_id not in run_ids:
                raise OutputError(
                    f"output.directory: {self.path} holds another run than the resumed one: give this run its own "
                    "directory"
                )
            return
        changes = [
            f"{key} ({_format_setting(before)} there, {_format_setting(now)} here)"
            for key, (before, now) in differences([self.settings(), tables]).items()
            if not key.startswith("logging.")
        ]
        if changes:
            raise OutputError(
                f"output.directory: {self.path} holds another run, which differs in {', '.join(changes)}: give this "
                "run another directory, or remove that one"
            )

    def create(self, tables: Tables, versions: Mapping[str, Any], *, iteration: int) -> None:
        """Write the files of a start after ``iteration``. Raises :class:`OutputError` if they cannot be written."""
        with output_errors(self.run_file):
            self.path.mkdir(parents=True, exist_ok=True)
            if self.run_file.is_file() and self.settings() != tables:
                names = chain([f"run-until-{iteration}.toml"], (f"run-until-{iteration}-{n}.toml" for n in count(2)))
                self.run_file.replace(next(path for path in map(self.path.joinpath, names) if not path.exists()))
            write_file(self.run_file, tomli_w.dumps(tables))
            starts = [*self.starts(), {"iteration": iteration} | dict(versions)]
            write_file(self.versions_file, json.dumps({"starts": starts}, indent=2) + "\n")

    def settings(self) -> dict[str, dict[str, Any]]:
        """Read the run file. Raises :class:`DataError` if there is none, or it is damaged."""
        try:
            tables = tomllib.loads(self.run_file.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise DataError(
                f"{self.path} is not the directory of a run, which has a run.toml: give the directory that "
                "output.directory names in the run file"
            ) from error
        except (OSError, ValueError) as error:
            raise DataError(f"{self.run_file} cannot be read: {error}") from error
        for section, table in tables.items():
            if not isinstance(table, dict):
                raise self._damaged_run_file(f"{section} is not a section")
            for key, value in table.items():
                if not _is_json(value):
                    raise self._damaged_run_file(f"{section}.{key} is {value}, which is not a possible setting")
        return tables

    def starts(self) -> list[dict[str, Any]]:
        """Read the versions, devices and layout of each start, if any. Raises :class:`DataError` if damaged."""
        try:
            versions = json.loads(self.versions_file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return []
        except (OSError, ValueError) as error:
            raise DataError(f"{self.versions_file} cannot be read: {error}") from error
        starts = versions.get("starts") if isinstance(versions, dict) else None
        if not isinstance(starts, list) or not all(
            isinstance(start, dict) and isinstance(start.get("run_id", ""), str) for start in starts
        ):
            raise DataError(
                f'{self.versions_file} is damaged: "starts" must be a list of JSON objects, one per start. Restore the '
                "file that the run has written, or remove it; then the report has no environment"
            )
        return starts

    def _damaged_run_file(self, problem: str) -> DataError:
        return DataError(f"{self.run_file} is damaged: {problem}. Restore the run file that the run has written")


def _is_json(value: Any) -> bool:
    """Return whether JSON can represent a value of TOML, which has dates and times too."""
    with suppress(TypeError):
        return bool(json.dumps(value))
    return False


def differences(run_files: list[Tables]) -> dict[str, list[Any]]:
    """Return the keys in which run files differ, as ``section.key``, with the value in each or ``None``."""
    keys = dict.fromkeys(f"{section}.{key}" for tables in run_files for section in tables for key in tables[section])
    found = {}
    for name in keys:
        section, _, key = name.partition(".")
        values = [tables.get(section, {}).get(key) for tables in run_files]
        if any(value != values[0] for value in values):
            found[name] = values
    return found


def _format_setting(value: Any) -> str:
    return "nothing" if value is None else json.dumps(value)
