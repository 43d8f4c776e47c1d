"""The training loop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from megacore.checkpoint import Checkpoint
from megacore.checkpoint.staging import require_absent
from megacore.data import DatasetDescription, InstructionDescription, InstructionSamples, MixedSamples, Split
from megacore.errors import ConfigError, LayoutError, TrainingError
from megacore.model import model_specs, read_config
from megacore.model.kernels import describe_kernels
from megacore.parallel import (
    ONE_NODE,
    Nodes,
    ParallelContext,
    ParallelSizes,
    Stage,
    check_tensor_parallel,
    describe_imbalance,
    is_first_process,
    launched_environment,
    on_ranks,
)
from megacore.plugins import get_family
from megacore.training.agreement import require_agreement
from megacore.training.batches import batches, open_samples
from megacore.training.engine import COMPUTED_IN, HELD_IN, Engine
from megacore.training.evaluation import Evaluation, Evaluator
from megacore.training.exits import Exits
from megacore.training.instruction_batches import instruction_notes
from megacore.training.peak import measured_peak
from megacore.training.plan import check_run, model_specs_of, pipeline_stages
from megacore.training.prefetch import prefetched
from megacore.training.progress import Progress
from megacore.training.run_config import RunConfig, read_run_config
from megacore.training.run_log import check_run_log, is_watched, opened_log
from megacore.training.saving import reserve_output, save_stages
from megacore.training.schedule import learning_rate, weight_decay
from megacore.training.span import spans_of
from megacore.training.start import open_start
from megacore.training.work import ModelFlops, work_of_step

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
        tokens_per_second: that were computed, padding among them, all ranks together, in the whole step, which begins
            with waiting for its batch.
        loss_scale: in fp16, the factor on the loss of the next step.
        num_skipped: steps up to this one that were not taken, since gradients overflowed in fp16.
        batch_size: samples of the global batch.
        is_taken: whether the weights changed; not in ``training.skip_iters``, nor when gradients overflowed.
        num_tokens: that were computed.
        seconds: that the step took.
        flops_per_second: that the model takes for these tokens; see :class:`~megacore.training.work.ModelFlops`.
        peak_flops_per_second: that all ranks were measured to reach together; ``None`` where that was not done.
    """

    iteration: int
    train_iters: int
    loss: float
    lr: float
    grad_norm: float
    tokens_per_second: float
    loss_scale: float | None = None
    num_skipped: int = 0
    batch_size: int = 1
    is_taken: bool = True
    num_tokens: int = 0
    seconds: float = 0.0
    flops_per_second: float = 0.0
    peak_flops_per_second: float | None = None


def train(
    run: RunConfig | Path | str,
    *,
    nodes: Nodes = ONE_NODE,
    on_note: Callable[[str], None] | None = None,
    on_step: Callable[[Step], None] | None = None,
    on_evaluation: Callable[[Evaluation], None] | None = None,
    on_stop: Callable[[str], None] | None = None,
) -> list[Step]:
    """Train as ``run`` says and save a native checkpoint at the end. Starts the processes that it needs.

    A script that trains on several must guard the call with ``if __name__ == "__main__":``, since each imports it.

    Args:
        run: a run file, or what :func:`~megacore.training.run_config.read_run_config` made of one.
        nodes: those that the run is spread over; this is called on each of them, and reads and writes the same files.
        on_note: is told what a person should know at the start.
        on_step: is told of each step as it is done; a function of a module, since another process calls it. If it is a
            context manager too, that process enters it for as long as steps are taken.
        on_evaluation: likewise, of each evaluation.
        on_stop: likewise, of why the run ends early, if it does.

    Raises:
        MegacoreError: in one of its kinds; what can be checked is checked before the model is loaded.
        TrainingError: when the loss or the gradient is no longer finite. Nothing is saved.
    """
    if not isinstance(run, RunConfig):
        run = read_run_config(Path(run))
    if not run.model.checkpoint.is_dir():
        raise ConfigError(
            f"model.checkpoint: {run.model.checkpoint} is not a directory (paths in a run file are relative to the "
            "directory that the command is started in)"
        )
    checkpoint = open_start(run)
    family = get_family(checkpoint.manifest.family)
    config = read_config(family, checkpoint)
    specs = model_specs(config, family.build_layer)
    check_tensor_parallel(specs, run.parallel.tensor_parallel)
    sizes = parallel_sizes(run, nodes)
    check_run(run, config, specs, dp_size=sizes.dp)
    require_absent(run.output.checkpoint)
    if is_first_process(nodes):
        check_run_log(run)
    told_of_data = list(_check_data(run, checkpoint))
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
        on_evaluation,
        on_stop,
        sizes=sizes,
        nodes=nodes,
        timeout=timedelta(seconds=run.parallel.timeout),
        settings=_settings(run),
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
    yield from _describe_length(run, samples["train"].samples_per_epoch)
    if len(samples) > 1 or len(run.data.datasets()) > 1:
        yield from (_describe_samples(run, split, samples[split]) for split in samples)
    for source in (source for of_split in samples.values() for source in of_split.sources):
        if isinstance(source, InstructionSamples):
            yield from instruction_notes(run, source)


def _describe_length(run: RunConfig, samples_per_epoch: int) -> Iterator[str]:
    """How many iterations the run takes, where the run file says it in another way."""
    spans, training = spans_of(run, samples_per_epoch), run.training
    if training.epochs is not None:
        told = f"{training.epochs:g} epochs of {samples_per_epoch:,} samples"
    elif training.train_samples is not None:
        told = f"{training.train_samples:,} samples, of {samples_per_epoch:,} an epoch"
    else:
        return
    yield f"{told}: {spans.train_iters:,} iterations"


def _describe_samples(run: RunConfig, split: Split, samples: MixedSamples) -> str:
    """What a split is taken from, in a line."""
    entries = run.data.datasets(split)
    total = sum(entry.weight for entry in entries)
    told = []
    for entry, source in zip(entries, samples.sources, strict=True):
        share = f", {entry.weight / total:.2%} of the samples" if len(entries) > 1 else ""
        told.append(f"{entry.prefix} ({len(source):,} samples an epoch{share})")
    return f"to {VERBS[split]} on: {'; '.join(told)}"


def _train_on_rank(
    parallel: ParallelContext,
    run: RunConfig,
    on_step: Callable[[Step], None] | None,
    on_evaluation: Callable[[Evaluation], None] | None = None,
    on_stop: Callable[[str], None] | None = None,
) -> list[Step]:
    exits = Exits(run.training, parallel)
    checkpoint = open_start(run)
    require_agreement(checkpoint, run.data.files(), parallel)
    held = HELD_IN[run.model.dtype]
    num_bytes = sum(math.prod(spec.shape) for spec in checkpoint.manifest.specs.values()) * held.itemsize
    with reserve_output(run.output.checkpoint, parallel, started_from=checkpoint, num_bytes=num_bytes) as output:
        progress = Progress()
        peak = None
        if run.logging.measure_peak and (on_step is not None or is_watched(run)):
            peak = measured_peak(parallel, COMPUTED_IN[run.model.dtype])
        engine = Engine(run, checkpoint, parallel)
        evaluator = Evaluator(engine, checkpoint)
        steps: list[Step] = []
        reason = None
        with opened_log(run, parallel, iteration=progress.iteration) as log, ExitStack() as shown:
            if on_step is not None and parallel.rank == 0 and isinstance(on_step, AbstractContextManager):
                shown.enter_context(on_step)

            def evaluate(split: Split) -> None:
                if split in run.data.splits:
                    evaluation = evaluator.evaluate(split, iteration=progress.iteration)
                    log.evaluation(evaluation)
                    if on_evaluation is not None and parallel.rank == 0:
                        on_evaluation(evaluation)

            for step in _steps(engine, checkpoint, progress, peak):
                steps.append(step)
                log.step(step)
                if on_step is not None and parallel.rank == 0:
                    on_step(step)
                is_last = step.iteration == step.train_iters
                if is_last or step.iteration % run.evaluation.interval == 0:
                    evaluate("valid")
                if is_last:
                    evaluate("test")
                elif reason := exits.reason(progress):
                    break
            if reason is not None and on_stop is not None and parallel.rank == 0:
                on_stop(f"iteration {progress.iteration}: {reason}")
        details = {"iterations": progress.iteration, "dtype": run.model.dtype}
        save_stages(output, engine.stages, engine.all_stages, parallel, started_from=checkpoint, details=details)
    return steps


def _steps(
    engine: Engine, checkpoint: Checkpoint, progress: Progress, peak_flops_per_second: float | None = None
) -> Iterator[Step]:
    """Take the steps of the run that ``progress`` has left, one at a time, and keep it up to date."""
    run, parallel = engine.run, engine.parallel
    spans = spans_of(run, open_samples(run, checkpoint).samples_per_epoch, progress)
    model_flops = ModelFlops.of(engine.stages[0].config, model_specs_of(checkpoint))
    own_batches = batches(
        run, checkpoint, progress=replace(progress), dp_rank=parallel.dp_rank, dp_size=parallel.dp_size
    )
    started = time.perf_counter()
    for iteration, batch in enumerate(prefetched(own_batches, run.data.prefetch), start=progress.iteration + 1):
        batch_size = run.training.batch_sizes.at(progress.num_samples)
        lr = learning_rate(iteration, optimizer=run.optimizer, spans=spans)
        can_skip = engine.loss_scale is not None and not engine.loss_scale.is_at_minimum
        result = engine.step(
            batch,
            lr=lr,
            weight_decay=weight_decay(iteration, optimizer=run.optimizer, spans=spans),
            is_skipped=iteration in run.training.skip_iters,
        )
        work = work_of_step(batch, model_flops, run, parallel)
        seconds = time.perf_counter() - started
        if not result.is_taken and not can_skip and iteration not in run.training.skip_iters:
            raise TrainingError(
                f"iteration {iteration}: the loss is {result.loss} and the norm of the gradient {result.grad_norm}; a "
                "lower optimizer.lr may help. Nothing was saved"
            )
        progress.iteration = iteration
        progress.num_samples += batch_size
        yield Step(
            iteration,
            spans.train_iters,
            result.loss,
            lr,
            result.grad_norm,
            work.num_tokens / seconds,
            engine.loss_scale.factor if engine.loss_scale else None,
            engine.loss_scale.num_skipped if engine.loss_scale else 0,
            batch_size=batch_size,
            is_taken=result.is_taken,
            num_tokens=work.num_tokens,
            seconds=seconds,
            flops_per_second=work.flops / seconds,
            peak_flops_per_second=peak_flops_per_second,
        )
        started = time.perf_counter()  # what is done between two steps is no part of either
