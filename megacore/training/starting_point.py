"""Resume: the checkpoint that a run starts from, new or resumed, and the settings that may differ on resume."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

from megacore.checkpoint import Checkpoint
from megacore.checkpoint.training_record import TrainingRecord
from megacore.config import LinearScaling, ModelConfig
from megacore.errors import CheckpointError, ConfigError, CorruptCheckpointError
from megacore.model import read_config
from megacore.parallel import was_restarted
from megacore.plugins import get_family
from megacore.training.checkpointing.directory import CheckpointDirectory
from megacore.training.config import ModelSection, RunConfig

Resume = bool | Literal["auto"]
"""``True`` to resume from the newest checkpoint of the run, ``"auto"`` to resume if there is one."""

_FREE_DATA_KEYS = ("data.prefetch", "data.other_vocabulary", "data.prefix", "data.valid_prefix", "data.test_prefix")
"""Data keys that may differ on resume. The prefixes are compared by the content of the datasets instead."""

_SILENT_KEYS = ("parallel.", "recompute.", "kernels.", "checkpoints.", "output.", "logging.", "model.checkpoint")
"""Beginnings of keys that may differ on resume without a note: they say where and how a run computes, not what."""


@dataclass(frozen=True)
class StartingPoint:
    """The checkpoint that a run starts from.

    Attributes:
        checkpoint: The opened checkpoint, with the model configuration that the run file asks for.
        is_resumed: True if it is a training checkpoint that the run resumes from, False if only its weights are used.
    """

    checkpoint: Checkpoint
    is_resumed: bool = False

    @property
    def path(self) -> Path:
        """The directory of the checkpoint."""
        return self.checkpoint.path

    @property
    def record(self) -> TrainingRecord | None:
        """The state of the resumed run; ``None`` for a run that starts with the weights only."""
        return self.checkpoint.manifest.training if self.is_resumed else None

    @property
    def description(self) -> str:
        """A name that is the same on all nodes, whose paths may differ."""
        return f"{self.path.name} {'resumed' if self.is_resumed else 'loaded'}"


def find_starting_point(run: RunConfig, *, resume: Resume = False, load: Path | None = None) -> StartingPoint:
    """Open the checkpoint that ``run`` starts from, given the request of the caller and the checkpoints on disk.

    Processes that torchrun has restarted resume from the newest checkpoint, if there is one.

    Raises:
        CheckpointError: when there is nothing to resume from, or it is broken.
        ConfigError: when there are checkpoints that the run would neither resume from nor may overwrite, or the model
            cannot be changed as the run file asks.
        WorkerError: when a process that torchrun has started does not respond.
    """
    if resume is True and load is not None:
        raise ConfigError(
            "--resume resumes from the newest checkpoint of the run, and --load from the given one: use one of them"
        )
    # Asked first: until all have answered, a process that torchrun is ending may still complete a checkpoint.
    is_restarted = was_restarted(timedelta(seconds=run.parallel.timeout))
    own = CheckpointDirectory(run.checkpoint_directory)
    newest = own.newest()
    if is_restarted or resume == "auto":
        resume = newest is not None
    if resume and newest is not None:
        return StartingPoint(open_start(newest, run.model), is_resumed=True)
    if load is not None:
        return _load(load, own, run.model)
    if resume:
        raise CheckpointError(
            f"there is nothing to resume from: {own.path} holds no checkpoint; a run saves one at its end if "
            "checkpoints.interval is set. Leave --resume out to start, or name another checkpoint with --load"
        )
    if newest is not None:
        raise ConfigError(
            f"{own.path} already holds checkpoints of this run, up to {newest.name}: resume from there with --resume, "
            "or name another directory with checkpoints.directory"
        )
    return StartingPoint(open_start(run.model.checkpoint, run.model))


def _load(load: Path, own: CheckpointDirectory, model: ModelSection) -> StartingPoint:
    """Open the checkpoint given with ``--load``, or the newest one of a directory of checkpoints."""
    path = (CheckpointDirectory(load).newest() or load).resolve() if load.is_dir() else load
    checkpoint = open_start(path, model)
    is_training_checkpoint = checkpoint.manifest.training is not None
    goes_back = is_training_checkpoint and path.parent == own.path.resolve()
    if own.iterations() and not goes_back:
        raise ConfigError(
            f"{own.path} already holds checkpoints of this run: resume from them with --resume, or name another "
            "directory with checkpoints.directory"
        )
    return StartingPoint(checkpoint, is_resumed=is_training_checkpoint)


def open_start(path: Path, model: ModelSection) -> Checkpoint:
    """Open the checkpoint in ``path`` and apply the changes of the ``model`` section to its configuration.

    Raises:
        CheckpointError: when there is no checkpoint, or it is incomplete.
        ConfigError: when there is no such directory, or the model cannot be changed in this way.
    """
    if path == model.checkpoint and not path.is_dir():
        raise ConfigError(
            f"model.checkpoint: {path} is not a directory (paths in a run file are relative to the directory that the "
            "command is started in)"
        )
    with suggesting_earlier_checkpoint(path):
        checkpoint = Checkpoint(path)
    config = read_config(get_family(checkpoint.manifest.family), checkpoint)
    changed = extend_context(config, model)
    if changed != config:
        checkpoint.manifest = dataclasses.replace(checkpoint.manifest, config=changed.to_dict())
    return checkpoint


def extend_context(config: ModelConfig, model: ModelSection) -> ModelConfig:
    """Return ``config`` with the rotary embedding and the context length of the ``model`` section.

    By default the number of positions grows with the scaling factor.

    Raises:
        ConfigError: when the model has no rotary embedding, or one with another kind of scaling.
    """
    factor, theta, positions = model.rope_scaling_factor, model.rope_theta, model.max_position_embeddings
    if config.position_embedding != "rotary" and (factor is not None or theta is not None):
        raise ConfigError(
            "model.rope_scaling_factor and model.rope_theta change a rotary embedding, and the positions of this model "
            f"are {config.position_embedding}"
        )
    changes: dict[str, Any] = {}
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
        current_factor = 1.0 if scaling is None else scaling.factor
        changes["max_position_embeddings"] = round(config.max_position_embeddings * factor / current_factor)
    if positions is not None:
        changes["max_position_embeddings"] = positions
    return dataclasses.replace(config, **changes)


@contextmanager
def suggesting_earlier_checkpoint(path: Path) -> Iterator[None]:
    """If the training checkpoint in ``path`` turns out to be broken, name the one before it in the error."""
    try:
        yield
    except CheckpointError as error:
        earlier = CheckpointDirectory(path.parent).before(path)
        if earlier is None:
            raise
        kind = CorruptCheckpointError if isinstance(error, CorruptCheckpointError) else CheckpointError
        raise kind(f"{error}. The one before it can be opened: resume from there with --load {earlier}") from error


def changed_settings(run: RunConfig, record: TrainingRecord, digests: Mapping[str, str]) -> list[str]:
    """Describe the settings that differ from those of the run that saved ``record``, one line each.

    Args:
        run: The run that resumes.
        record: The state in the checkpoint.
        digests: The digest of each dataset, by the key that names it.

    Raises:
        ConfigError: when the next samples would not be those not seen yet, and ``checkpoints.may_change`` does not
            allow it.
    """
    now, before = run.settings(), record.state["settings"]
    differing = {key: (before.get(key), now.get(key)) for key in before | now if before.get(key) != now.get(key)}
    data_keys = [key for key in differing if key.startswith("data.") and key not in _FREE_DATA_KEYS]
    # Datasets are compared by their content: the same data may have moved.
    earlier = record.state["datasets"]
    training_keys = {key for key in digests.keys() | earlier.keys() if key.startswith("data.prefix")}
    data_keys += [
        key for key in sorted(digests.keys() | earlier.keys()) if _has_changed(key, digests, earlier, training_keys)
    ]
    if _mixture_weights(before.get("data.prefix")) != _mixture_weights(now["data.prefix"]):
        data_keys.append("data.prefix")
    if refused := [key for key in dict.fromkeys(data_keys) if key not in run.checkpoints.may_change]:
        listed = ", ".join(
            f"{key} was {differing[key][0]!r} and is {differing[key][1]!r}"
            if key in differing
            else f"{key} has changed"
            for key in refused
        )
        allowed = json.dumps([*run.checkpoints.may_change, *refused])
        raise ConfigError(
            f"the run cannot resume with other data than it began with: {listed}. Restore it, or allow the change with "
            f"--set 'checkpoints.may_change={allowed}'"
        )
    return [
        f"{key} is {value!r} from iteration {record.iteration + 1} on, and was {old!r}"
        for key, (old, value) in differing.items()
        if not key.startswith(_SILENT_KEYS) and key not in _FREE_DATA_KEYS
    ]


def _has_changed(key: str, digests: Mapping[str, str], earlier: Mapping[str, str], training_keys: set[str]) -> bool:
    """Return whether a dataset differs. Evaluation datasets may be added or removed."""
    if key in training_keys:
        return digests.get(key) != earlier.get(key)
    return key in digests and key in earlier and digests[key] != earlier[key]


def _mixture_weights(prefix: Any) -> list[float] | None:
    """Return the weights of a mixture, given ``data.prefix`` as in :meth:`RunConfig.settings`."""
    return [entry["weight"] for entry in prefix] if isinstance(prefix, list) else None
