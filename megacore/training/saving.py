"""Saving a trained model as a native checkpoint: every rank writes its own part, the first one makes it visible."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from megacore.checkpoint import Checkpoint, Layout, Manifest, history_entry
from megacore.checkpoint.manifest import ParameterEntry, WeightFile, write_manifest
from megacore.checkpoint.matrix import StoredMatrix, count
from megacore.checkpoint.safetensors_file import DTYPE_NAMES, OutputTensor
from megacore.checkpoint.staging import reported_as_output_error, require_space, staged_directory
from megacore.checkpoint.writing import copy_tokenizer, is_stored_by, write_weight_files
from megacore.model import DecoderModel
from megacore.parallel import ParallelContext, ParameterSpec, parameter_specs


@dataclass(frozen=True)
class ReservedOutput:
    """An output that is created and locked before training begins, so that a run does not end without a place for it.

    Attributes:
        out: its final name.
        staging: the directory to write into, the same for all ranks.
        tokenizer: the digests of the tokenizer's files, which are there already; on rank 0.
    """

    out: Path
    staging: Path
    tokenizer: Mapping[str, str]


@contextmanager
def reserve_output(
    out: Path, parallel: ParallelContext, *, started_from: Checkpoint, num_bytes: int
) -> Iterator[ReservedOutput]:
    """Create the output of a run, which becomes visible when the block ends without an exception. For all ranks.

    Raises:
        OutputError: when ``out`` exists, is being written, or cannot be created.
        DiskFullError: when ``num_bytes`` do not fit.
    """
    if parallel.tp_rank > 0:
        with reported_as_output_error(out):
            yield ReservedOutput(out, Path(_broadcast("", parallel)), {})
        _wait_for_all(parallel)  # no rank goes on before the output is visible
        return
    with staged_directory(out) as staging:
        require_space(staging, num_bytes, out)
        tokenizer = copy_tokenizer(started_from.tokenizer_files(), staging)
        yield ReservedOutput(out, Path(_broadcast(str(staging), parallel)), tokenizer)
    _wait_for_all(parallel)


def save_model(
    output: ReservedOutput, model: DecoderModel, *, started_from: Checkpoint, details: dict[str, Any]
) -> None:
    """Write ``model`` into ``output``, cut as it is held. Called on every rank.

    The origin is that of ``started_from``; ``details`` go into the history.
    """
    parallel = model.parallel
    specs = parameter_specs(model)
    parameters = {name: _local(parameter) for name, parameter in model.named_parameters()}
    tensors = [
        _output_tensor(name, specs[name], local, parallel)
        for name, local in parameters.items()
        if is_stored_by(specs[name], parallel.tp_rank)
    ]
    files = _gather(write_weight_files(output.staging, tensors, tp_rank=parallel.tp_rank, stage=0), parallel)
    if parallel.tp_rank > 0:
        return
    source = started_from.manifest
    manifest = Manifest(
        family=source.family,
        config=source.config,
        layout=Layout.even(tp=parallel.tp_size, pp=1, num_layers=model.config.num_layers),
        parameters={name: ParameterEntry(specs[name], DTYPE_NAMES[local.dtype]) for name, local in parameters.items()},
        files=files,
        tokenizer=dict(output.tokenizer),
        origin=source.origin,
        history=(*source.history, history_entry("train", source=str(started_from.path), **details)),
    )
    write_manifest(output.staging, manifest)


def _output_tensor(name: str, spec: ParameterSpec, local: Tensor, parallel: ParallelContext) -> OutputTensor:
    rows, columns = spec.block(parallel.tp_size, parallel.tp_rank)
    matrix = StoredMatrix(count(rows), columns.stop - columns.start, local.dtype, lambda: local)
    return OutputTensor(name, tuple(local.shape), local.dtype, matrix)


def _local(parameter: Tensor) -> Tensor:
    return (parameter.to_local() if isinstance(parameter, DTensor) else parameter).detach()


def _broadcast(text: str, parallel: ParallelContext) -> str:
    """What rank 0 says, on every rank."""
    if parallel.tp_mesh is None:
        return text
    box = [text]
    dist.broadcast_object_list(box, group=parallel.tp_group, group_src=0)
    return box[0]


def _gather(files: dict[str, WeightFile], parallel: ParallelContext) -> dict[str, WeightFile]:
    """All ranks' files, in the order of the ranks."""
    if parallel.tp_mesh is None:
        return files
    gathered: list[dict[str, WeightFile]] = [{} for _ in range(parallel.tp_size)]
    dist.all_gather_object(gathered, files, group=parallel.tp_group)
    return {name: file for part in gathered for name, file in part.items()}


def _wait_for_all(parallel: ParallelContext) -> None:
    if parallel.tp_mesh is not None:
        dist.barrier(group=parallel.tp_group)
