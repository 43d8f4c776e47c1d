"""The run file: everything a training run is told, in TOML, checked before anything is loaded."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from megacore.errors import ConfigError


class Section(BaseModel):
    """A table of the run file. Unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ModelSection(Section):
    """Which weights to start from, and what to compute in."""

    checkpoint: Path = Field(description="Native checkpoint to start from, cut in any way.")
    dtype: Literal["fp32", "fp64"] = Field(
        "fp32", description='What weights are held and computed in: `"fp32"` or `"fp64"`.'
    )


class DataSection(Section):
    """What to train on."""

    prefix: Path = Field(description="Dataset, as `megacore tokenize --out` was given it.")
    seq_length: int = Field(gt=0, description="Tokens of a sample that are predicted.")
    seed: int = Field(1234, ge=0, description="Of the order of the samples.")


class ParallelSection(Section):
    """How the model is spread over processes."""

    tensor_parallel: int = Field(1, gt=0, description="Processes that share each layer.")
    sequence_parallel: bool = Field(
        False, description="Between the parallel layers, let each process hold a slice of the sequence."
    )


class OptimizerSection(Section):
    """AdamW (Loshchilov and Hutter, 2019, arXiv:1711.05101), and the learning rate over the run."""

    lr: float = Field(gt=0, description="Peak learning rate.")
    min_lr: float = Field(0.0, ge=0, description="Learning rate that the end of the run comes close to.")
    warmup_iters: int = Field(0, ge=0, description="Iterations of linear rise to the peak, which the next one has.")
    weight_decay: float = Field(0.01, ge=0, description="Of matrices; norms and biases have none.")
    beta1: float = Field(0.9, ge=0, lt=1, description="Decay of the mean of the gradients.")
    beta2: float = Field(0.95, ge=0, lt=1, description="Decay of the mean of their squares.")
    eps: float = Field(1e-8, gt=0, description="Added to the root of the latter.")
    clip_grad: float = Field(
        1.0, ge=0, description="Largest norm of the gradient, over all parameters; 0 does not clip."
    )


class TrainingSection(Section):
    """How long, and in which batches."""

    train_iters: int = Field(gt=0, description="Optimizer steps.")
    micro_batch_size: int = Field(1, gt=0, description="Samples computed at once.")
    global_batch_size: int = Field(
        1, gt=0, description="Samples of one optimizer step; a multiple of micro_batch_size."
    )


class OutputSection(Section):
    """What is written."""

    checkpoint: Path = Field(description="Native checkpoint to create at the end.")


class RunConfig(Section):
    """A whole run file."""

    model: ModelSection
    data: DataSection
    parallel: ParallelSection = ParallelSection()
    optimizer: OptimizerSection
    training: TrainingSection
    output: OutputSection

    @model_validator(mode="after")
    def _sizes_agree(self) -> RunConfig:
        training, optimizer, parallel = self.training, self.optimizer, self.parallel
        if training.global_batch_size % training.micro_batch_size:
            raise ValueError(
                f"training.global_batch_size ({training.global_batch_size}) must be a multiple of "
                f"training.micro_batch_size ({training.micro_batch_size})"
            )
        if optimizer.warmup_iters >= training.train_iters:
            raise ValueError(
                f"optimizer.warmup_iters ({optimizer.warmup_iters}) must be below "
                f"training.train_iters ({training.train_iters})"
            )
        if optimizer.min_lr > optimizer.lr:
            raise ValueError(f"optimizer.min_lr ({optimizer.min_lr}) must not be above optimizer.lr ({optimizer.lr})")
        if parallel.sequence_parallel and self.data.seq_length % parallel.tensor_parallel:
            raise ValueError(
                f"with sequence_parallel, data.seq_length ({self.data.seq_length}) must be a multiple of "
                f"parallel.tensor_parallel ({parallel.tensor_parallel})"
            )
        return self


def read_run_config(file: Path, overrides: Iterable[str] = ()) -> RunConfig:
    """Read a run file. ``overrides`` are ``section.key=value``, the value as TOML or, failing that, as it stands.

    Raises:
        ConfigError: names every key that is unknown, missing or wrong, with the nearest known key.
    """
    try:
        document = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"the run file {file} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is not TOML: {error}") from error
    for override in overrides:
        _apply(document, override)
    try:
        return RunConfig.model_validate(document)
    except ValidationError as error:
        problems = "\n".join(f"  {_describe(dict(problem))}" for problem in error.errors())
        raise ConfigError(f"{file} is not a valid run file:\n{problems}") from error


def _apply(document: dict[str, Any], override: str) -> None:
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


def _describe(problem: dict[str, Any]) -> str:
    where = [str(part) for part in problem["loc"]]
    name = ".".join(where)
    if problem["type"] == "extra_forbidden":
        known = list(_section_at(where[:-1]).model_fields)
        near = difflib.get_close_matches(where[-1], known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
        return f"{name} is unknown; {hint}"
    if problem["type"] == "missing":
        return f"{name} is missing"
    message = problem["msg"].removeprefix("Value error, ")
    return f"{name}: {message}, not {problem['input']!r}" if name else message


def _section_at(where: list[str]) -> type[BaseModel]:
    section: type[BaseModel] = RunConfig
    for name in where:
        annotation = section.model_fields[name].annotation
        section = next(kind for kind in (annotation, *get_args(annotation)) if isinstance(kind, type))
    return section
