"""Checks before the model is loaded, and the notes that a user reads at the start of a run."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megacore.atomic_output import require_absent
from megacore.checkpoint import Checkpoint
from megacore.config import ModelConfig
from megacore.data import (
    DatasetDescription,
    InstructionDescription,
    InstructionSamples,
    MixedSamples,
    Split,
    load_tokenizer,
)
from megacore.data.tokenizers.tokenizer import digest_of_tokens
from megacore.errors import ConfigError, DataError, LayoutError
from megacore.model.kernels import check_kernels, describe_kernels
from megacore.parallel import (
    SCHEDULES,
    Nodes,
    ParallelContext,
    ParameterSpec,
    check_schedule,
    describe_imbalance,
    is_first_process,
    local_device,
)
from megacore.training.batches import SplitSamples, num_evaluation_samples
from megacore.training.config import DataSection, RunConfig
from megacore.training.evaluation.metrics import resolve_metrics
from megacore.training.loggers.dispatch import check_run_log
from megacore.training.starting_point import StartingPoint, changed_settings

_VERBS: dict[Split, str] = {"train": "train", "valid": "validate", "test": "test"}
"""The verb for using each split."""

_COMPARED_BYTES = 2**20
"""Number of bytes at the beginning and at the end of a dataset that are compared between processes."""


def log_startup_notes(notes: Iterable[str], nodes: Nodes, on_note: Callable[[str], None] | None) -> None:
    """Pass ``notes`` to ``on_note`` in the first process, and say on each of several nodes where it connects."""
    if on_note is None:
        return
    if is_first_process(nodes):
        for note in notes:
            on_note(note)
    if nodes.count > 1:
        on_note(f"node {nodes.rank} of {nodes.count} meets the others at {nodes.address}:{nodes.port}")


# --- the computation


def check_compute(run: RunConfig, config: ModelConfig, specs: Mapping[str, ParameterSpec], *, dp_size: int) -> None:
    """Check that the kernels, the schedule, the batches and the metrics can be computed for this model.

    Raises:
        LayoutError: when batch sizes do not fit the layout of the processes.
        ConfigError: when a kernel cannot be used here, or a metric is unknown.
    """
    if run.optimizer.kind != "adamw" and run.kernels.optimizer == "apex":
        raise ConfigError(
            f'kernels.optimizer = "apex" is an AdamW, and optimizer.kind is "{run.optimizer.kind}": set '
            'kernels.optimizer to "torch"'
        )
    check_kernels(
        run.kernels.chosen,
        device_type=local_device().type,
        dtype=run.model.dtype,
        has_mask=config.position_embedding == "alibi",
        drops_attention=run.dropout.attention > 0,
    )
    if run.kernels.compile:
        _check_compilation(run)
    resolve_metrics(run.evaluation.metrics, conversations=run.data.kind == "instruction")
    for size in run.training.batch_sizes.sizes:
        _check_batch_size(run, size, dp_size=dp_size)


def _check_batch_size(run: RunConfig, size: int, *, dp_size: int) -> None:
    training, at_once = run.training, run.training.micro_batch_size * dp_size
    is_full = size == training.global_batch_size
    if size % at_once:
        named = "training.global_batch_size" if is_full else "a batch size of training.rampup_batch_size"
        raise LayoutError(
            f"{named} ({size}) must be a multiple of training.micro_batch_size ({training.micro_batch_size}) × the "
            f"data-parallel size ({dp_size})"
            + ("" if is_full else f": let it start with, and grow by, multiples of {at_once}")
        )
    if run.parallel.pipeline_parallel > 1:
        check_schedule(
            run.parallel.pipeline_schedule,
            pp=run.parallel.pipeline_parallel,
            stages_per_rank=run.parallel.num_stages_per_rank,
            num_micro_batches=size // at_once,
        )


def _check_compilation(run: RunConfig) -> None:
    if run.parallel.splits_backward:
        usable = ", ".join(name for name, schedule in SCHEDULES.items() if not schedule.splits_backward)
        raise ConfigError(
            f"kernels.compile does not go with the pipeline schedule {run.parallel.pipeline_schedule}, which takes the "
            f"backward pass of a layer apart: set parallel.pipeline_schedule to one of {usable}, or kernels.compile to "
            "false"
        )
    compiler = os.environ.get("CXX", "g++")
    if local_device().type == "cpu" and shutil.which(compiler) is None:
        raise ConfigError(
            f"kernels.compile needs a C++ compiler on a CPU, and {compiler} is not there: install it, name another one "
            "in the environment variable CXX, or set kernels.compile to false"
        )


# --- what the run writes and resumes


def check_outputs(run: RunConfig, start: StartingPoint, nodes: Nodes) -> None:
    """Check that the loggers, the run directory and the output can be created.

    Raises:
        ConfigError: when a logger is not available.
        OutputError: when the output exists, or the run directory belongs to another run.
    """
    if is_first_process(nodes):
        check_run_log(run, resumed_run_id=None if start.record is None else start.record.run_id)
    if not start.is_resumed:  # a resumed run renames its earlier result
        require_absent(run.output.checkpoint)


def check_resume(
    run: RunConfig, start: StartingPoint, digests: Mapping[str, str], *, train_iters: int
) -> Iterator[str]:
    """Check that there are iterations left and the data are the same; yield what differs.

    Raises:
        ConfigError: when the run is over, or would resume with other data.
    """
    record = start.record
    if record is None:
        return
    guard = record.state["guard"]
    if record.iteration > train_iters or (record.iteration == train_iters and run.output.checkpoint.exists()):
        raise ConfigError(
            f"{start.path} is after iteration {record.iteration}, and the run has {train_iters} iterations: it is "
            "over; make it longer to resume it, with training.train_iters for example"
        )
    if record.iteration == train_iters and guard["is_over"]:
        raise ConfigError(
            f"{start.path} is after the last iteration, and the {guard['num_in_a_row']} steps up to it were skipped: "
            "there is nothing to resume. `megacore export` writes the weights as they were before these steps; or make "
            "the run longer, with training.train_iters for example"
        )
    yield f"resuming after iteration {record.iteration}, from {start.path}"
    yield from changed_settings(run, record, digests)


# --- the data


def describe_training(
    run: RunConfig,
    checkpoint: Checkpoint,
    specs: Mapping[str, ParameterSpec],
    samples: SplitSamples,
    *,
    train_iters: int,
) -> Iterator[str]:
    """Check the vocabularies of the datasets; yield what a user should know about the computation and the data.

    Raises:
        DataError: when the ids of a dataset stand for other tokens than the model's.
    """
    data, training = run.data, run.training
    yield from _describe_compute(run, checkpoint, specs)
    yield from _check_vocabularies(data, checkpoint, data.splits)
    samples_per_epoch = samples["train"].samples_per_epoch
    if training.epochs is not None:
        yield f"{training.epochs:g} epochs of {samples_per_epoch:,} samples: {train_iters:,} iterations"
    elif training.train_samples is not None:
        yield f"{training.train_samples:,} samples, {samples_per_epoch:,} per epoch: {train_iters:,} iterations"
    if len(data.splits) > 1 or len(data.datasets()) > 1:
        yield from (_describe_split(data, split, samples[split]) for split in data.splits)
    for source in (source for split in data.splits for source in samples[split].sources):
        if isinstance(source, InstructionSamples):
            yield from _describe_conversations(data, source)


def describe_evaluation(
    run: RunConfig,
    checkpoint: Checkpoint,
    specs: Mapping[str, ParameterSpec],
    samples: Mapping[Split, MixedSamples],
) -> Iterator[str]:
    """Check the vocabularies of the datasets; yield what a user should know about the computation and the data.

    Raises:
        DataError: when the ids of a dataset stand for other tokens than the model's.
    """
    yield from _describe_compute(run, checkpoint, specs)
    yield from _check_vocabularies(run.data, checkpoint, samples)
    for split, opened in samples.items():
        yield _describe_split(run.data, split, opened)
        num_samples = num_evaluation_samples(run, opened)
        if num_samples < opened.samples_per_epoch:
            yield (
                f"evaluation.iters selects the first {num_samples:,} of these samples; "
                'evaluation.iters="all" takes them all'
            )


def _describe_compute(run: RunConfig, checkpoint: Checkpoint, specs: Mapping[str, ParameterSpec]) -> Iterator[str]:
    yield describe_kernels(run.kernels.chosen, is_compiled=run.kernels.compile)
    if imbalance := describe_imbalance(specs, run.parallel.tensor_parallel):
        yield imbalance
    context = checkpoint.manifest.config["max_position_embeddings"]
    if run.data.seq_length > context:
        yield f"data.seq_length {run.data.seq_length} is more than the {context} positions the model was made for"


def _describe_split(data: DataSection, split: Split, samples: MixedSamples) -> str:
    """Describe the datasets of a split in one line."""
    entries = data.datasets(split)
    total = sum(entry.weight for entry in entries)
    described: list[str] = []
    for entry, source in zip(entries, samples.sources, strict=True):
        share = f", {entry.weight / total:.2%} of the samples" if len(entries) > 1 else ""
        described.append(f"{entry.prefix} ({len(source):,} samples per epoch{share})")
    return f"to {_VERBS[split]} on: {'; '.join(described)}"


def _describe_conversations(data: DataSection, samples: InstructionSamples) -> Iterator[str]:
    """Describe how the conversations of a dataset fill its samples, and those left out."""
    prefix, length = samples.dataset.prefix, data.seq_length
    unit = "packed rows" if data.packing else "samples"
    yield (
        f"{prefix}: {samples.num_conversations:,} conversations in {len(samples):,} {unit}, {samples.fill:.1%} of "
        f"their {length} tokens filled"
    )
    if samples.num_overlong:
        action = "truncated" if data.overlong == "truncate" else "dropped"
        yield f"{prefix}: {samples.num_overlong:,} conversations of more than {length + 1} tokens are {action}"
    if samples.num_cut_short:
        yield (
            f"{prefix}: {samples.num_cut_short:,} conversations are left out, of whose first {length + 1} tokens none "
            "is the assistant's"
        )
    if samples.num_short:
        yield f"{prefix}: {samples.num_short:,} conversations of less than two tokens are dropped"


def _check_vocabularies(data: DataSection, checkpoint: Checkpoint, splits: Iterable[Split]) -> Iterator[str]:
    kind = DatasetDescription if data.kind == "text" else InstructionDescription
    for prefix in dict.fromkeys(data.prefixes(tuple(splits)).values()):
        if (description := kind.read(prefix)) is not None:
            yield from check_vocabulary(prefix, description, checkpoint, may_differ=data.other_vocabulary)


def check_vocabulary(
    prefix: Path, description: DatasetDescription | InstructionDescription, checkpoint: Checkpoint, *, may_differ: bool
) -> Iterator[str]:
    """Refuse a dataset whose ids stand for other tokens than in the checkpoint's tokenizer; yield what is unknown.

    The new tokens of the dataset are not compared: the checkpoint may carry the tokenizer without them.

    Args:
        prefix: The path of the dataset.
        description: The description of the dataset.
        checkpoint: The checkpoint of the model. One without a tokenizer has nothing to compare with.
        may_differ: Yield a note instead of refusing the dataset.

    Raises:
        DataError: says what to do.
    """
    if description.tokenizer_sha256 in checkpoint.manifest.tokenizer.values():
        return
    files = checkpoint.tokenizer_files()
    file = files.get("tokenizer.json") or files.get("tokenizer.model")
    if file is None:
        return
    if description.known_tokens_sha256 is None:
        yield (
            f"the dataset {prefix} was made with another tokenizer than the checkpoint carries, and does not say "
            f"whether its ids stand for the same tokens; tokenize with {file.parent} to be sure"
        )
        return
    num_known = min(description.new_tokens.values(), default=description.vocab_size)
    if digest_of_tokens(load_tokenizer(file).vocabulary(), num_known) == description.known_tokens_sha256:
        return
    problem = f"the ids of the dataset {prefix} stand for other tokens than those of {file}"
    if not may_differ:
        raise DataError(
            f"{problem}, which the checkpoint carries: tokenize with that one. If the model is to learn the other "
            "vocabulary, set data.other_vocabulary = true"
        )
    yield problem


# --- the agreement of all processes: a path may lead to another file on another machine


def require_agreement(
    checkpoint: Checkpoint, files: Mapping[str, Path], digests: Mapping[str, str], parallel: ParallelContext
) -> None:
    """Refuse to work where processes see different weights or data under the paths of the run. For all ranks.

    Args:
        checkpoint: The starting checkpoint; its weights are compared by the digests in its manifest.
        files: The datasets, by the key that names them.
        digests: The digest of each dataset, by its key.
        parallel: The place of this process.

    Raises:
        ConfigError: names what differs, and a rank that differs from rank 0.
    """
    if parallel.mesh is None:
        return
    own = {
        "megacore and torch": f"{version('megacore')}, {torch.__version__}",
        f"the weights in {checkpoint.path}": _weights_digest(checkpoint),
    } | {f"{key} {files[key]}": digest for key, digest in digests.items()}
    gathered: list[dict[str, str]] = [{} for _ in range(parallel.sizes.world)]
    dist.all_gather_object(gathered, own)
    for rank, theirs in enumerate(gathered):
        # Compared by position, since the paths in the names may differ between nodes.
        pairs = zip(gathered[0].items(), theirs.values(), strict=True)
        differing = [name for (name, expected), found in pairs if found != expected]
        if differing:
            raise ConfigError(
                f"rank {rank} does not see the same as rank 0 in {', '.join(differing)}: all processes must read the "
                "same weights and data, with the same software; put them on a file system that all share, or copy them"
            )


def _weights_digest(checkpoint: Checkpoint) -> str:
    manifest = checkpoint.manifest
    content: dict[str, Any] = {
        "family": manifest.family,
        "config": manifest.config,
        "files": {name: file.record.sha256 for name, file in manifest.files.items()},
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def dataset_digests(prefixes: Mapping[str, Path]) -> dict[str, str]:
    """Return a digest of each dataset: of the lengths of its two files, and of both their ends."""
    return {key: _dataset_digest(prefix) for key, prefix in prefixes.items()}


def _dataset_digest(prefix: Path) -> str:
    digest = hashlib.sha256()
    for suffix in (".idx", ".bin"):
        path = Path(f"{prefix}{suffix}")
        size = path.stat().st_size
        digest.update(size.to_bytes(8, "little"))
        with path.open("rb") as file:
            digest.update(file.read(_COMPARED_BYTES))
            file.seek(max(0, size - _COMPARED_BYTES))
            digest.update(file.read(_COMPARED_BYTES))
    return digest.hexdigest()
