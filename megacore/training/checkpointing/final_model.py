"""Saving the trained model as a native checkpoint: every rank writes its part, rank 0 publishes it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor

from megacore.atomic_output import output_errors, require_absent, require_space, staged_directory
from megacore.checkpoint import Checkpoint, Layout, build_manifest
from megacore.checkpoint.manifest import ParameterEntry, WeightFile, read_manifest, write_manifest
from megacore.checkpoint.matrix import StoredMatrix, num_rows
from megacore.checkpoint.safetensors_file import DTYPE_NAMES, OutputTensor
from megacore.checkpoint.writing import copy_tokenizer, write_weight_files
from megacore.errors import CheckpointError, MegacoreError, OutputError
from megacore.model import DecoderModel
from megacore.parallel import ParallelContext, ParameterSpec, Stage, broadcast_object, gather_parameter, parameter_specs

Entry = TypeVar("Entry")


@dataclass(frozen=True)
class ReservedOutput:
    """An output that is created and locked before training begins, so that its result can be saved at the end.

    Attributes:
        out: The final path.
        staging: The directory to write into, the same for all ranks.
        tokenizer: The digests of the tokenizer's files, which are in ``staging`` already; on rank 0 only.
    """

    out: Path
    staging: Path
    tokenizer: Mapping[str, str]


@contextmanager
def reserve_output(
    out: Path, parallel: ParallelContext, *, started_from: Checkpoint, num_bytes: int
) -> Iterator[ReservedOutput]:
    """Reserve the output of a run, which is published when the block ends without an exception. For all ranks.

    Raises:
        OutputError: when ``out`` exists, is being written, or cannot be created.
        DiskFullError: when ``num_bytes`` do not fit.
    """
    if parallel.rank > 0:
        with output_errors(out):
            staging = Path(broadcast_object("", parallel))
            if not staging.is_dir():
                raise OutputError(
                    f"rank {parallel.rank} does not see {staging}, which rank 0 has created: the output must lie on a "
                    "file system that all nodes share"
                )
            yield ReservedOutput(out, staging, {})
        _wait_for_all(parallel)  # no rank continues before the output is visible
        return
    with staged_directory(out) as staging:
        require_space(staging, num_bytes, out)
        tokenizer = copy_tokenizer(started_from.tokenizer_files(), staging)
        yield ReservedOutput(out, Path(broadcast_object(str(staging), parallel)), tokenizer)
    _wait_for_all(parallel)


def is_result_of(out: Path, checkpoint: Checkpoint) -> bool:
    """Return whether ``out`` is the final result of the run that saved the training ``checkpoint``."""
    training = checkpoint.manifest.training
    try:
        history = read_manifest(out).history
    except CheckpointError:
        return False
    return training is not None and bool(history) and history[-1].get("run_id") == training.run_id


def keep_earlier_result(out: Path, checkpoint: Checkpoint) -> None:
    """Rename ``out`` if it is an earlier result of the run, to make room for the next one.

    Raises:
        OutputError: when the new name is taken.
    """
    if is_result_of(out, checkpoint):
        kept = kept_as(out)
        require_absent(kept)
        out.rename(kept)


def kept_as(out: Path) -> Path:
    """Return the path to which the earlier result ``out`` is renamed when its run resumes."""
    return out.with_name(f"{out.name}-iteration-{read_manifest(out).history[-1]['iterations']:07d}")


def save_stages(
    output: ReservedOutput,
    models: list[DecoderModel],
    stages: list[Stage],
    parallel: ParallelContext,
    *,
    started_from: Checkpoint,
    details: dict[str, Any],
) -> None:
    """Write a model into ``output``, cut as the ranks hold it. For all ranks.

    Args:
        output: The reserved output.
        models: The stages of this process.
        stages: The stages of the whole model.
        parallel: The place of this process.
        started_from: The checkpoint that training started from; the result has its origin.
        details: The entry for the history.

    Raises:
        MegacoreError: on every rank, the error of the first rank that could not write its part. The files written so
            far are removed, to free the space.
    """
    written: dict[str, WeightFile] = {}
    entries: dict[str, ParameterEntry] = {}
    failures: dict[str, MegacoreError] = {}
    for model in models:
        specs = parameter_specs(model)
        parameters = model.own_parameters()
        entries |= {name: ParameterEntry(specs[name], DTYPE_NAMES[p.dtype]) for name, p in parameters.items()}
        try:
            written |= _write_stage(output, model, parallel)
        except MegacoreError as error:
            failures.setdefault(f"rank {parallel.rank}", error)
    all_written, all_entries = _gather(written, parallel), _gather(entries, parallel)
    failures = _gather(failures, parallel)
    if not failures and parallel.rank == 0:
        try:
            with output_errors(output.out):
                _complete(
                    output, all_written, all_entries, stages, parallel, started_from=started_from, details=details
                )
        except MegacoreError as error:
            failures["rank 0"] = error
    failures = broadcast_object(failures, parallel)
    if failures:
        if parallel.rank == 0:
            _remove_written_files(output)
        raise next(iter(failures.values()))


def _write_stage(output: ReservedOutput, model: DecoderModel, parallel: ParallelContext) -> dict[str, WeightFile]:
    """Write the part of stage ``model`` that this rank stores.

    Raises:
        MegacoreError: when it cannot be written. The collectives that share its parameters are completed all the same.
    """
    if parallel.dp_replicate_rank > 0:
        return {}
    specs, parameters = parameter_specs(model), model.own_parameters()
    stored = {name: p for name, p in parameters.items() if specs[name].is_stored_by(parallel.tp_rank)}
    not_gathered = dict(stored)

    def gather(name: str) -> Tensor:
        return gather_parameter(not_gathered.pop(name), parallel)

    def gather_the_rest() -> None:
        for name in list(not_gathered):
            gather(name)

    if parallel.dp_shard_rank > 0:  # the first rank of the shard gathers the parts, one parameter after the other
        gather_the_rest()
        return {}
    tensors = _output_tensors(stored, specs, parallel, gather)
    try:
        with output_errors(output.out):
            return write_weight_files(output.staging, tensors, tp_rank=parallel.tp_rank, stage=model.stage.index)
    except MegacoreError:
        gather_the_rest()
        raise


def _complete(
    output: ReservedOutput,
    written: dict[str, WeightFile],
    entries: dict[str, ParameterEntry],
    stages: list[Stage],
    parallel: ParallelContext,
    *,
    started_from: Checkpoint,
    details: dict[str, Any],
) -> None:
    """Write the manifest, on rank 0."""
    manifest = build_manifest(
        started_from.manifest.description.after_training(started_from.path, **details),
        layout=Layout.from_stages(stages, tp=parallel.tp_size),
        parameters={name: entries[name] for name in started_from.manifest.parameters},
        files=dict(sorted(written.items(), key=lambda item: (item[1].stage, item[1].tp_rank, item[0]))),
        tokenizer=output.tokenizer,
    )
    write_manifest(output.staging, manifest)


def _remove_written_files(output: ReservedOutput) -> None:
    """Free the space; the tokenizer stays, since training checkpoints copy it."""
    for path in output.staging.iterdir():
        if path.is_file():
            path.unlink()


def _output_tensors(
    parameters: Mapping[str, Tensor],
    specs: Mapping[str, ParameterSpec],
    parallel: ParallelContext,
    gather: Callable[[str], Tensor],
) -> list[OutputTensor]:
    """Return the tensors in the file of this tensor-parallel rank, each gathered when it is first read.

    They must be read in order; one at a time is in memory.
    """

    @lru_cache(maxsize=1)
    def stored(name: str) -> Tensor:
        whole = gather(name)
        for dim, size in enumerate(specs[name].stored_shape(parallel.tp_size, parallel.tp_rank)):
            whole = whole.narrow(dim, 0, size)  # replicas are the last entries
        return whole.contiguous()

    tensors = []
    for name, parameter in parameters.items():
        rows, columns = specs[name].stored_block(parallel.tp_size, parallel.tp_rank)
        width = columns.stop - columns.start
        matrix = StoredMatrix(num_rows(rows), width, parameter.dtype, partial(stored, name))
        shape = specs[name].stored_shape(parallel.tp_size, parallel.tp_rank)
        tensors.append(OutputTensor(name, shape, parameter.dtype, matrix))
    return tensors


def _gather(own: dict[str, Entry], parallel: ParallelContext) -> dict[str, Entry]:
    """Return the entries of all ranks together."""
    if parallel.mesh is None:
        return own
    gathered: list[dict[str, Entry]] = [{} for _ in range(parallel.sizes.world)]
    dist.all_gather_object(gathered, own)
    return {name: entry for part in gathered for name, entry in part.items()}


def _wait_for_all(parallel: ParallelContext) -> None:
    if parallel.mesh is not None:
        dist.barrier()
