"""The run file: everything a training run is told, in TOML, checked before anything is loaded."""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from megacore.data.datasets.instruction import prefixes
from megacore.data.datasets.splits import SPLITS, Split
from megacore.errors import ConfigError
from megacore.training.config.checkpoints import CheckpointsSection, FaultsSection
from megacore.training.config.evaluation import EvaluationSection
from megacore.training.config.logging import LoggingSection
from megacore.training.config.optimizer import OptimizerSection
from megacore.training.config.section import Section
from megacore.training.config.training import TrainingSection


class ModelSection(Section):
    """Which weights to start from, and what to compute in."""

    checkpoint: Path = Field(description="Native checkpoint to start from, cut in any way.")
    dtype: Literal["fp32", "fp64", "bf16", "fp16"] = Field(
        "fp32",
        description='What is computed in: `"fp32"`, `"fp64"`, `"bf16"` or `"fp16"`. In 16 bit the weights, the '
        "optimizer's state and the sums of gradients over micro-batches and replicas are in 32 bit all the same.",
    )
    rope_scaling_factor: float | None = Field(
        None,
        ge=1,
        description="For a longer context, divide the positions of the rotary embedding by this (linear scaling); by "
        "default they are as in the checkpoint.",
    )
    rope_theta: float | None = Field(
        None, gt=0, description="Base of the rotary embedding; by default that of the checkpoint."
    )
    max_position_embeddings: int | None = Field(
        None,
        gt=0,
        description="Positions that the trained model is said to be made for; by default those of the checkpoint, as "
        "many times as rope_scaling_factor says.",
    )


class WeightedDataset(Section):
    """A dataset of a mixture."""

    prefix: Path
    weight: float = Field(gt=0)


_OF_INSTRUCTION = {"packing", "variable_seq_lengths", "overlong", "scalar_loss_mask"}
"""The keys of the section that mean something for conversations only."""

_PARTS = ("text", "role")

_OF_TEXT = {"split", "document_boundaries", "reset_position_ids", "reset_attention_mask", "eod_mask_loss"}
"""Those that mean something for text only."""

Datasets = Path | tuple[WeightedDataset, ...]
"""One dataset by its path, or several by weight."""


class DataSection(Section):
    """What to train on."""

    prefix: Datasets = Field(
        description="Dataset, as `megacore tokenize --out` was given it; or a mixture, "
        '`[{ prefix = "data/web", weight = 0.7 }, { prefix = "data/code", weight = 0.3 }]`.'
    )
    seq_length: int = Field(gt=0, description="Tokens of a sample that are predicted.")
    seed: int = Field(1234, ge=0, description="Of the order of the samples.")
    kind: Literal["text", "instruction"] = Field(
        "text",
        description='What the dataset is: `"text"`, or `"instruction"`, conversations that `megacore tokenize-chat` '
        "or Megatron-LLM made.",
    )
    packing: bool = Field(
        False, description="Of `instruction`: put several conversations into a sample, each with attention of its own."
    )
    variable_seq_lengths: bool = Field(
        False,
        description="Of `instruction`: make micro-batches as long as their longest sample, in steps of 16, instead of "
        "seq_length.",
    )
    overlong: Literal["truncate", "drop"] = Field(
        "truncate",
        description="Of `instruction`: what becomes of a conversation that is longer than a sample, "
        '`"truncate"` or `"drop"`.',
    )
    scalar_loss_mask: float = Field(
        0.0,
        ge=0,
        description="Of `instruction`: what a token counts for in the loss that is not the assistant's; the "
        "assistant's count 1.",
    )

    split: tuple[Annotated[float, Field(ge=0)], ...] | None = Field(
        None,
        min_length=1,
        max_length=3,
        description="Weights of the parts to train, to validate and to test on, `[969, 30, 1]` for example, that each "
        "dataset of `prefix` is cut into; by default all is trained on.",
    )
    valid_prefix: Datasets | None = Field(
        None, description="Instead of such a part, what to validate on; written as `prefix` is."
    )
    test_prefix: Datasets | None = Field(
        None, description="Instead of such a part, what to test on; written as `prefix` is."
    )
    document_boundaries: Literal["none", "reset"] = Field(
        "none",
        description='`"none"`: tokens attend over the ends of documents; `"reset"`: those of their own document only, '
        "and its positions count from 0.",
    )
    reset_position_ids: bool = Field(
        False, description='With the next key, Megatron-LM\'s words for `document_boundaries = "reset"`.'
    )
    reset_attention_mask: bool = Field(False, description="See the key before; one without the other is refused.")
    eod_mask_loss: bool = Field(
        False, description="Leave the first token of a document, which comes after the end of another, out of the loss."
    )
    other_vocabulary: bool = Field(
        False,
        description="Train, validate and test on datasets whose ids stand for other tokens than the checkpoint's "
        "tokenizer says.",
    )
    prefetch: int = Field(2, ge=0, description="Batches that are prepared ahead of time, by a thread; 0 for none.")

    @field_validator("prefix", "valid_prefix", "test_prefix", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        if value is None or isinstance(value, str | Path):
            return value
        if isinstance(value, list | tuple) and value:
            return tuple(cls._weighted(number, entry) for number, entry in enumerate(value, start=1))
        raise ValueError("must be a path, or a list of tables { prefix = PATH, weight = NUMBER }")

    @staticmethod
    def _weighted(number: int, entry: Any) -> WeightedDataset:
        try:
            return WeightedDataset.model_validate(entry)
        except ValidationError as error:
            what = "; ".join(
                f"{'.'.join(map(str, problem['loc'])) or 'it'}: {problem['msg']}" for problem in error.errors()
            )
            raise ValueError(f"entry {number} must be a table {{ prefix = PATH, weight = NUMBER }} ({what})") from error

    @model_validator(mode="after")
    def _keys_agree(self) -> DataSection:
        if self.reset_position_ids != self.reset_attention_mask:
            raise ValueError(
                "reset_position_ids and reset_attention_mask go together: what attends within its document only, also "
                'counts its positions from there; set both, or document_boundaries = "reset"'
            )
        stray = _OF_TEXT if self.kind == "instruction" else _OF_INSTRUCTION
        if given := self.model_fields_set & stray:
            told = f"{' and '.join(sorted(given))} belong{'s' if len(given) == 1 else ''}"
            other = "text" if self.kind == "instruction" else "instruction"
            raise ValueError(f'{told} to data.kind = "{other}", and that is "{self.kind}"')
        if self.split is not None and not self.split[0]:
            raise ValueError("the first weight of split is of the part to train on, and must not be 0")
        for split in ("valid", "test"):
            if self._has_part(split) and self._named(split) is not None:
                raise ValueError(f"split cuts off a part for {split}, and {split}_prefix names a dataset: give one")
        return self

    @property
    def resets_at_documents(self) -> bool:
        return self.document_boundaries == "reset" or self.reset_position_ids

    @property
    def splits(self) -> tuple[Split, ...]:
        """Those that there is something for."""
        return tuple(s for s in SPLITS if s == "train" or self._has_part(s) or self._named(s) is not None)

    def datasets(self, split: Split = "train") -> tuple[WeightedDataset, ...]:
        """What ``split`` is taken from: of each dataset the part that :meth:`part_weights` says."""
        named = self._named(split)
        if named is None:
            named = self.prefix
        return (WeightedDataset(prefix=named, weight=1.0),) if isinstance(named, Path) else named

    def part_weights(self, split: Split) -> tuple[float, ...] | None:
        """How those datasets are cut into parts, of which ``split`` is one; ``None`` where they are taken whole."""
        return None if self._named(split) is not None else self.split

    def prefixes(self, splits: Sequence[Split] = SPLITS) -> dict[str, Path]:
        """The prefix of every dataset that any of ``splits`` is taken from, by the key that names it."""
        keys = {"prefix": self.prefix, "valid_prefix": self.valid_prefix, "test_prefix": self.test_prefix}
        taken = {"prefix" if self._named(split) is None else f"{split}_prefix" for split in splits}
        found: dict[str, Path] = {}
        for key, named in keys.items():
            if key not in taken:
                continue
            if isinstance(named, Path):
                found[f"data.{key}"] = named
            elif named is not None:
                found |= {f"data.{key}[{number}]": entry.prefix for number, entry in enumerate(named)}
        return found

    def files(self, splits: Sequence[Split] = SPLITS) -> dict[str, Path]:
        """Of these datasets, the prefix of every pair of ``.bin`` and ``.idx``; conversations are two of them each."""
        if self.kind == "text":
            return self.prefixes(splits)
        both = {key: prefixes(prefix) for key, prefix in self.prefixes(splits).items()}
        return {f"{key}, {part}": path for key, paths in both.items() for part, path in zip(_PARTS, paths, strict=True)}

    def _named(self, split: str) -> Datasets | None:
        return {"train": None, "valid": self.valid_prefix, "test": self.test_prefix}[split]

    def _has_part(self, split: Split) -> bool:
        number = SPLITS.index(split)
        return self.split is not None and number < len(self.split) and self.split[number] > 0


class ParallelSection(Section):
    """How the work is spread over processes. What tensor and pipeline parallelism leave is data-parallel."""

    tensor_parallel: int = Field(1, gt=0, description="Processes that share each layer.")
    sequence_parallel: bool = Field(
        False, description="Between the parallel layers, let each process hold a slice of the sequence."
    )
    pipeline_parallel: int = Field(1, gt=0, description="Processes that hold different layers.")
    pipeline_schedule: Literal["1F1B", "Interleaved1F1B", "InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV"] = (
        Field(
            "1F1B",
            description='`"1F1B"`, `"Interleaved1F1B"`, `"InterleavedZeroBubble"`, `"ZBVZeroBubble"` or '
            '`"DualPipeV"`, as torch has them.',
        )
    )
    stages_per_rank: int | None = Field(
        None,
        gt=0,
        description="Pipeline stages of a process; by default 1 for 1F1B and 2 for the other schedules.",
    )
    layers_per_stage: tuple[int, ...] | None = Field(
        None,
        description="How many layers each stage has; by default balanced, with embedding and head in the balance.",
    )
    data_parallel: Literal["replicated", "sharded", "hybrid"] = Field(
        "replicated",
        description='`"replicated"`: each data-parallel process holds all parameters; `"sharded"`: a part of them; '
        '`"hybrid"`: a part of a copy that shard_size processes share.',
    )
    shard_size: int | None = Field(None, gt=0, description="Of `hybrid`, the processes that share a copy.")
    nproc_per_node: int | None = Field(
        None,
        gt=0,
        description="Processes to start on each node; by default one a GPU or, without any, as many as the model is "
        "cut over.",
    )
    timeout: int = Field(
        1800, gt=0, description="How long a process waits for another one before the run ends, in seconds."
    )

    @property
    def num_stages_per_rank(self) -> int:
        return self.stages_per_rank or (1 if self.pipeline_parallel == 1 or self.pipeline_schedule == "1F1B" else 2)

    @property
    def num_stages(self) -> int:
        return self.pipeline_parallel * self.num_stages_per_rank


class LossScaleSection(Section):
    """The factor on the loss that keeps gradients in fp16 from vanishing; it adapts itself (Micikevicius et al., 2017,
    arXiv:1710.03740)."""

    initial: float = Field(65536.0, gt=0, description="At the start.")
    minimum: float = Field(1.0, gt=0, description="Never less.")
    window: int = Field(1000, gt=0, description="Steps without an overflow after which it doubles.")
    hysteresis: int = Field(2, gt=0, description="Overflows in such a window that it takes to halve it.")


class RecomputeSection(Section):
    """Computing activations again in the backward pass, instead of keeping them."""

    granularity: Literal["none", "selective", "full"] = Field(
        "none",
        description='`"none"`; `"selective"`: what lies between the projections of attention; `"full"`: all of a '
        "layer but its input.",
    )
    num_layers: int = Field(1, gt=0, description="Of `full`: consecutive layers that keep one input among them.")


class DropoutSection(Section):
    """Dropout. Masks depend on the seed and the sample, not on how the work is spread.

    But for those of attention, which depend on tensor_parallel and micro_batch_size.
    """

    hidden: float = Field(
        0.0, ge=0, lt=1, description="Of what attention and MLP add to the residual, and of the embedding."
    )
    attention: float = Field(0.0, ge=0, lt=1, description="Of the attention weights.")
    lima: bool = Field(
        False,
        description="Let `hidden` rise from 0 at the first layer to its value at the last, with none at the embedding.",
    )
    seed: int = Field(1234, ge=0, description="Of the masks.")


class KernelsSection(Section):
    """What computes. Which of them can be had on which machine is in :data:`megacore.model.kernels.KERNELS`."""

    attention: Literal["auto", "math", "flash", "efficient", "flash-attn"] = Field(
        "auto",
        description='`"auto"`: of its own kernels torch chooses one at each call; `"math"`, `"flash"` or '
        '`"efficient"`: that one; `"flash-attn"`: the package, on GPUs in 16 bit.',
    )
    norm: Literal["auto", "torch", "apex"] = Field(
        "auto", description='`"torch"`, which `"auto"` is too, or `"apex"`, NVIDIA\'s, on GPUs.'
    )
    optimizer: Literal["auto", "torch", "apex"] = Field(
        "auto", description='`"torch"`, which `"auto"` is too, or `"apex"`, NVIDIA\'s, on GPUs.'
    )
    compile: bool = Field(
        False, description="Let torch compile each layer, for which it needs a C++ compiler on a CPU."
    )

    @property
    def chosen(self) -> dict[str, str]:
        """The names, by what they compute."""
        return {"attention": self.attention, "norm": self.norm, "optimizer": self.optimizer}


class OutputSection(Section):
    """What is written."""

    checkpoint: Path = Field(description="Native checkpoint to create at the end.")
    directory: Path | None = Field(
        None,
        description="Directory of the run, created at the start: its resolved run file, its metrics, the versions of "
        "what ran; by default none is kept.",
    )


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
    """Put an override into ``document``; return its ``section.key``."""
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
    """Whether a problem is of a key, or of an unknown section, that an override gave."""
    where = [str(part) for part in problem["loc"]]
    if problem["type"] == "extra_forbidden" and len(where) == 1:
        return any(path.startswith(f"{where[0]}.") for path in overridden)
    return ".".join(where[:2]) in overridden


def _describe(problem: dict[str, Any]) -> str:
    where = [str(part) for part in problem["loc"]]
    name = ".".join(where)
    if problem["type"] == "extra_forbidden":
        return f"{name} is unknown; {_hint(where)}"
    if problem["type"] == "missing":
        return f"{name} is missing"
    message = problem["msg"].removeprefix("Value error, ")
    for pattern, ours in _WORDING.items():
        message = re.sub(pattern, ours, message)
    return f"{name}: {message}, not {problem['input']!r}" if name else message


_WORDING = {
    "^Input should be": "must be",
    "^(must be .*), (unable to|got a) .*": r"\1",
    "^must be a valid boolean": "must be true or false",
    "^must be a valid integer": "must be a whole number",
    "^must be a valid number": "must be a number",
}
"""What pydantic says, and what is said of a file in its place, one after the other."""


def _hint(unknown: list[str]) -> str:
    """What somebody may have meant by a key that is unknown."""
    known = list(_section_at(unknown[:-1]).model_fields)
    if near := difflib.get_close_matches(unknown[-1], known, n=1):
        return f"did you mean {near[0]}?"
    sections = [name for name in RunConfig.model_fields if unknown[-1] in _section_at([name]).model_fields]
    if sections and len(unknown) > 1:
        return f"did you mean {sections[0]}.{unknown[-1]}?"
    return f"known: {', '.join(known)}"


def _section_at(where: list[str]) -> type[BaseModel]:
    section: type[BaseModel] = RunConfig
    for name in where:
        annotation = section.model_fields[name].annotation
        section = next(kind for kind in (annotation, *get_args(annotation)) if isinstance(kind, type))
    return section
