"""Writing a native checkpoint from lazy matrices: no model is built, and memory holds a few chunks at a time."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from megacore.atomic_output import require_space, staged_directory
from megacore.checkpoint.input_files import file_sha256
from megacore.checkpoint.layout import Layout
from megacore.checkpoint.manifest import (
    TOKENIZER_DIRECTORY,
    Manifest,
    ModelDescription,
    ParameterEntry,
    WeightFile,
    build_manifest,
    write_manifest,
)
from megacore.checkpoint.matrix import LazyMatrix, block_of
from megacore.checkpoint.safetensors_file import DTYPE_NAMES, OutputTensor, split_by_size, write_safetensors
from megacore.parallel import ParameterSpec, check_tensor_parallel

Advance = Callable[[int], None]
"""``advance(num_bytes)`` receives the bytes written since its last call, for a progress bar."""


@dataclass(frozen=True)
class Parameter:
    """A parameter to write: its shape and cut, its elements, and the dtype to store them in."""

    spec: ParameterSpec
    matrix: LazyMatrix
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return self.matrix.rows * self.matrix.columns * self.dtype.itemsize


def write_checkpoint(
    out: Path,
    parameters: Mapping[str, Parameter],
    model: ModelDescription,
    *,
    layout: Layout,
    tokenizer_files: Mapping[str, Path],
    before_commit: Callable[[], None] = lambda: None,
    advance: Advance = lambda num_bytes: None,
) -> Manifest:
    """Write a native checkpoint of ``model`` to ``out``, whole or not at all.

    ``before_commit`` is called when everything is written but nothing is visible yet; an exception from it abandons
    the output.

    Raises:
        LayoutError: when a rank would have no part of a parameter.
        OutputError: when ``out`` exists or cannot be written.
        DiskFullError: when it does not fit.
    """
    check_tensor_parallel({name: parameter.spec for name, parameter in parameters.items()}, layout.tp)
    with staged_directory(out) as staging:
        require_space(staging, sum(parameter.num_bytes for parameter in parameters.values()), out)
        files: dict[str, WeightFile] = {}
        for stage in range(layout.pp):
            names = layout.names_on_stage(parameters, stage)
            for tp_rank in range(layout.tp):
                tensors = [
                    local_tensor(name, parameters[name], tp_size=layout.tp, tp_rank=tp_rank)
                    for name in names
                    if parameters[name].spec.is_stored_by(tp_rank)
                ]
                files |= write_weight_files(staging, tensors, tp_rank=tp_rank, stage=stage, advance=advance)
        manifest = build_manifest(
            model,
            layout=layout,
            parameters={
                name: ParameterEntry(parameter.spec, DTYPE_NAMES[parameter.dtype])
                for name, parameter in parameters.items()
            },
            files=files,
            tokenizer=copy_tokenizer(tokenizer_files, staging),
        )
        before_commit()
        write_manifest(staging, manifest)
    return manifest


def local_tensor(name: str, parameter: Parameter, *, tp_size: int, tp_rank: int) -> OutputTensor:
    """Return the part of ``parameter`` that the file of rank ``tp_rank`` of ``tp_size`` holds."""
    spec = parameter.spec
    return OutputTensor(
        name=name,
        shape=spec.stored_shape(tp_size, tp_rank),
        dtype=parameter.dtype,
        matrix=block_of(parameter.matrix, *spec.stored_block(tp_size, tp_rank)),
    )


def write_weight_files(
    directory: Path, tensors: list[OutputTensor], *, tp_rank: int, stage: int, advance: Advance = lambda num_bytes: None
) -> dict[str, WeightFile]:
    """Write the tensors of one rank, in as many files as their size needs; return the entries for the manifest."""
    groups = split_by_size(tensors)
    files = {}
    for number, group in enumerate(groups, start=1):
        part = f"-{number:05d}-of-{len(groups):05d}" if len(groups) > 1 else ""
        name = f"model-tp{tp_rank:02d}-pp{stage:02d}{part}.safetensors"
        record = write_safetensors(directory / name, group, advance=advance)
        files[name] = WeightFile(tp_rank, stage, tuple(tensor.name for tensor in group), record)
    return files


def copy_tokenizer(files: Mapping[str, Path], directory: Path) -> dict[str, str]:
    """Copy the tokenizer's files, unchanged, into the checkpoint in ``directory``; return their digests."""
    if files:
        (directory / TOKENIZER_DIRECTORY).mkdir()
    digests = {}
    for name, path in files.items():
        copy = directory / TOKENIZER_DIRECTORY / name
        shutil.copyfile(path, copy)
        digests[name] = file_sha256(copy)
    return digests
