"""Saving a trained model as a native checkpoint: every rank writes its own part, the first one makes it visible."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from megacore.checkpoint import Checkpoint, Layout, Manifest, history_entry
from megacore.checkpoint.manifest import ParameterEntry, WeightFile, write_manifest
from megacore.checkpoint.matrix import StoredMatrix, count
from megacore.checkpoint.safetensors_file import DTYPE_NAMES, OutputTensor
from megacore.checkpoint.staging import reported_as_output_error, staged_directory
from megacore.checkpoint.writing import copy_tokenizer, is_stored_by, write_weight_files
from megacore.model import DecoderModel
from megacore.parallel import ParallelContext, parameter_specs


def save_model(
    out: Path, model: DecoderModel, parallel: ParallelContext, *, started_from: Checkpoint, details: dict[str, Any]
) -> None:
    """Write ``model`` to ``out``, cut as it is held, whole or not at all. Called on every rank.

    The tokenizer and the origin are those of ``started_from``; ``details`` go into the history.

    Raises:
        OutputError: when ``out`` exists or cannot be written.
    """
    specs = parameter_specs(model)
    parameters = {name: _local(parameter) for name, parameter in model.named_parameters()}
    tensors = []
    for name, local in parameters.items():
        if is_stored_by(specs[name], parallel.tp_rank):
            rows, columns = specs[name].block(parallel.tp_size, parallel.tp_rank)
            height, width = count(rows), columns.stop - columns.start
            matrix = StoredMatrix(height, width, local.dtype, lambda local=local: local.cpu())  # type: ignore[misc]
            tensors.append(OutputTensor(name, tuple(local.shape), local.dtype, matrix))
    is_first = parallel.tp_rank == 0
    with staged_directory(out) if is_first else reported_as_output_error(out) as created:
        staging = Path(_broadcast(str(created), parallel))
        files = write_weight_files(staging, tensors, tp_rank=parallel.tp_rank, stage=0)
        all_files = _gather(files, parallel)
        if is_first:
            source = started_from.manifest
            manifest = Manifest(
                family=source.family,
                config=source.config,
                layout=Layout.even(tp=parallel.tp_size, pp=1, num_layers=model.config.num_layers),
                parameters={
                    name: ParameterEntry(specs[name], DTYPE_NAMES[local.dtype]) for name, local in parameters.items()
                },
                files=all_files,
                tokenizer=copy_tokenizer(started_from.tokenizer_files(), staging),
                origin=source.origin,
                history=(*source.history, history_entry("train", source=str(started_from.path), **details)),
            )
            write_manifest(staging, manifest)
    if parallel.tp_mesh is not None:
        dist.barrier(group=parallel.tp_group)  # nobody returns before the checkpoint is visible


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
