"""Building a model from a native checkpoint: each rank reads its own part, whatever layout the checkpoint has."""

from __future__ import annotations

from contextlib import nullcontext

import torch

from megacore.checkpoint import Checkpoint
from megacore.checkpoint.reading import checked_meanwhile
from megacore.config import ModelConfig
from megacore.model.decoder import DecoderModel
from megacore.parallel import ParallelContext, ParameterSpec, check_tensor_parallel, materialize, parameter_specs
from megacore.plugins import Family, get_family


def read_config(family: Family, checkpoint: Checkpoint) -> ModelConfig:
    """The model configuration of a native checkpoint, in the class of its family."""
    return family.family.config_class.from_dict(checkpoint.manifest.config)


def load_model(checkpoint: Checkpoint, parallel: ParallelContext, *, dtype: torch.dtype) -> DecoderModel:
    """Build the model of ``checkpoint`` with this rank's part of the weights, in ``dtype``.

    Meanwhile rank 0 compares the digests of all of its files.

    Raises:
        CorruptCheckpointError: when a file is not what was written.
        PluginError: when no plugin for its family is installed.
        LayoutError: when the model cannot be cut over the ranks.
        CheckpointError: when the checkpoint does not hold the parameters of the model.
    """
    family = get_family(checkpoint.manifest.family)
    config = read_config(family, checkpoint)
    check_tensor_parallel(checkpoint.manifest.specs, parallel.tp_size)
    model = DecoderModel(config, family.build_layer, parallel)
    checkpoint.check_parameters(parameter_specs(model))

    def values(name: str, spec: ParameterSpec) -> torch.Tensor:
        local = checkpoint.read_local(name, spec, tp_size=parallel.tp_size, tp_rank=parallel.tp_rank)
        return local.to(parallel.device, dtype)

    with checked_meanwhile(checkpoint) if parallel.tp_rank == 0 else nullcontext() as wait_for_check:
        materialize(model, parallel, values)
        if wait_for_check is not None:
            wait_for_check()
    return model
