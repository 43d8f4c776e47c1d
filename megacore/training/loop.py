"""The training loop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from megacore.checkpoint import Checkpoint
from megacore.checkpoint.staging import require_absent
from megacore.data import DatasetDescription, InstructionDescription, InstructionSamples, MixedSamples, Split
from megacore.errors import ConfigError, LayoutError, MegacoreError, TrainingError
from megacore.model import model_specs, read_config
from megacore.model.kernels import describe_kernels
from megacore.parallel import (
    ONE_NODE,
    Nodes,
    ParallelContext,
    ParallelSizes,
    Stage,
    StopRequest,
    check_tensor_parallel,
    describe_imbalance,
    is_first_process,
    launched_environment,
    on_ranks,
    stop_requests,
)
from megacore.plugins import get_family
from megacore.training.agreement import digest_of_dataset, require_agreement
from megacore.training.batches import batches, open_samples
from megacore.training.checkpoints import RunCheckpoints, run_id_of
from megacore.training.engine import HELD_IN, Engine
from megacore.training.instruction_batches import instruction_notes
from megacore.training.plan import check_run, pipeline_stages
from megacore.training.prefetch import prefetched
from megacore.training.progress import Progress
from megacore.training.run_config import RunConfig, read_run_config
from megacore.training.saving import is_result_of, keep_earlier_result, reserve_output, save_stages
from megacore.training.schedule import learning_rate
from megacore.training.starting_point import Resume, StartingPoint, changes, offering_the_one_before
from megacore.training.step_guard import StepGuard

VERBS: dict[Split, str] = {"train": "train", "valid": "validate", "test": "test"}
"""What is done on each split."""


@dataclass(frozen=True)
class Step:
    """One optimizer step.

    Attributes:
        iteration: from 1.
        train_iters: of the whole run.
        loss: mean over the tokens of the global batch, in nats, before the step.
        lr: that the step was taken with.
        grad_norm: before clipping.
        tokens_per_second: of the whole step, all ranks together.
        loss_scale: in fp16, the factor on the loss of the next step.
        num_skipped: steps up to this one that were not taken, since loss or gradient were not finite, or a spike.
        stopped_by: the signal for which the run ends with this step.
        notes: what happened beside the step that a person should know.
    """

    iteration: int
    train_iters: int
    loss: float
    lr: float
    grad_norm: float
    tokens_per_second: float
    loss_scale: float | None = None
    num_skipped: int = 0
    stopped_by: str | None = None
    notes: tuple[str, ...] = ()


def train(
    run: RunConfig | Path | str,
    *,
    resume: Resume = False,
    load: Path | str | None = None,
    nodes: Nodes = ONE_NODE,
    on_note: Callable[[str], None] | None = None,
    on_step: Callable[[Step], None] | None = None,
) -> list[Step]:
    """Train as ``run`` says and save a native checkpoint at the end. Starts the processes that it needs.

    A script that trains on several must guard the call with ``if __name__ == "__main__":``, since each imports it.

    On SIGTERM or SIGINT the step is finished, a training checkpoint saved, and the steps up to there returned; a second
    signal ends the process.

    Args:
        run: a run file, or what :func:`~megacore.training.run_config.read_run_config` made of one.
        resume: go on from the newest checkpoint of the run, ``"auto"``: if there is one.
        load: a native checkpoint to start from instead of ``model.checkpoint``; or a training checkpoint, or a
            directory of them, to go on from.
        nodes: those that the run is spread over; this is called on each of them, and reads and writes the same files.
        on_note: is told what a person should know at the start.
        on_step: is told of each step as it is done; a function of a module, since another process calls it.

    Raises:
        MegacoreError: in one of its kinds; what can be checked is checked before the model is loaded.
        TrainingError: when too many steps in a row were skipped. A training checkpoint is saved.
    """
    if not isinstance(run, RunConfig):
        run = read_run_config(Path(run))
    start = StartingPoint.of(run, resume=resume, load=None if load is None else Path(load))
    if start.path == run.model.checkpoint and not start.path.is_dir():
        raise ConfigError(
            f"model.checkpoint: {run.model.checkpoint} is not a directory (paths in a run file are relative to the "
            "directory that the command is started in)"
        )
    with offering_the_one_before(start.path):
        checkpoint = Checkpoint(start.path)
    family = get_family(checkpoint.manifest.family)
    config = read_config(family, checkpoint)
    specs = model_specs(config, family.build_layer)
    check_tensor_parallel(specs, run.parallel.tensor_parallel)
    sizes = parallel_sizes(run, nodes)
    check_run(run, config, specs, dp_size=sizes.dp)
    told_of_start = list(_check_start(run, start, checkpoint))
    if not (start.is_resumed and is_result_of(run.output.checkpoint, checkpoint)):
        require_absent(run.output.checkpoint)
    told_of_data = [*told_of_start, *_check_data(run, checkpoint)]
    if on_note and is_first_process(nodes):
        if sizes.world > 1:
            on_note(_describe_layout(run, sizes, pipeline_stages(run, config, specs)))
        for note in (*_notes(run, checkpoint), *told_of_data):
            on_note(note)
    if on_note and nodes.count > 1:
        on_note(f"node {nodes.rank} of {nodes.count} meets the others at {nodes.address}:{nodes.port}")
    return on_ranks(
        _train_on_rank,
        run,
        on_step,
        start,
        sizes=sizes,
        nodes=nodes,
        timeout=timedelta(seconds=run.parallel.timeout),
        settings=_settings(run) | {"what the run begins with": start.told},
        on_note=on_note,
    )


def parallel_sizes(run: RunConfig, nodes: Nodes = ONE_NODE) -> ParallelSizes:
    """How the processes of the run are laid out: those that torchrun or srun started, or those that it starts itself.

    Raises:
        LayoutError: when tensor and pipeline parallelism do not fit their number.
    """
    section, num_gpus = run.parallel, torch.cuda.device_count()
    model_size = section.tensor_parallel * section.pipeline_parallel
    if num_gpus and (section.nproc_per_node or 0) > num_gpus:
        raise LayoutError(f"parallel.nproc_per_node is {section.nproc_per_node}, and this node has {num_gpus} GPUs")
    if launched := launched_environment(nodes):
        world, here = int(launched["WORLD_SIZE"]), int(launched["LOCAL_WORLD_SIZE"])
        if section.nproc_per_node not in (None, here):
            raise LayoutError(
                f"parallel.nproc_per_node is {section.nproc_per_node}, and {here} processes were started on this node: "
                "leave it out where megacore does not start them itself"
            )
        if here > num_gpus > 1:  # one GPU may be all that srun shows each of several processes
            raise LayoutError(f"{here} processes were started on this node, which has {num_gpus} GPUs")
    elif on_each_node := section.nproc_per_node or num_gpus:
        world = on_each_node * nodes.count
    elif model_size % nodes.count == 0:
        world = model_size
    else:
        raise LayoutError(
            f"tp {section.tensor_parallel} × pp {section.pipeline_parallel} takes {model_size} "
            f"{'process' if model_size == 1 else 'processes'}, which {nodes.count} nodes cannot share equally: say how "
            "many each of them starts, with --nproc-per-node or parallel.nproc_per_node"
        )
    return ParallelSizes.of_world(
        world,
        tp=section.tensor_parallel,
        pp=section.pipeline_parallel,
        dp_shard={"replicated": 1, "sharded": None, "hybrid": section.shard_size}[section.data_parallel],
        sequence_parallel=section.sequence_parallel,
    )


def _settings(run: RunConfig) -> dict[str, Any]:
    """What has to be the same on all nodes: each key of the run file but paths, which may differ in how they begin."""
    settings = {f"{section}.{key}": value for section, entries in run for key, value in entries}
    for key in ("data.prefix", "data.valid_prefix", "data.test_prefix"):
        if isinstance(settings[key], tuple):
            settings[key] = tuple(entry.weight for entry in settings[key])
    return {key: value for key, value in settings.items() if not isinstance(value, Path)}


def _describe_layout(run: RunConfig, sizes: ParallelSizes, stages: Sequence[Stage]) -> str:
    """How the work is spread, in a line."""
    told = f"{sizes.world} processes: {sizes}"
    if sizes.dp > 1:
        told += f", {run.parallel.data_parallel}"
    if len(stages) > 1:
        layers = " + ".join(str(len(stage.layers)) for stage in stages)
        told += f"; {run.parallel.pipeline_schedule} on stages of {layers} layers"
    return told


def _notes(run: RunConfig, checkpoint: Checkpoint) -> Iterator[str]:
    """What a person should know before the run starts."""
    yield describe_kernels(run.kernels.chosen, is_compiled=run.kernels.compile)
    if imbalance := describe_imbalance(checkpoint.manifest.specs, run.parallel.tensor_parallel):
        yield imbalance
    tokenizer = checkpoint.manifest.tokenizer
    kind = DatasetDescription if run.data.kind == "text" else InstructionDescription
    for prefix in dict.fromkeys(run.data.prefixes().values()):
        description = kind.read(prefix)
        if description is not None and tokenizer and description.tokenizer_sha256 not in tokenizer.values():
            yield f"the dataset {prefix} was made with another tokenizer than the checkpoint carries"
    context = checkpoint.manifest.config["max_position_embeddings"]
    if run.data.seq_length > context:
        yield f"data.seq_length {run.data.seq_length} is more than the {context} positions the model was made for"


def _check_data(run: RunConfig, checkpoint: Checkpoint) -> Iterator[str]:
    """Open what the run works on, which is refused if it cannot be used; yield what a person should know of it."""
    samples = {split: open_samples(run, checkpoint, split) for split in run.data.splits}
    if len(samples) > 1 or len(run.data.datasets()) > 1:
        yield from (_describe_samples(run, split, samples[split]) for split in samples)
    for source in (source for of_split in samples.values() for source in of_split.sources):
        if isinstance(source, InstructionSamples):
            yield from instruction_notes(run, source)


def _describe_samples(run: RunConfig, split: Split, samples: MixedSamples) -> str:
    """What a split is taken from, in a line."""
    entries = run.data.datasets(split)
    total = sum(entry.weight for entry in entries)
    told = []
    for entry, source in zip(entries, samples.sources, strict=True):
        share = f", {entry.weight / total:.2%} of the samples" if len(entries) > 1 else ""
        told.append(f"{entry.prefix} ({len(source):,} samples an epoch{share})")
    return f"to {VERBS[split]} on: {'; '.join(told)}"


def _check_start(run: RunConfig, start: StartingPoint, checkpoint: Checkpoint) -> Iterator[str]:
    """Refuse to resume a run that is over, or with other data; yield what a person should know of it."""
    training = checkpoint.manifest.training
    if not start.is_resumed or training is None:
        return
    out, train_iters = run.output.checkpoint, run.training.train_iters
    if training.iteration > train_iters or (training.iteration == train_iters and out.exists()):
        raise ConfigError(
            f"{start.path} is after iteration {training.iteration}, and training.train_iters is {train_iters}: the run "
            "is over; raise training.train_iters to go on"
        )
    yield f"going on after iteration {training.iteration}, from {start.path}"
    yield from changes(run, training, {key: digest_of_dataset(prefix) for key, prefix in run.data.files().items()})


class _StoppedEarlyError(Exception):
    """The run was stopped before its end: its output is not to be published."""


def _train_on_rank(
    parallel: ParallelContext,
    run: RunConfig,
    on_step: Callable[[Step], None] | None,
    start: StartingPoint | None = None,
) -> list[Step]:
    start = start or StartingPoint(run.model.checkpoint)
    checkpoint = Checkpoint(start.path)
    require_agreement(checkpoint, run.data.files(), parallel)
    held = HELD_IN[run.model.dtype]
    num_bytes = sum(math.prod(spec.shape) for spec in checkpoint.manifest.specs.values()) * held.itemsize
    if start.is_resumed and parallel.rank == 0:
        keep_earlier_result(run.output.checkpoint, checkpoint)
    steps: list[Step] = []
    final_error: MegacoreError | None = None
    with (
        suppress(_StoppedEarlyError),
        reserve_output(run.output.checkpoint, parallel, started_from=checkpoint, num_bytes=num_bytes) as output,
    ):
        with offering_the_one_before(start.path):
            engine = Engine(run, checkpoint, parallel)
        guard = StepGuard(run.faults)
        saved = RunCheckpoints(
            engine,
            guard,
            checkpoint,
            run_id=run_id_of(checkpoint if start.is_resumed else None, parallel),
            datasets={key: digest_of_dataset(prefix) for key, prefix in run.data.files().items()},
            output=output,
        )
        with saved.opened(), stop_requests(told=parallel.rank == 0) as stop:
            progress = saved.restore(checkpoint) if start.is_resumed else Progress()
            for step in _steps(engine, checkpoint, progress, guard, stop):
                is_last = step.iteration == run.training.train_iters
                if saved.is_due(step.iteration) and not is_last:
                    saved.save(progress, waits=False)
                steps.append(replace(step, notes=(*step.notes, *saved.notes())))
                if on_step is not None and parallel.rank == 0:
                    on_step(steps[-1])
                if guard.is_over:
                    kept = saved.save(progress, waits=True)
                    raise TrainingError(
                        f"iteration {step.iteration}: the loss is {step.loss} and the norm of the gradient "
                        f"{step.grad_norm}; so {guard.num_in_a_row} steps in a row were skipped. A lower optimizer.lr "
                        f"may help. The weights as they were before these steps are in {kept}"
                    )
                if step.stopped_by is not None and not is_last:
                    saved.save(progress, waits=True)
                    raise _StoppedEarlyError
            details = {"iterations": run.training.train_iters, "dtype": run.model.dtype, "run_id": saved.run_id}
            save_stages(output, engine.stages, engine.all_stages, parallel, started_from=checkpoint, details=details)
            final_error = saved.save_last(progress)
    if final_error is not None:
        raise final_error
    return steps


def _steps(
    engine: Engine, checkpoint: Checkpoint, progress: Progress, guard: StepGuard, stop: StopRequest
) -> Iterator[Step]:
    """Take the steps of the run that ``progress`` has left, one at a time, and keep it up to date; fewer on request."""
    run, parallel = engine.run, engine.parallel
    train_iters = run.training.train_iters
    num_tokens = run.training.global_batch_size * run.data.seq_length
    own_batches = batches(
        run,
        checkpoint,
        first_iteration=progress.iteration,
        dp_rank=parallel.dp_rank,
        dp_size=parallel.dp_size,
    )
    for iteration, batch in enumerate(prefetched(own_batches, run.data.prefetch), start=progress.iteration + 1):
        started = time.perf_counter()
        lr = learning_rate(iteration, optimizer=run.optimizer, train_iters=train_iters)
        can_lower_scale = engine.loss_scale is not None and not engine.loss_scale.is_at_minimum
        result = engine.step(batch, lr=lr, accepts=guard.accepts, wants_stop=lambda: stop.signal is not None)
        guard.saw(result, lowers_scale=can_lower_scale and not result.is_finite)
        progress.iteration = iteration
        progress.num_samples += run.training.global_batch_size
        yield Step(
            iteration,
            train_iters,
            result.loss,
            lr,
            result.grad_norm,
            num_tokens / (time.perf_counter() - started),
            engine.loss_scale.factor if engine.loss_scale else None,
            guard.num_skipped,
            stopped_by=_stopped_by(stop) if result.is_to_stop else None,
        )


def _stopped_by(stop: StopRequest) -> str:
    return "a signal to another rank" if stop.signal is None else stop.signal.name
