"""``megacore.json``, the manifest: the description of a native checkpoint, and how a new one is put together."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

from megacore.checkpoint.input_files import read_json_object
from megacore.checkpoint.layout import Layout
from megacore.checkpoint.safetensors_file import DTYPES, FileRecord
from megacore.checkpoint.training_record import TrainingRecord
from megacore.config import MAX_SIZE
from megacore.errors import CheckpointError, CorruptCheckpointError
from megacore.parallel import ParameterSpec

MANIFEST_NAME = "megacore.json"
TOKENIZER_DIRECTORY = "tokenizer"
TOKENIZER_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)
"""Names of the files that a tokenizer may consist of."""
FORMAT_VERSION = 1
TRAINING_FORMAT_VERSION = 2
"""Version of training checkpoints, whose files a megacore that knows version 1 only cannot read."""


@dataclass(frozen=True)
class ParameterEntry:
    """A parameter of the whole model: its shape and cut, and its dtype in the files (a safetensors name)."""

    spec: ParameterSpec
    dtype: str


@dataclass(frozen=True)
class WeightFile:
    """A weight file: the rank that it belongs to, the names of its tensors, its length and digest."""

    tp_rank: int
    stage: int
    tensors: tuple[str, ...]
    record: FileRecord


@dataclass(frozen=True, kw_only=True)
class ModelDescription:
    """The part of a manifest that does not depend on how the model is cut and stored.

    Attributes:
        family: Model family, whose plugin builds the layers.
        config: Fields of its :class:`~megacore.config.ModelConfig`.
        origin: Origin of the weights: ``source`` (the format), ``config`` (the published configuration) and whatever
            else an export must give back.
        history: One entry for each command that led to this checkpoint, the oldest first.
    """

    family: str
    config: dict[str, Any]
    origin: dict[str, Any] = field(default_factory=dict)
    history: tuple[dict[str, Any], ...] = ()

    def after(self, command: str, **details: Any) -> ModelDescription:
        """Return the description with another entry of history; see :func:`history_entry`."""
        return replace(self, history=(*self.history, history_entry(command, **details)))

    def after_training(self, started_from: Path, *, run_id: str, **details: Any) -> ModelDescription:
        """Return the description of what run ``run_id`` makes of the checkpoint ``started_from``.

        A run has one entry, however often it is resumed. Its source is the checkpoint that the run began with.
        """
        own = next((entry for entry in self.history if entry.get("run_id") == run_id), None)
        source = str(started_from) if own is None else own["source"]
        earlier = tuple(entry for entry in self.history if entry is not own)
        return replace(self, history=earlier).after("train", source=source, **details, run_id=run_id)


def history_entry(command: str, **details: Any) -> dict[str, Any]:
    """Return an entry of a checkpoint's history, for ``command``; ``details`` are plain JSON values."""
    return {
        "command": command,
        "megacore": version("megacore"),
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        **details,
    }


@dataclass(frozen=True)
class Manifest:
    """The description of a checkpoint, with the fields of its :class:`ModelDescription`.

    Attributes:
        parameters: Parameters by native name, in the order of the model.
        files: Weight files by name.
        tokenizer: SHA-256 of each of the tokenizer's files, by name.
        rotary_layout: Arrangement of the rotary pairs in a head.
        training: State of the run of a training checkpoint, and where its tensors are. ``None`` for a checkpoint of
            weights alone, whose files follow ``layout``.
    """

    family: str
    config: dict[str, Any]
    layout: Layout
    parameters: dict[str, ParameterEntry]
    files: dict[str, WeightFile]
    tokenizer: dict[str, str] = field(default_factory=dict)
    origin: dict[str, Any] = field(default_factory=dict)
    history: tuple[dict[str, Any], ...] = ()
    rotary_layout: str = "half"
    training: TrainingRecord | None = None

    @property
    def specs(self) -> dict[str, ParameterSpec]:
        return {name: entry.spec for name, entry in self.parameters.items()}

    @property
    def description(self) -> ModelDescription:
        """The part that a checkpoint made from this one inherits."""
        return ModelDescription(family=self.family, config=self.config, origin=self.origin, history=self.history)

    def to_json(self) -> dict[str, Any]:
        return {
            "format": "megacore",
            "version": FORMAT_VERSION if self.training is None else TRAINING_FORMAT_VERSION,
            "family": self.family,
            "config": self.config,
            "rotary_layout": self.rotary_layout,
            "tp": self.layout.tp,
            "pp": self.layout.pp,
            "stages": [list(stage) for stage in self.layout.stages],
            "parameters": {
                name: {
                    "shape": list(entry.spec.shape),
                    "dtype": entry.dtype,
                    "shard_dim": entry.spec.shard_dim,
                    "row_dims": entry.spec.row_dims,
                    # Only of a parameter whose units can be divided between ranks.
                    **(
                        {"num_subunits": entry.spec.num_subunits, "num_shared": entry.spec.num_shared}
                        if entry.spec.num_subunits != 1
                        else {}
                    ),
                }
                for name, entry in self.parameters.items()
            },
            "files": {
                name: {
                    "tp_rank": file.tp_rank,
                    "stage": file.stage,
                    "bytes": file.record.num_bytes,
                    "sha256": file.record.sha256,
                    "tensors": list(file.tensors),
                }
                for name, file in self.files.items()
            },
            "tokenizer": self.tokenizer,
            "origin": self.origin,
            "history": list(self.history),
            **({} if self.training is None else {"training": self.training.to_json()}),
        }

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> Manifest:
        manifest = cls(
            family=document["family"],
            config=document["config"],
            rotary_layout=document["rotary_layout"],
            layout=Layout(tp=document["tp"], stages=tuple((start, stop) for start, stop in document["stages"])),
            parameters={
                name: ParameterEntry(
                    spec=ParameterSpec(
                        tuple(entry["shape"]),
                        entry["shard_dim"],
                        entry["row_dims"],
                        entry.get("num_subunits", 1),
                        entry.get("num_shared", 0),
                    ),
                    dtype=entry["dtype"],
                )
                for name, entry in document["parameters"].items()
            },
            files={
                _plain_file_name(name): WeightFile(
                    tp_rank=file["tp_rank"],
                    stage=file["stage"],
                    tensors=tuple(file["tensors"]),
                    record=FileRecord(num_bytes=file["bytes"], sha256=file["sha256"]),
                )
                for name, file in document["files"].items()
            },
            tokenizer={_plain_file_name(name): digest for name, digest in document["tokenizer"].items()},
            origin=document["origin"],
            history=tuple(document["history"]),
            training=(
                TrainingRecord.from_json(document["training"], list(document["files"]))
                if document["version"] == TRAINING_FORMAT_VERSION
                else None
            ),
        )
        manifest._validate()
        return manifest

    def _validate(self) -> None:
        """Raise ``ValueError`` for a document that no megacore would write; the digest does not prove who did."""
        ends = (0, *(stop for _, stop in self.layout.stages))
        if not _is_size(self.layout.tp) or not self.layout.stages or self.layout.stages != tuple(pairwise(ends)):
            raise ValueError("tp or stages are invalid")
        if any(not _is_size(stop - start) for start, stop in self.layout.stages):
            raise ValueError("a stage has no layers")
        for name, entry in self.parameters.items():
            spec = entry.spec
            has_shape = all(_is_size(size) for size in spec.shape) and 0 < spec.row_dims <= len(spec.shape)
            if not has_shape or entry.dtype not in DTYPES or spec.shard_dim not in (None, *range(len(spec.shape))):
                raise ValueError(f"parameter {name} has an invalid shape, dtype or cut")
            if not _has_valid_subunits(spec):
                raise ValueError(
                    f"parameter {name} has invalid num_subunits {spec.num_subunits!r} or num_shared {spec.num_shared!r}"
                )
            self.layout.stage_of(name)
            if self.training is not None:
                stored = self.training.tensors[f"model.{name}"]
                if (stored.shape, stored.dtype) != (spec.shape, entry.dtype):
                    raise ValueError(f"parameter {name} has another shape or dtype than its stored tensor")
        if unknown := self.tokenizer.keys() - set(TOKENIZER_FILES):
            raise ValueError(f"{min(unknown)} is not the name of a tokenizer's file")
        if self.rotary_layout != "half":
            raise ValueError(f"rotary_layout {self.rotary_layout!r} is not known")


def build_manifest(
    model: ModelDescription,
    *,
    layout: Layout,
    parameters: Mapping[str, ParameterEntry],
    files: Mapping[str, WeightFile],
    tokenizer: Mapping[str, str],
    training: TrainingRecord | None = None,
) -> Manifest:
    """Return the manifest of a new checkpoint of ``model``; the other arguments are attributes of :class:`Manifest`.

    A checkpoint that is made from another one takes ``model`` from the :attr:`Manifest.description` of that one.
    """
    return Manifest(
        **vars(model),
        layout=layout,
        parameters=dict(parameters),
        files=dict(files),
        tokenizer=dict(tokenizer),
        training=training,
    )


def _has_valid_subunits(spec: ParameterSpec) -> bool:
    """Return whether ``num_subunits`` and ``num_shared`` fit the axis after ``shard_dim``."""
    if (spec.num_subunits, spec.num_shared) == (1, 0):
        return True
    if spec.shard_dim is None or spec.shard_dim + 1 >= len(spec.shape):
        return False
    divided = spec.shape[spec.shard_dim + 1] - spec.num_shared if isinstance(spec.num_shared, int) else 0
    return _is_size(spec.num_subunits) and spec.num_shared >= 0 and divided > 0 and divided % spec.num_subunits == 0


def _is_size(number: Any) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and 0 < number < MAX_SIZE


_MAX_SUGGESTIONS = 8


def _checkpoints_in(directory: Path) -> list[Path]:
    """Return the complete checkpoints in ``directory``, by name; unreadable entries are skipped."""
    return sorted(path.parent for path in directory.glob(f"*/{MANIFEST_NAME}") if not path.parent.name.startswith("."))


def read_manifest(directory: Path) -> Manifest:
    """Read the manifest of the checkpoint in ``directory``.

    Raises:
        CheckpointError: when there is no manifest, or a newer megacore wrote it.
        CorruptCheckpointError: when it is damaged.
    """
    path = directory / MANIFEST_NAME
    if not directory.is_dir():
        siblings = [path.name for path in _checkpoints_in(directory.parent)]
        names = ", ".join(siblings[-_MAX_SUGGESTIONS:])
        hint = f": {directory.parent} holds the checkpoints {names}" if siblings else ""
        raise CheckpointError(f"{directory} is not a directory{hint}")
    if not path.is_file():
        hint = ""
        if (directory / "config.json").is_file():
            hint = ". It looks like a published checkpoint: turn it into one with `megacore convert --from`"
        elif inside := _checkpoints_in(directory):
            hint = f", but holds checkpoints: give one of them, for example {inside[-1]}"
        raise CheckpointError(f"{directory} is not a megacore checkpoint: it has no {MANIFEST_NAME}{hint}")
    document = read_json_object(path)
    format_version, digest = document.get("version"), document.pop("sha256", None)
    if format_version not in (FORMAT_VERSION, TRAINING_FORMAT_VERSION):
        raise CheckpointError(
            f"{path} has format version {format_version}, and this megacore reads {FORMAT_VERSION} and "
            f"{TRAINING_FORMAT_VERSION}: install the megacore that wrote it"
        )
    if digest != _digest(document):
        raise CorruptCheckpointError(f"{path} is damaged: it was changed after it was written")
    try:
        return Manifest.from_json(document)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CorruptCheckpointError(f"{path} is damaged: {type(error).__name__} {error}") from error


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write the manifest, with a digest of itself, as the last file of a checkpoint."""
    document = manifest.to_json()
    document["sha256"] = _digest(document)
    with (directory / MANIFEST_NAME).open("x", encoding="utf-8") as file:
        json.dump(document, file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())


def _digest(document: dict[str, Any]) -> str:
    """Return the SHA-256 of the document, independent of white space and of the order of its keys."""
    return hashlib.sha256(json.dumps(document, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _plain_file_name(name: str) -> str:
    """Return ``name``. Raise ``ValueError`` if it would lead out of the checkpoint's directory."""
    if not name or name in (".", "..") or "/" in name or "\\" in name or "\0" in name:
        raise ValueError(f"{name!r} is not the name of a file in the checkpoint")
    return name
