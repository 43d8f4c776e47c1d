"""Exporting a native checkpoint to the format it came from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from megacore.checkpoint import Checkpoint
from megacore.checkpoint.reading import checked_meanwhile
from megacore.checkpoint.safetensors_file import (
    DTYPES,
    MAX_FILE_BYTES,
    OutputTensor,
    split_by_size,
    write_safetensors,
)
from megacore.checkpoint.staging import require_space, staged_directory
from megacore.config import ModelConfig
from megacore.errors import UnsupportedSourceError
from megacore.model import read_config
from megacore.plugins import Family, get_family
from megacore.weights.binding import BoundMap, bind
from megacore.weights.hf import INDEX_FILE, SINGLE_FILE


def export(
    checkpoint: Path | str,
    out: Path | str,
    *,
    format: str = "hf",
    dtype: torch.dtype | None = None,
    max_file_bytes: int = MAX_FILE_BYTES,
    advance: Callable[[int], None] = lambda num_bytes: None,
) -> None:
    """Write ``checkpoint`` to directory ``out`` in a published format: weights, index, config.json, tokenizer.

    Args:
        checkpoint: a native checkpoint, cut in any way. Its digests are checked on the way.
        out: is created; must not exist.
        format: ``"hf"`` is a Hugging Face directory.
        dtype: to convert to; by default every tensor keeps its own.
        max_file_bytes: no weight file is larger, unless a single tensor is.
        advance: is told of every few bytes written.

    Raises:
        MegacoreError: in one of its kinds, for whatever does not fit; nothing is left in ``out``.
    """
    source = Checkpoint(checkpoint)
    family = get_family(source.manifest.family)
    if format not in family.family.sources:
        raise UnsupportedSourceError(
            f"{family.name} is written in the formats {', '.join(family.family.sources)}, not {format!r}"
        )
    config = read_config(family, source)
    bound = bind(family, config, format)
    tensors = _source_tensors(bound, source, dtype)
    out = Path(out)
    with checked_meanwhile(source) as wait_for_check, staged_directory(out) as staging:
        require_space(staging, sum(tensor.num_bytes for tensor in tensors), out)
        _write_weights(staging, tensors, max_file_bytes, advance)
        _write_json(staging / "config.json", _published_config(family, config, source, format, tensors))
        if generation := source.manifest.origin.get("generation_config"):
            _write_json(staging / "generation_config.json", generation)
        for name, path in source.tokenizer_files().items():
            shutil.copyfile(path, staging / name)
        wait_for_check()


def _source_tensors(bound: BoundMap, checkpoint: Checkpoint, dtype: torch.dtype | None) -> list[OutputTensor]:
    checkpoint.check_parameters(bound.specs)
    shapes = bound.source_shapes()
    tensors = []
    for native, rule in bound.rules.items():
        kept = DTYPES[checkpoint.manifest.parameters[native].dtype]
        matrices = rule.to_source(checkpoint.matrix(native), bound.order)
        for name, matrix in zip(rule.sources, matrices, strict=True):
            tensors.append(OutputTensor(name, shapes[name], dtype or kept, matrix))
    return tensors


def _write_weights(
    directory: Path, tensors: Sequence[OutputTensor], max_file_bytes: int, advance: Callable[[int], None]
) -> None:
    files = split_by_size(tensors, max_file_bytes)
    if len(files) == 1:
        write_safetensors(directory / SINGLE_FILE, files[0], advance=advance)
        return
    weight_map: dict[str, str] = {}
    for number, file in enumerate(files, start=1):
        name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        write_safetensors(directory / name, file, advance=advance)
        weight_map |= {tensor.name: name for tensor in file}
    total = sum(tensor.num_bytes for tensor in tensors)
    _write_json(directory / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _published_config(
    family: Family, config: ModelConfig, source: Checkpoint, format: str, tensors: Sequence[OutputTensor]
) -> dict[str, Any]:
    """What the checkpoint came with, overruled by what it is now."""
    origin = source.manifest.origin
    kept = origin.get("config", {}) if origin.get("source") == format else {}
    largest = max(tensors, key=lambda tensor: tensor.num_bytes)
    dtype = str(largest.dtype).removeprefix("torch.")
    return {**kept, **family.family.config_to_source(config, format), "torch_dtype": dtype}


def _write_json(path: Path, document: dict[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
