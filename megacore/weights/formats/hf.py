"""The Hugging Face format: a directory with ``config.json`` and safetensors files."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from megacore.checkpoint.input_files import read_json_object
from megacore.checkpoint.matrix import LazyMatrix
from megacore.checkpoint.safetensors_file import SafetensorsFile, split_by_size, write_safetensors
from megacore.errors import CheckpointError, ConfigError, CorruptCheckpointError
from megacore.hookspecs import ModelFamily
from megacore.plugins import default_registry
from megacore.weights.formats.published import CheckpointFormat, Publication, PublishedCheckpoint, Shape

CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

# A safetensors file in the same directory. A pattern is excluded too, as the hub's library expands it.
_INDEXED_NAME = re.compile(r"[\w.-]+\.safetensors", re.ASCII)
# Keys of config.json that are not kept: they describe the original files, and auto_map makes readers run code.
_DROPPED_KEYS = ("auto_map", "_name_or_path", "transformers_version", "torch_dtype", "dtype")
_LOADED_TOKENIZERS = frozenset(("tokenizer.json", "tokenizer_config.json"))  # transformers looks for these


class HuggingFaceCheckpoint(PublishedCheckpoint):
    """A directory in the Hugging Face format, opened for reading."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.config_file = directory / CONFIG_FILE
        self.config = _read_json(directory, CONFIG_FILE)
        self._file_of: dict[str, SafetensorsFile] = {}
        for file in (SafetensorsFile(directory / name) for name in self._file_names()):
            for name in file.names:
                if name in self._file_of:
                    raise CorruptCheckpointError(
                        f"tensor {name} is in both {self._file_of[name].path.name} and {file.path.name} of {directory}"
                    )
                self._file_of[name] = file

    def check_family(self, family: ModelFamily) -> None:
        architectures = self.config.get("architectures") or []
        if not isinstance(architectures, list) or not all(isinstance(name, str) for name in architectures):
            raise ConfigError(f"{self.config_file}: architectures is {architectures!r}, not a list of names")
        if not set(architectures) & set(family.architectures):
            owners = {name for found in architectures for name in default_registry().families_for_architecture(found)}
            hint = f"; use --model {' or '.join(sorted(owners))}" if owners else ""
            raise ConfigError(
                f"{self.config_file} is of architecture {', '.join(architectures) or 'none named'}, and "
                f"{family.name} reads {', '.join(family.architectures)}{hint}"
            )
        if "quantization_config" in self.config:
            raise ConfigError(f"{self.directory} holds quantized weights; convert the original checkpoint instead")

    def shapes(self, expected: Mapping[str, Shape]) -> dict[str, Shape]:
        return {name: file.shape(name) for name, file in self._file_of.items()}

    def dtype(self, name: str) -> torch.dtype:
        return self._file_of[name].dtype(name)

    def matrix(self, name: str, shape: Shape) -> LazyMatrix:
        rows, *columns = shape
        return self._file_of[name].matrix(name, rows, columns[0] if columns else 1)

    def origin(self) -> dict[str, Any]:
        origin: dict[str, Any] = {"source": "hf", "config": _kept_keys(self.config)}
        if (self.directory / GENERATION_FILE).is_file():
            origin["generation_config"] = _read_json(self.directory, GENERATION_FILE)
        return origin

    def _file_names(self) -> list[str]:
        if (names := indexed_file_names(self.directory)) is not None:
            return names
        if (self.directory / SINGLE_FILE).is_file():
            return [SINGLE_FILE]
        others = sorted(path.name for path in self.directory.glob("*.bin"))
        hint = f". It has {', '.join(others[:3])}: save it as safetensors first" if others else ""
        raise CheckpointError(f"{self.directory} has neither {SINGLE_FILE} nor {INDEX_FILE}{hint}")


def indexed_file_names(directory: Path) -> list[str] | None:
    """Return the weight files that the index in ``directory`` names; ``None`` if there is no index.

    Raises:
        CorruptCheckpointError: if the index is damaged or names anything but safetensors files of its own directory.
    """
    if not (directory / INDEX_FILE).is_file():
        return None
    index = _read_json(directory, INDEX_FILE).get("weight_map")
    if not isinstance(index, dict):
        raise CorruptCheckpointError(f"{directory / INDEX_FILE} has no weight_map")
    for name in index.values():
        if not isinstance(name, str) or not _INDEXED_NAME.fullmatch(name):
            raise CorruptCheckpointError(
                f"{directory / INDEX_FILE} names {name!r}, which is not a safetensors file of its own directory"
            )
    return sorted(set(index.values()))


def _read_json(directory: Path, name: str) -> dict[str, Any]:
    path = directory / name
    if not path.is_file():
        raise CheckpointError(f"{directory} has no {name}: it is not a checkpoint in the Hugging Face format")
    return read_json_object(path)


class HuggingFaceFormat(CheckpointFormat):
    """A directory with ``config.json``, one safetensors file or several with an index, and the tokenizer's files."""

    name = "hf"
    marker_file = CONFIG_FILE

    def weight_files(self, directory: Path) -> Iterable[Path]:
        return directory.glob("*.safetensors")

    def open(self, directory: Path) -> HuggingFaceCheckpoint:
        return HuggingFaceCheckpoint(directory)

    def write(self, directory: Path, publication: Publication, *, advance: Callable[[int], None]) -> None:
        if (publication.tp, publication.pp) != (1, 1):
            raise ConfigError(f"the format {self.name} is not cut over ranks: leave out --tp and --pp")
        self._write_weights(directory, publication, advance)
        dtype = str(publication.dtype).removeprefix("torch.")
        kept = _kept_keys(publication.origin.get("config", {}))
        _write_json(directory / CONFIG_FILE, {**kept, **publication.config, "torch_dtype": dtype})
        if generation := publication.origin.get("generation_config"):
            _write_json(directory / GENERATION_FILE, generation)
        for name, path in publication.tokenizer_files.items():
            shutil.copyfile(path, directory / name)
        names = publication.tokenizer_files.keys()
        if "tokenizer.model" in names and not names & _LOADED_TOKENIZERS:
            publication.report(
                "the tokenizer is a tokenizer.model alone, and transformers needs tokenizer_config.json and "
                "tokenizer.json: copy them from a checkpoint with the same tokenizer in the Hugging Face format"
            )

    def _write_weights(self, directory: Path, publication: Publication, advance: Callable[[int], None]) -> None:
        files = split_by_size(publication.tensors, publication.max_file_bytes)
        if len(files) == 1:
            write_safetensors(directory / SINGLE_FILE, files[0], advance=advance)
            return
        weight_map: dict[str, str] = {}
        for number, file in enumerate(files, start=1):
            name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
            write_safetensors(directory / name, file, advance=advance)
            weight_map |= {tensor.name: name for tensor in file}
        metadata = {"total_size": publication.num_bytes}
        _write_json(directory / INDEX_FILE, {"metadata": metadata, "weight_map": weight_map})


def _kept_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in _DROPPED_KEYS}


def _write_json(path: Path, document: dict[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
