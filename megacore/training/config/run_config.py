"""The whole run file: its sections together, checked against each other, read from TOML and written out in full."""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError, model_validator

from megacore.errors import ConfigError
from megacore.training.config.compute import (
    DropoutSection,
    KernelsSection,
    LossScaleSection,
    ModelSection,
    ParallelSection,
    RecomputeSection,
)
from megacore.training.config.data import DataSection
from megacore.training.config.optimizer import OptimizerSection
from megacore.training.config.output import (
    CheckpointsSection,
    EvaluationSection,
    FaultsSection,
    LoggingSection,
    OutputSection,
)
from megacore.training.config.section import Section
from megacore.training.config.training import TrainingSection


class RunConfig(Section):
    """A whole run file."""

    model: ModelSection
    data: DataSection
    parallel: ParallelSection = ParallelSection()
    recompute: RecomputeSection = RecomputeSection()
    dropout: DropoutSection = DropoutSection()
    kernels: KernelsSection = KernelsSection()
    optimizer: OptimizerSection
    loss_scale: LossScaleSection = LossScaleSection()
    training: TrainingSection
    evaluation: EvaluationSection = EvaluationSection()
    checkpoints: CheckpointsSection = CheckpointsSection()
    faults: FaultsSection = FaultsSection()
    output: OutputSection
    logging: LoggingSection = LoggingSection()

    @model_validator(mode="after")
    def _sizes_agree(self) -> RunConfig:
        parallel = self.parallel
        if "evaluation" in self.model_fields_set and self.data.splits == ("train",):
            raise ValueError(
                "[evaluation] needs something to evaluate on: give data.split, data.valid_prefix or data.test_prefix"
            )
        if parallel.sequence_parallel and self.data.seq_length % parallel.tensor_parallel:
            raise ValueError(
                f"with sequence_parallel, data.seq_length ({self.data.seq_length}) must be a multiple of "
                f"parallel.tensor_parallel ({parallel.tensor_parallel})"
            )
        if parallel.pipeline_parallel == 1 and parallel.num_stages_per_rank > 1:
            raise ValueError(
                f"parallel.stages_per_rank is {parallel.stages_per_rank}, and parallel.pipeline_parallel is 1: without "
                "pipeline parallelism there is one stage; leave stages_per_rank out"
            )
        if self.recompute.num_layers > 1 and self.recompute.granularity != "full":
            raise ValueError(
                f'recompute.num_layers ({self.recompute.num_layers}) belongs to recompute.granularity = "full", and '
                f'that is "{self.recompute.granularity}"'
            )
        if self.dropout.lima and self.dropout.hidden == 0:
            raise ValueError("dropout.lima lets dropout.hidden rise from layer to layer, and that is 0")
        if (parallel.data_parallel == "hybrid") != (parallel.shard_size is not None):
            raise ValueError('parallel.shard_size belongs to parallel.data_parallel = "hybrid", which needs it')
        if parallel.layers_per_stage is not None and len(parallel.layers_per_stage) != parallel.num_stages:
            raise ValueError(
                f"parallel.layers_per_stage has {len(parallel.layers_per_stage)} entries, and pipeline_parallel × "
                f"stages_per_rank is {parallel.num_stages}: give one number of layers for each stage"
            )
        return self

    @model_validator(mode="after")
    def _keys_that_may_change_are_known(self) -> RunConfig:
        known = [f"{section}.{key}" for section, entries in self for key in type(entries).model_fields]
        for entry in self.checkpoints.may_change:
            key = re.sub(r"(\[\d+\])?(, \w+)?$", "", entry)  # of a mixture one dataset, of conversations one file
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1)
                hint = f"; did you mean {near[0]}?" if near else ": it takes section.key, for example data.seed"
                raise ValueError(f"checkpoints.may_change: {entry} is unknown{hint}")
        return self

    @property
    def checkpoint_directory(self) -> Path:
        """The directory of training checkpoints, by default in the run directory or beside the result."""
        if self.checkpoints.directory is not None:
            return self.checkpoints.directory
        if self.output.directory is not None:
            return self.output.directory / "checkpoints"
        return self.output.checkpoint.with_name(f"{self.output.checkpoint.name}-checkpoints")

    def settings(self) -> dict[str, Any]:
        """Return every key of the run file as ``section.key``, with a value for JSON."""
        sections = self.model_dump(mode="json")
        return {f"{section}.{key}": value for section, entries in sections.items() for key, value in entries.items()}


def read_run_config(file: Path, overrides: Iterable[str] = ()) -> RunConfig:
    """Read a run file. ``overrides`` are ``section.key=value``; a value that is not TOML is taken as a string.

    Raises:
        ConfigError: names every key that is unknown, missing or wrong, with the nearest known key.
    """
    try:
        document = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"the run file {file} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is not TOML: {error}") from error
    overridden = {_apply(document, override) for override in overrides}
    try:
        return RunConfig.model_validate(document)
    except ValidationError as error:
        problems = []
        for problem in error.errors():
            beside = " (given beside the file)" if _is_overridden(dict(problem), overridden) else ""
            problems.append(f"  {_describe(dict(problem))}{beside}")
        raise ConfigError("\n".join([f"{file} is not a valid run file:", *problems])) from error


def _apply(document: dict[str, Any], override: str) -> str:
    """Apply an override to ``document``; return its ``section.key``."""
    path, equals, text = override.partition("=")
    section, dot, key = path.strip().partition(".")
    if not equals or not dot or not key or "." in key:
        raise ConfigError(f"--set takes section.key=value, for example optimizer.lr=1e-4; not {override!r}")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    table = document.setdefault(section, {})
    if not isinstance(table, dict):
        raise ConfigError(f"--set {override}: {section} is {table!r} in the run file, and must be a table")
    table[key] = value
    return f"{section}.{key}"


def _is_overridden(problem: dict[str, Any], overridden: set[str]) -> bool:
    """Return whether a problem comes from a key, or an unknown section, that an override gave."""
    where = [str(part) for part in problem["loc"]]
    if problem["type"] == "extra_forbidden" and len(where) == 1:
        return any(path.startswith(f"{where[0]}.") for path in overridden)
    return ".".join(where[:2]) in overridden


def _describe(problem: dict[str, Any]) -> str:
    """Describe a problem found by pydantic in the words of the run file."""
    where = [str(part) for part in problem["loc"]]
    name = ".".join(where)
    if problem["type"] == "extra_forbidden":
        return f"{name} is unknown; {_hint(where)}"
    if problem["type"] == "missing":
        return f"{name} is missing"
    message = problem["msg"].removeprefix("Value error, ")
    for pattern, ours in _PYDANTIC_WORDING.items():
        message = re.sub(pattern, ours, message)
    return f"{name}: {message}, not {problem['input']!r}" if name else message


_PYDANTIC_WORDING = {
    "^Input should be": "must be",
    "^(must be .*), (unable to|got a) .*": r"\1",
    "^must be a valid boolean": "must be true or false",
    "^must be a valid integer": "must be a whole number",
    "^must be a valid number": "must be a number",
}
"""Patterns in pydantic's messages and their replacements, applied in order."""


def _hint(unknown: list[str]) -> str:
    """Suggest a known key for an unknown one."""
    known = list(_section_at(unknown[:-1]).model_fields)
    if near := difflib.get_close_matches(unknown[-1], known, n=1):
        return f"did you mean {near[0]}?"
    sections = [name for name in RunConfig.model_fields if unknown[-1] in _section_at([name]).model_fields]
    if sections and len(unknown) > 1:
        return f"did you mean {sections[0]}.{unknown[-1]}?"
    return f"known: {', '.join(known)}"


def _section_at(where: list[str]) -> type[BaseModel]:
    """Return the section class at a path of keys."""
    section: type[BaseModel] = RunConfig
    for name in where:
        annotation = section.model_fields[name].annotation
        section = next(kind for kind in (annotation, *get_args(annotation)) if isinstance(kind, type))
    return section


def explicit_tables(run: RunConfig) -> dict[str, dict[str, Any]]:
    """Return the tables of a run file that gives ``run``, as TOML has them, with the defaults written out.

    Keys without a value are left out, and so are those that are refused beside the others even at their default, such
    as the keys of conversations in a run on text.
    """
    all_tables = run.model_dump(mode="json", exclude_none=True)
    tables = {section: {} | table for section, table in run.model_dump(mode="json", exclude_unset=True).items()}
    tables = {section: _without_none(table) for section, table in tables.items()}
    for section, table in all_tables.items():
        for key, default in table.items():
            if key in tables.get(section, {}):
                continue
            candidate = tables | {section: tables.get(section, {}) | {key: default}}
            if _is_file_of(candidate, run):
                tables = candidate
    in_order = {section: {key: tables[section][key] for key in table if key in tables[section]}
                for section, table in all_tables.items() if section in tables}  # fmt: skip
    assert _is_file_of(in_order, run), "reading the written tables must give the same run"
    return in_order


def _without_none(table: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in table.items() if value is not None}


def _is_file_of(tables: dict[str, dict[str, Any]], run: RunConfig) -> bool:
    try:
        return RunConfig.model_validate(tables) == run
    except ValidationError:
        return False
