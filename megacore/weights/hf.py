"""Checkpoints in the Hugging Face format: a directory with ``config.json`` and safetensors files."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from megacore.checkpoint.matrix import StoredMatrix
from megacore.checkpoint.safetensors_file import SafetensorsFile
from megacore.config import DynamicNtkScaling, LinearScaling, ModelConfig, RotaryScaling, YarnScaling
from megacore.errors import CheckpointError, ConfigError, CorruptCheckpointError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

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

_NOT_KEPT = ("auto_map", "_name_or_path", "transformers_version", "torch_dtype", "dtype")
"""Keys of config.json that do not outlive the files they describe; ``auto_map`` would have code fetched and run."""

ROTARY_METHODS: Mapping[str, type[RotaryScaling]] = {
    "linear": LinearScaling,
    "dynamic": DynamicNtkScaling,
    "yarn": YarnScaling,
}
"""What the format calls the ways of scaling the rotary embedding that are not one family's own."""


class HuggingFaceSource:
    """A directory in the Hugging Face format, opened for reading.

    Raises:
        CheckpointError: when the directory, its configuration or one of its files is missing.
        CorruptCheckpointError: when a file is damaged.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        if not directory.is_dir():
            raise CheckpointError(f"{directory} is not a directory with a checkpoint in it")
        self.config = self._read_json("config.json")
        self._file_of: dict[str, SafetensorsFile] = {}
        for file in (SafetensorsFile(directory / name) for name in self._file_names()):
            for name in file.names:
                if name in self._file_of:
                    raise CorruptCheckpointError(
                        f"tensor {name} is in both {self._file_of[name].path.name} and {file.path.name} of {directory}"
                    )
                self._file_of[name] = file

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor in the checkpoint, by name."""
        return {name: file.shape(name) for name, file in self._file_of.items()}

    def dtype(self, name: str) -> torch.dtype:
        return self._file_of[name].dtype(name)

    def matrix(self, name: str) -> StoredMatrix:
        """Tensor ``name`` as a matrix; a vector is a matrix of one column."""
        rows, *columns = self.shapes[name]
        return self._file_of[name].matrix(name, rows, columns[0] if columns else 1)

    def tokenizer_files(self) -> dict[str, Path]:
        return {name: self.directory / name for name in TOKENIZER_FILES if (self.directory / name).is_file()}

    def origin(self) -> dict[str, Any]:
        """What an export needs besides the weights, to give back what the directory said of itself."""
        kept = {key: value for key, value in self.config.items() if key not in _NOT_KEPT}
        origin: dict[str, Any] = {"source": "hf", "config": kept}
        if (self.directory / "generation_config.json").is_file():
            origin["generation_config"] = self._read_json("generation_config.json")
        return origin

    def _file_names(self) -> list[str]:
        if (self.directory / INDEX_FILE).is_file():
            index = self._read_json(INDEX_FILE).get("weight_map")
            if not isinstance(index, dict):
                raise CorruptCheckpointError(f"{self.directory / INDEX_FILE} has no weight_map")
            for name in index.values():
                if not isinstance(name, str) or Path(name).name != name:
                    raise CorruptCheckpointError(
                        f"{self.directory / INDEX_FILE} names {name!r}, which is not a file of its own directory"
                    )
            return sorted(set(index.values()))
        if (self.directory / SINGLE_FILE).is_file():
            return [SINGLE_FILE]
        others = sorted(path.name for path in self.directory.glob("*.bin"))
        hint = f". It has {', '.join(others[:3])}: save it as safetensors first" if others else ""
        raise CheckpointError(f"{self.directory} has neither {SINGLE_FILE} nor {INDEX_FILE}{hint}")

    def _read_json(self, name: str) -> dict[str, Any]:
        path = self.directory / name
        if not path.is_file():
            raise CheckpointError(f"{self.directory} has no {name}: it is not a checkpoint in the Hugging Face format")
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise CorruptCheckpointError(f"{path} is damaged: {error}") from error
        if not isinstance(document, dict):
            raise CorruptCheckpointError(f"{path} is damaged: it holds no object")
        return document


def rotary_from_hf(
    published: Mapping[str, Any], methods: Mapping[str, type[RotaryScaling]] = ROTARY_METHODS
) -> tuple[float, RotaryScaling | None]:
    """Read the rotary base and its scaling from a ``config.json``, in the spelling of transformers 4 or 5.

    Args:
        published: the parsed ``config.json``.
        methods: by ``rope_type``; a family adds its own to :data:`ROTARY_METHODS`.

    Raises:
        ConfigError: names the ``rope_type`` or the setting that is not implemented.
    """
    parameters = dict(published.get("rope_scaling") or published.get("rope_parameters") or {})
    rope_type = parameters.pop("rope_type", None) or parameters.pop("type", None) or "default"
    parameters.pop("type", None)
    theta = float(parameters.pop("rope_theta", None) or published.get("rope_theta") or 10000.0)
    partial = parameters.pop("partial_rotary_factor", None) or published.get("partial_rotary_factor")
    if partial not in (None, 1.0):
        raise ConfigError(f"partial_rotary_factor {partial} is not implemented: only the whole head is turned")
    if rope_type == "default":
        return theta, None
    if rope_type not in methods:
        raise ConfigError(
            f"rope_type {rope_type!r} is not implemented; implemented: default, {', '.join(sorted(methods))}"
        )
    method = methods[rope_type]
    fields = {field.name for field in dataclasses.fields(method)}
    if "original_max_position_embeddings" in fields:
        longest = published.get("max_position_embeddings", 2048)
        original = published.get("original_max_position_embeddings")
        parameters["original_max_position_embeddings"] = (
            original or parameters.get("original_max_position_embeddings") or longest
        )
        if parameters.get("factor") is None:
            parameters["factor"] = longest / parameters["original_max_position_embeddings"]
    parameters = {key: value for key, value in parameters.items() if value is not None}
    if unknown := sorted(set(parameters) - fields):
        raise ConfigError(f"rope_type {rope_type!r} with {', '.join(unknown)} is not implemented")
    try:
        return theta, method(**parameters)
    except TypeError as error:
        raise ConfigError(f"rope_type {rope_type!r} is incomplete in config.json: {error}") from error


def rotary_to_hf(config: ModelConfig, methods: Mapping[str, type[RotaryScaling]] = ROTARY_METHODS) -> dict[str, Any]:
    """The inverse of :func:`rotary_from_hf`, in both spellings, which agree, so that any reader finds its own."""
    scaling: dict[str, Any] = {"rope_type": "default"}
    if config.rope_scaling is not None:
        name = next(name for name, method in methods.items() if isinstance(config.rope_scaling, method))
        settings = dataclasses.asdict(config.rope_scaling)
        scaling = {"rope_type": name, **{key: value for key, value in settings.items() if value is not None}}
    return {
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling if config.rope_scaling is not None else None,
        "rope_parameters": {"rope_theta": config.rope_theta, **scaling},
    }
