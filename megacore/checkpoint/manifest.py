"""``megacore.json``: what a native checkpoint says of itself."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from megacore.checkpoint.json_file import read_json_object
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
"""The files that a tokenizer may consist of."""
FORMAT_VERSION = 1
TRAINING_FORMAT_VERSION = 2
"""Of a checkpoint with a record of its training, whose files a megacore that knows version 1 only cannot read."""


@dataclass(frozen=True)
class ParameterEntry:
    """A parameter of the whole model: its shape and cut, and the dtype it is stored in (a safetensors name)."""

    spec: ParameterSpec
    dtype: str


@dataclass(frozen=True)
class WeightFile:
    """A weight file: whose rank's it is, what is in it, and the digest of its bytes."""

    tp_rank: int
    stage: int
    tensors: tuple[str, ...]
    record: FileRecord


@dataclass(frozen=True)
class Manifest:
    """Everything a checkpoint knows of itself.

    Attributes:
        family: the model family, whose plugin builds the layers.
        config: the fields of its :class:`~megacore.config.ModelConfig`.
        layout: how it is cut.
        parameters: by native name, in the order of the model.
        files: the weight files, by name.
        tokenizer: the SHA-256 of each of the tokenizer's files, by name.
        origin: where the weights came from: ``source`` (the format), ``config`` (the published configuration) and
            whatever else an export must give back.
        history: one entry a command that made this checkpoint, the oldest first.
        rotary_layout: how the rotary pairs lie in a head.
        training: what a run needs to go on, and where the parameters are; ``None`` where there are only weights, in
            files by ``layout``.
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
                    **_finer_cut(entry.spec),
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
        """Raise ``ValueError`` for what no megacore would have written: the digest is no proof of who did."""
        ends = (0, *(stop for _, stop in self.layout.stages))
        if not _is_size(self.layout.tp) or not self.layout.stages or self.layout.stages != tuple(pairwise(ends)):
            raise ValueError("tp and stages are no layout")
        if any(not _is_size(stop - start) for start, stop in self.layout.stages):
            raise ValueError("a stage has no layers")
        for name, entry in self.parameters.items():
            spec = entry.spec
            whole = all(_is_size(size) for size in spec.shape) and 0 < spec.row_dims <= len(spec.shape)
            if not whole or entry.dtype not in DTYPES or spec.shard_dim not in (None, *range(len(spec.shape))):
                raise ValueError(f"parameter {name} is none")
            if not _can_be_cut_finer(spec):
                raise ValueError(f"parameter {name} cannot be cut in {spec.num_subunits!r} and {spec.num_shared!r}")
            self.layout.stage_of(name)
        if self.training is not None:
            self._validate_training(self.training)
        if strangers := self.tokenizer.keys() - set(TOKENIZER_FILES):
            raise ValueError(f"{min(strangers)} is no file of a tokenizer")
        if self.rotary_layout != "half":
            raise ValueError(f"rotary_layout {self.rotary_layout!r} is not known")

    def _validate_training(self, training: TrainingRecord) -> None:
        for name, entry in self.parameters.items():
            stored = training.tensors[f"model.{name}"]
            if (stored.shape, stored.dtype) != (entry.spec.shape, entry.dtype):
                raise ValueError(f"parameter {name} is not what is stored of it")


def _finer_cut(spec: ParameterSpec) -> dict[str, int]:
    """What the manifest says of a parameter whose units can be dealt out to several ranks; else nothing."""
    if spec.num_subunits == 1:
        return {}
    return {"num_subunits": spec.num_subunits, "num_shared": spec.num_shared}


def _can_be_cut_finer(spec: ParameterSpec) -> bool:
    """Whether ``num_subunits`` and ``num_shared`` describe the axis after ``shard_dim``."""
    if (spec.num_subunits, spec.num_shared) == (1, 0):
        return True
    if spec.shard_dim is None or spec.shard_dim + 1 >= len(spec.shape):
        return False
    dealt = spec.shape[spec.shard_dim + 1] - spec.num_shared if isinstance(spec.num_shared, int) else 0
    return _is_size(spec.num_subunits) and spec.num_shared >= 0 and dealt > 0 and dealt % spec.num_subunits == 0


def _is_size(number: Any) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and 0 < number < MAX_SIZE


_NUM_NAMED = 8
"""Of the checkpoints that somebody may have meant, the last ones."""


def _checkpoints_in(directory: Path) -> list[Path]:
    """Those that are whole, by their names; what may not be read is passed over."""
    found = (manifest.parent for manifest in directory.glob(f"*/{MANIFEST_NAME}"))
    return sorted(path for path in found if not path.name.startswith("."))


def read_manifest(directory: Path) -> Manifest:
    """Read the manifest of the checkpoint in ``directory``.

    Raises:
        CheckpointError: when there is none, or a newer megacore wrote it.
        CorruptCheckpointError: when it cannot be read.
    """
    path = directory / MANIFEST_NAME
    if not directory.is_dir():
        beside = [path.name for path in _checkpoints_in(directory.parent)]
        hint = f": {directory.parent} holds the checkpoints {', '.join(beside[-_NUM_NAMED:])}" if beside else ""
        raise CheckpointError(f"{directory} is not a directory{hint}")
    if not path.is_file():
        hint = ""
        if (directory / "config.json").is_file():
            hint = ". It looks like a published checkpoint: turn it into one with `megacore convert --from`"
        elif inside := _checkpoints_in(directory):
            hint = f", but holds checkpoints: give one of them, for example {inside[-1]}"
        raise CheckpointError(f"{directory} is not a megacore checkpoint: it has no {MANIFEST_NAME}{hint}")
    document = read_json_object(path)
    version, digest = document.get("version"), document.pop("sha256", None)
    if version not in (FORMAT_VERSION, TRAINING_FORMAT_VERSION):
        raise CheckpointError(
            f"{path} has format version {version}, and this megacore reads {FORMAT_VERSION} and "
            f"{TRAINING_FORMAT_VERSION}: "
            "install the megacore that wrote it"
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
    """The SHA-256 of the document, whatever its white space and the order of its keys."""
    return hashlib.sha256(json.dumps(document, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _plain_file_name(name: str) -> str:
    """Refuse a name that would lead out of the checkpoint's directory."""
    if not name or name in (".", "..") or "/" in name or "\\" in name or "\0" in name:
        raise ValueError(f"{name!r} is not the name of a file in the checkpoint")
    return name
