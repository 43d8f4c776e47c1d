"""Building a model from a native checkpoint of any layout: each rank reads its own part."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext

import torch
from torch import nn

from megacore.checkpoint import Checkpoint
from megacore.checkpoint.reading import check_in_background
from megacore.config import ModelConfig
from megacore.model.decoder import DecoderModel, model_specs
from megacore.parallel import ParallelContext, ParameterSpec, Stage, check_tensor_parallel, materialize
from megacore.plugins import Family, get_family


def read_config(family: Family, checkpoint: Checkpoint) -> ModelConfig:
    """Return the model configuration of a native checkpoint, as an object of its family's class."""
    return family.family.config_class.from_dict(checkpoint.manifest.config)


def load_model(
    checkpoint: Checkpoint, parallel: ParallelContext, *, dtype: torch.dtype, stage: Stage | None = None
) -> DecoderModel:
    """Build the model of ``checkpoint``, or one pipeline stage, with this rank's part of the weights, in ``dtype``.

    Rank 0 checks the digests of all files meanwhile.

    Raises:
        CorruptCheckpointError: when a file has changed since it was written.
        PluginError: when no plugin for its family is installed.
        LayoutError: when the model cannot be cut over the ranks.
        CheckpointError: when the checkpoint does not have the parameters of the model.
    """
    return load_stages(checkpoint, parallel, [stage], dtype=dtype)[0]


def load_stages(
    checkpoint: Checkpoint,
    parallel: ParallelContext,
    stages: list[Stage] | list[Stage | None],
    *,
    dtype: torch.dtype,
    on_layer: Callable[[nn.Module], None] = lambda layer: None,
    specs: Mapping[str, ParameterSpec] | None = None,
) -> list[DecoderModel]:
    """Build several stages of one model like :func:`load_model`; ``None`` stands for the whole model.

    ``on_layer`` receives each layer as soon as it is loaded. If it shards the layer, only one whole layer is in memory
    at a time. ``specs`` are the parameters of the whole model, if they are known already.
    """
    family = get_family(checkpoint.manifest.family)
    config = read_config(family, checkpoint)
    if specs is None:
        specs = model_specs(config, family.build_layer)
    check_tensor_parallel(specs, parallel.tp_size)
    checkpoint.check_parameters(specs)

    def values(name: str, spec: ParameterSpec) -> torch.Tensor:
        local = checkpoint.read_local(name, spec, tp_size=parallel.tp_size, tp_rank=parallel.tp_rank)
        return local.to(parallel.device, dtype)

    with check_in_background(checkpoint) if parallel.rank == 0 else nullcontext() as wait_for_check:
        models = [DecoderModel(config, family.build_layer, parallel, stage) for stage in stages]
        for model in models:
            for number, layer in model.decoder.layers.items():
                materialize(layer, parallel, values, prefix=f"decoder.layers.{number}.")
                on_layer(layer)
            materialize(model, parallel, values, done="decoder.layers.")
        if wait_for_check is not None:
            wait_for_check()
    return models
