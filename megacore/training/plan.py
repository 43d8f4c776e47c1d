"""What a run file amounts to for a model: pipeline stages, how it computes, and what cannot be run."""

from __future__ import annotations

import math
import os
import shutil

import torch

from megacore.checkpoint import Checkpoint
from megacore.config import ModelConfig
from megacore.errors import ConfigError, LayoutError
from megacore.model import ComputeOptions, model_specs, read_config
from megacore.model.kernels import check_kernels
from megacore.parallel import (
    SCHEDULES,
    ParameterSpec,
    Stage,
    balanced_stages,
    check_schedule,
    local_device,
    stages_from_counts,
)
from megacore.plugins import get_family
from megacore.training.config.run_config import RunConfig
from megacore.training.evaluation.metrics import metrics_of
from megacore.training.freezing import frozen_names


def model_specs_of(checkpoint: Checkpoint) -> dict[str, ParameterSpec]:
    """The parameters of a checkpoint's model, as its plugin declares them."""
    family = get_family(checkpoint.manifest.family)
    return model_specs(read_config(family, checkpoint), family.build_layer)


def pipeline_stages(run: RunConfig, config: ModelConfig, specs: dict[str, ParameterSpec]) -> list[Stage]:
    """The stages of the whole model.

    Raises:
        LayoutError: when there are more than layers, or those that the run file gives are not all.
    """
    counts = run.parallel.layers_per_stage
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
    return balanced_stages(config.num_layers, run.parallel.num_stages, embedding=head / 2, head=head)


def check_run(run: RunConfig, config: ModelConfig, specs: dict[str, ParameterSpec], *, dp_size: int) -> None:
    """Refuse what cannot be run, before anything is loaded.

    Raises:
        LayoutError: says what does not fit what.
        ConfigError: says which kernels cannot be used here, and why.
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
    pipeline_stages(run, config, specs)
    frozen_names(run.training.freeze, specs)
    metrics_of(run.evaluation.metrics, conversations=run.data.kind == "instruction")
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
    schedule = run.parallel.pipeline_schedule
    if splits_backward(run):
        able = ", ".join(name for name, other in SCHEDULES.items() if not other.splits_backward)
        raise ConfigError(
            f"kernels.compile does not go with the pipeline schedule {schedule}, which takes the backward pass of a "
            f"layer apart: set parallel.pipeline_schedule to one of {able}, or kernels.compile to false"
        )
    compiler = os.environ.get("CXX", "g++")
    if local_device().type == "cpu" and shutil.which(compiler) is None:
        raise ConfigError(
            f"kernels.compile needs a C++ compiler on a CPU, and {compiler} is not there: install it, name another one "
            "in the environment variable CXX, or set kernels.compile to false"
        )


def splits_backward(run: RunConfig) -> bool:
    """Whether the backward pass computes the gradients of parameters apart from those of activations."""
    return run.parallel.pipeline_parallel > 1 and SCHEDULES[run.parallel.pipeline_schedule].splits_backward


def compute_options(run: RunConfig, compute_dtype: torch.dtype | None) -> ComputeOptions:
    """How the run file says that the model computes."""
    return ComputeOptions(
        compute_dtype=compute_dtype,
        # Layers that are recomputed have one cast at a time, shards are gathered as they are cast, and compiled code
        # casts as it likes.
        caches_casts=run.recompute.granularity != "full"
        and run.parallel.data_parallel == "replicated"
        and not run.kernels.compile,
        recompute=run.recompute.granularity,
        recompute_layers=run.recompute.num_layers,
        attention_dropout=run.dropout.attention,
        hidden_dropout=run.dropout.hidden,
        lima_dropout=run.dropout.lima,
        dropout_seed=run.dropout.seed,
        attention=run.kernels.attention,
        norm=run.kernels.norm,
        compile=run.kernels.compile,
        splits_backward=splits_backward(run),
    )
