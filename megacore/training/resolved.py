"""Everything that a run file amounts to: :class:`ResolvedRun`, computed once per process.

Processes that the command starts receive it from the one that resolved it, and do not compute it again.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

from megacore.checkpoint import Checkpoint
from megacore.config import ModelConfig
from megacore.data import Split
from megacore.errors import ConfigError, LayoutError
from megacore.model import model_specs, read_config
from megacore.parallel import (
    ONE_NODE,
    Nodes,
    ParallelSizes,
    ParameterSpec,
    Stage,
    balanced_stages,
    check_tensor_parallel,
    launched_environment,
    stages_from_counts,
)
from megacore.plugins import get_family
from megacore.training.batches import SplitSamples
from megacore.training.checkpointing.directory import CheckpointDirectory
from megacore.training.config import ParallelSection, RunConfig
from megacore.training.preflight import (
    check_compute,
    check_outputs,
    check_resume,
    dataset_digests,
    describe_evaluation,
    describe_training,
)
from megacore.training.schedule import START, Progress, Spans, resolve_spans
from megacore.training.starting_point import Resume, StartingPoint, find_starting_point, open_start


@dataclass(frozen=True, kw_only=True)
class ResolvedRun:
    """A run file, resolved against its checkpoint, its data and the processes at hand.

    It is cheap to pickle: the checkpoint has no open files, and a copy opens its own samples.

    Attributes:
        run: The run file.
        start: The checkpoint that the run starts from, with the model configuration that the run file asks for.
        config: The configuration of the model.
        specs: The parameters of the whole model, by name.
        frozen: The names of the parameters that are not trained.
        sizes: The sizes of the kinds of parallelism.
        stages: The pipeline stages of the whole model.
        samples: The samples of each split.
        dataset_digests: A digest of each dataset, by the key that names it.
        progress: Progress of the run at its start.
        spans: The lengths of the run and its schedules; ``None`` for an evaluation without training.
        notes: Notes for the user before the run starts, one line each.
    """

    run: RunConfig
    start: StartingPoint
    config: ModelConfig
    specs: Mapping[str, ParameterSpec]
    frozen: frozenset[str]
    sizes: ParallelSizes
    stages: list[Stage]
    samples: SplitSamples
    dataset_digests: Mapping[str, str]
    progress: Progress = START
    spans: Spans | None = None
    notes: tuple[str, ...] = ()

    @property
    def checkpoint(self) -> Checkpoint:
        """The checkpoint that the run starts from."""
        return self.start.checkpoint

    @property
    def num_bytes(self) -> int:
        """The size of the trained weights."""
        return sum(math.prod(spec.shape) for spec in self.specs.values()) * self.run.model.param_dtype.itemsize

    @property
    def shared_settings(self) -> dict[str, Any]:
        """The settings that must be the same on all nodes: all keys but paths, which may differ in their beginnings."""
        settings = {f"{section}.{key}": value for section, entries in self.run for key, value in entries}
        for key in ("data.prefix", "data.valid_prefix", "data.test_prefix"):
            if isinstance(settings[key], tuple):
                settings[key] = tuple(entry.weight for entry in settings[key])
        settings = {key: value for key, value in settings.items() if not isinstance(value, Path)}
        return settings | {"starting checkpoint": self.start.description}


def resolve_run(
    run: RunConfig, *, resume: Resume = False, load: Path | None = None, nodes: Nodes = ONE_NODE
) -> ResolvedRun:
    """Resolve a run that trains, and check all that can be checked before the model is loaded.

    Args:
        run: The run file.
        resume: As in :func:`megacore.training.train`.
        load: As in :func:`megacore.training.train`.
        nodes: The nodes that the run is spread over.

    Raises:
        MegacoreError: in one of its kinds, when the run cannot work with its checkpoint, its data or these processes.
    """
    start = find_starting_point(run, resume=resume, load=load)
    config, specs, sizes, stages = _resolve_model(run, start.checkpoint, nodes)
    check_outputs(run, start, nodes)
    samples = SplitSamples(run, start.checkpoint)
    samples_per_epoch = {split: samples[split].samples_per_epoch for split in run.data.splits}
    digests = dataset_digests(run.data.files())
    progress = START if start.record is None else Progress.from_record(start.record, run.optimizer)
    spans = resolve_spans(run, samples_per_epoch["train"], progress)
    notes = [
        *_describe_layout(run.parallel, sizes, stages),
        *check_resume(run, start, digests, train_iters=spans.train_iters),
        *describe_training(run, start.checkpoint, specs, samples, train_iters=spans.train_iters),
    ]
    return ResolvedRun(
        run=run,
        start=start,
        config=config,
        specs=specs,
        frozen=frozen_names(run.training.freeze, specs),
        sizes=sizes,
        stages=stages,
        samples=samples,
        dataset_digests=digests,
        progress=replace(progress, warmup_iters=spans.warmup_iters),
        spans=spans,
        notes=tuple(notes),
    )


def resolve_evaluation(run: RunConfig, *, load: Path | None = None, nodes: Nodes = ONE_NODE) -> ResolvedRun:
    """Resolve the evaluation of a model on the validation and test data of a run.

    Args:
        run: The run file.
        load: As in :func:`megacore.training.evaluate`.
        nodes: The nodes that the work is spread over.

    Raises:
        ConfigError: when the run file names no data to evaluate on.
        MegacoreError: in one of its kinds, when the run cannot work with its checkpoint, its data or these processes.
    """
    splits: list[Split] = [split for split in run.data.splits if split != "train"]
    if not splits:
        raise ConfigError(
            "there is nothing to evaluate on: name it with data.valid_prefix or data.test_prefix, or give data.split"
        )
    path = run.model.checkpoint if load is None else CheckpointDirectory(load).newest() or load
    start = StartingPoint(open_start(path, run.model))
    config, specs, sizes, stages = _resolve_model(run, start.checkpoint, nodes)
    samples = SplitSamples(run, start.checkpoint)
    notes = [
        *_describe_layout(run.parallel, sizes, stages),
        *describe_evaluation(run, start.checkpoint, specs, {split: samples[split] for split in splits}),
    ]
    return ResolvedRun(
        run=run,
        start=start,
        config=config,
        specs=specs,
        frozen=frozen_names(run.training.freeze, specs),
        sizes=sizes,
        stages=stages,
        samples=samples,
        dataset_digests=dataset_digests(run.data.files(splits)),
        notes=tuple(notes),
    )


def _resolve_model(
    run: RunConfig, checkpoint: Checkpoint, nodes: Nodes
) -> tuple[ModelConfig, dict[str, ParameterSpec], ParallelSizes, list[Stage]]:
    """Resolve the model of ``checkpoint`` and how its processes share it, and check that the run can compute it."""
    family = get_family(checkpoint.manifest.family)
    config = read_config(family, checkpoint)
    specs = model_specs(config, family.build_layer)
    check_tensor_parallel(specs, run.parallel.tensor_parallel)
    sizes = parallel_sizes(run.parallel, nodes)
    check_compute(run, config, specs, dp_size=sizes.dp)
    stages = pipeline_stages(run.parallel, config, specs)
    return config, specs, sizes, stages


def parallel_sizes(parallel: ParallelSection, nodes: Nodes = ONE_NODE) -> ParallelSizes:
    """Return the sizes of the kinds of parallelism, for the processes started by torchrun or srun, or to be started.

    Raises:
        LayoutError: when tensor and pipeline parallelism do not fit their number.
    """
    num_gpus = torch.cuda.device_count()
    model_size = parallel.tensor_parallel * parallel.pipeline_parallel
    if num_gpus and (parallel.nproc_per_node or 0) > num_gpus:
        raise LayoutError(f"parallel.nproc_per_node is {parallel.nproc_per_node}, and this node has {num_gpus} GPUs")
    if launched := launched_environment(nodes):
        world, here = int(launched["WORLD_SIZE"]), int(launched["LOCAL_WORLD_SIZE"])
        if parallel.nproc_per_node not in (None, here):
            raise LayoutError(
                f"parallel.nproc_per_node is {parallel.nproc_per_node}, and {here} processes were started on this "
                "node: leave it out where megacore does not start them itself"
            )
        if here > num_gpus > 1:  # one GPU may be all that srun shows each of several processes
            raise LayoutError(f"{here} processes were started on this node, which has {num_gpus} GPUs")
    elif on_each_node := parallel.nproc_per_node or num_gpus:
        world = on_each_node * nodes.count
    elif model_size % nodes.count == 0:
        world = model_size
    else:
        raise LayoutError(
            f"tp {parallel.tensor_parallel} × pp {parallel.pipeline_parallel} takes {model_size} "
            f"{'process' if model_size == 1 else 'processes'}, which {nodes.count} nodes cannot share equally: say how "
            "many each of them starts, with --nproc-per-node or parallel.nproc_per_node"
        )
    return ParallelSizes.of_world(
        world,
        tp=parallel.tensor_parallel,
        pp=parallel.pipeline_parallel,
        dp_shard={"replicated": 1, "sharded": None, "hybrid": parallel.shard_size}[parallel.data_parallel],
        sequence_parallel=parallel.sequence_parallel,
    )


def pipeline_stages(parallel: ParallelSection, config: ModelConfig, specs: Mapping[str, ParameterSpec]) -> list[Stage]:
    """Return the pipeline stages of the whole model.

    Raises:
        LayoutError: when there are more stages than layers, or the given stages do not add up to the model.
    """
    counts = parallel.layers_per_stage
    if counts is not None:
        if sum(counts) != config.num_layers or min(counts) < 1:
            raise LayoutError(
                f"parallel.layers_per_stage {list(counts)} must be whole numbers above 0 that add up to the model's "
                f"{config.num_layers} layers"
            )
        return stages_from_counts(counts)
    layer = sum(math.prod(spec.shape) for name, spec in specs.items() if name.startswith("decoder.layers.0."))
    head = config.vocab_size * config.hidden_size / layer
    # An embedding takes as much memory as the head, but hardly any time.
    return balanced_stages(config.num_layers, parallel.num_stages, embedding=head / 2, head=head)


def frozen_names(patterns: Sequence[str], names: Iterable[str]) -> frozenset[str]:
    """Return the ``names`` that match any of the ``patterns``, by the rules of the shell for file names.

    Args:
        patterns: The patterns of ``training.freeze``.
        names: All parameters of the whole model.

    Raises:
        ConfigError: when a pattern matches none, or all are matched.
    """
    names = list(names)
    frozen: set[str] = set()
    for pattern in patterns:
        matched = {name for name in names if fnmatchcase(name, pattern)}
        if not matched:
            raise ConfigError(
                f"training.freeze: {pattern!r} matches no parameter of the model, which has {names[0]}, … {names[-1]} "
                "(megacore.json of the checkpoint has all names)"
            )
        frozen |= matched
    if frozen and len(frozen) == len(names):
        raise ConfigError("training.freeze matches all parameters, so that there would be nothing to train")
    return frozenset(frozen)


def _describe_layout(parallel: ParallelSection, sizes: ParallelSizes, stages: list[Stage]) -> list[str]:
    """Describe the layout of several processes in one line."""
    if sizes.world == 1:
        return []
    note = f"{sizes.world} processes: {sizes}"
    if sizes.dp > 1:
        note += f", {parallel.data_parallel}"
    if len(stages) > 1:
        layers = " + ".join(str(len(stage.layers)) for stage in stages)
        note += f"; {parallel.pipeline_schedule} on stages of {layers} layers"
    return [note]
