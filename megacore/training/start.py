"""The checkpoint that a run starts from, with what the run file changes about its model."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from megacore.checkpoint import Checkpoint
from megacore.config import LinearScaling, ModelConfig
from megacore.errors import ConfigError
from megacore.model import read_config
from megacore.plugins import get_family
from megacore.training.config.run_config import ModelSection, RunConfig


def open_start(run: RunConfig, path: Path | None = None) -> Checkpoint:
    """Open the checkpoint that the run starts from. What is made of it carries the changed configuration.

    Args:
        run: says what is changed.
        path: of a checkpoint, instead of ``model.checkpoint``.

    Raises:
        ConfigError: when the model cannot be changed in this way.
    """
    checkpoint = Checkpoint(path or run.model.checkpoint)
    config = read_config(get_family(checkpoint.manifest.family), checkpoint)
    changed = with_context(config, run.model)
    if changed != config:
        checkpoint.manifest = dataclasses.replace(checkpoint.manifest, config=changed.to_dict())
    return checkpoint


def with_context(config: ModelConfig, settings: ModelSection) -> ModelConfig:
    """The configuration of a model whose context the run file stretches.

    Unless it is told, the number of positions grows as the scaling does.

    Raises:
        ConfigError: when the model has no rotary embedding, or one that is scaled in another way.
    """
    factor, theta, positions = settings.rope_scaling_factor, settings.rope_theta, settings.max_position_embeddings
    if config.position_embedding != "rotary" and (factor is not None or theta is not None):
        raise ConfigError(
            "model.rope_scaling_factor and model.rope_theta change a rotary embedding, and the positions of this model "
            f"are {config.position_embedding}"
        )
    changes: dict[str, object] = {}
    if theta is not None:
        changes["rope_theta"] = theta
    if factor is not None:
        scaling = config.rope_scaling
        if scaling is not None and not isinstance(scaling, LinearScaling):
            raise ConfigError(
                f"model.rope_scaling_factor is of linear scaling, and the checkpoint has {scaling.method} scaling: "
                "leave it out"
            )
        changes["rope_scaling"] = LinearScaling(factor=factor)
        so_far = 1.0 if scaling is None else scaling.factor
        changes["max_position_embeddings"] = round(config.max_position_embeddings * factor / so_far)
    if positions is not None:
        changes["max_position_embeddings"] = positions
    return dataclasses.replace(config, **changes)  # type: ignore[arg-type]
