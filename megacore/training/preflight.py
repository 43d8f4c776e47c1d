"""What is checked of a run, and told, before the model is loaded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megacore.atomic_output import require_absent
from megacore.checkpoint import Checkpoint
from megacore.checkpoint.training_record import TrainingRecord
from megacore.data import DatasetDescription, InstructionDescription, InstructionSamples, MixedSamples, Split
from megacore.errors import ConfigError
from megacore.model.kernels import describe_kernels
from megacore.parallel import describe_imbalance
from megacore.training.agreement import digest_of_dataset
from megacore.training.batches import open_samples
from megacore.training.checkpointing.final_model import is_result_of, kept_as
from megacore.training.config.run_config import RunConfig
from megacore.training.dataset_vocabulary import check_vocabulary
from megacore.training.evaluation.evaluator import num_samples_of
from megacore.training.instruction_batches import instruction_notes
from megacore.training.progress import Progress
from megacore.training.span import spans_of
from megacore.training.starting_point import StartingPoint, changes

VERBS: dict[Split, str] = {"train": "train", "valid": "validate", "test": "test"}
"""What is done on each split."""


def check_and_describe(run: RunConfig, start: StartingPoint, checkpoint: Checkpoint) -> list[str]:
    """Refuse a run that cannot go well with its data, its output or what it goes on from; what a person should know.

    Args:
        run: to be trained.
        start: where it begins.
        checkpoint: what is there, which fits the run's layout.

    Raises:
        ConfigError: the run is over, or would go on with other data.
        DataError: a dataset cannot be used.
        OutputError: the output exists.
    """
    samples = {split: open_samples(run, checkpoint, split) for split in run.data.splits}
    resumed = start.resumed(checkpoint)
    progress = Progress() if resumed is None else Progress.of(resumed, run.optimizer)
    train_iters = spans_of(run, samples["train"].samples_per_epoch, progress).train_iters
    told: list[str] = []
    if resumed is not None:
        told += _going_on(run, start, resumed, train_iters)
    out = run.output.checkpoint
    require_absent(kept_as(out) if resumed is not None and is_result_of(out, checkpoint) else out)
    told += _notes(run, checkpoint, run.data.splits)
    told += _describe_data(run, samples, train_iters)
    return told


def check_and_describe_evaluation(run: RunConfig, checkpoint: Checkpoint, splits: Sequence[Split]) -> list[str]:
    """Refuse to evaluate on data that cannot be used; what a person should know.

    Args:
        run: says how to evaluate.
        checkpoint: of the model.
        splits: to evaluate on.

    Raises:
        DataError: a dataset cannot be used.
    """
    told = list(_notes(run, checkpoint, splits))
    for split in splits:
        samples = open_samples(run, checkpoint, split)
        told.append(_describe_samples(run, split, samples))
        num_samples = num_samples_of(run, samples)
        if num_samples < samples.samples_per_epoch:
            told.append(
                f"the first {num_samples:,} of these samples are looked at, as evaluation.iters says; "
                'evaluation.iters="all" takes them all'
            )
    return told


def settings_to_agree_on(run: RunConfig, start: StartingPoint) -> dict[str, Any]:
    """What has to be the same on all nodes: each key of the run file but paths, which may differ in how they begin."""
    settings = {f"{section}.{key}": value for section, entries in run for key, value in entries}
    for key in ("data.prefix", "data.valid_prefix", "data.test_prefix"):
        if isinstance(settings[key], tuple):
            settings[key] = tuple(entry.weight for entry in settings[key])
    settings = {key: value for key, value in settings.items() if not isinstance(value, Path)}
    return settings | {"what the run begins with": start.told}


def _going_on(run: RunConfig, start: StartingPoint, training: TrainingRecord, train_iters: int) -> Iterator[str]:
    """Refuse to resume a run that is over, or with other data; what has changed."""
    out = run.output.checkpoint
    if training.iteration > train_iters or (training.iteration == train_iters and out.exists()):
        raise ConfigError(
            f"{start.path} is after iteration {training.iteration}, and the run is of {train_iters} iterations: it is "
            "over; make it longer to go on, with training.train_iters for example"
        )
    if training.iteration == train_iters and training.state["guard"]["is_over"]:
        raise ConfigError(
            f"{start.path} is after the last iteration, and the {training.state['guard']['num_in_a_row']} steps up to "
            "it were skipped: there is nothing to go on with. `megacore export` writes the weights as they were before "
            "these steps; or make the run longer, with training.train_iters for example"
        )
    yield f"going on after iteration {training.iteration}, from {start.path}"
    yield from changes(run, training, {key: digest_of_dataset(prefix) for key, prefix in run.data.files().items()})


def _notes(run: RunConfig, checkpoint: Checkpoint, splits: Sequence[Split]) -> Iterator[str]:
    """What a person should know before anything starts on ``splits``."""
    yield describe_kernels(run.kernels.chosen, is_compiled=run.kernels.compile)
    if imbalance := describe_imbalance(checkpoint.manifest.specs, run.parallel.tensor_parallel):
        yield imbalance
    kind = DatasetDescription if run.data.kind == "text" else InstructionDescription
    for prefix in dict.fromkeys(run.data.prefixes(splits).values()):
        if (description := kind.read(prefix)) is not None:
            yield from check_vocabulary(prefix, description, checkpoint, may_differ=run.data.other_vocabulary)
    context = checkpoint.manifest.config["max_position_embeddings"]
    if run.data.seq_length > context:
        yield f"data.seq_length {run.data.seq_length} is more than the {context} positions the model was made for"


def _describe_data(run: RunConfig, samples: dict[Split, MixedSamples], train_iters: int) -> Iterator[str]:
    """What the run works on, and for how long."""
    yield from _describe_length(run, samples["train"].samples_per_epoch, train_iters)
    if len(samples) > 1 or len(run.data.datasets()) > 1:
        yield from (_describe_samples(run, split, samples[split]) for split in samples)
    for source in (source for of_split in samples.values() for source in of_split.sources):
        if isinstance(source, InstructionSamples):
            yield from instruction_notes(run, source)


def _describe_length(run: RunConfig, samples_per_epoch: int, train_iters: int) -> Iterator[str]:
    """How many iterations the run takes, where the run file says it in another way."""
    training = run.training
    if training.epochs is not None:
        told = f"{training.epochs:g} epochs of {samples_per_epoch:,} samples"
    elif training.train_samples is not None:
        told = f"{training.train_samples:,} samples, of {samples_per_epoch:,} an epoch"
    else:
        return
    yield f"{told}: {train_iters:,} iterations"


def _describe_samples(run: RunConfig, split: Split, samples: MixedSamples) -> str:
    """What a split is taken from, in a line."""
    entries = run.data.datasets(split)
    total = sum(entry.weight for entry in entries)
    told: list[str] = []
    for entry, source in zip(entries, samples.sources, strict=True):
        share = f", {entry.weight / total:.2%} of the samples" if len(entries) > 1 else ""
        told.append(f"{entry.prefix} ({len(source):,} samples an epoch{share})")
    return f"to {VERBS[split]} on: {'; '.join(told)}"
