"""Where a run begins: with the weights of a checkpoint, or where an earlier run with the same directory was."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

from megacore.checkpoint import Checkpoint
from megacore.checkpoint.training_record import TrainingRecord
from megacore.errors import CheckpointError, ConfigError, CorruptCheckpointError
from megacore.parallel import was_restarted
from megacore.training.checkpointing.directory import CheckpointDirectory
from megacore.training.config.run_config import RunConfig

Resume = bool | Literal["auto"]
"""Whether to go on from the newest checkpoint of the run; ``"auto"``: if there is one."""

_FREE = ("data.prefetch", "data.other_vocabulary", "data.prefix", "data.valid_prefix", "data.test_prefix")
"""Keys of the data that change nothing, or are compared by what they lead to."""

_ELSEWHERE = ("parallel.", "recompute.", "kernels.", "checkpoints.", "output.", "logging.", "model.checkpoint")
"""How keys begin that say where and how a run is computed, and not what."""


@dataclass(frozen=True)
class StartingPoint:
    """What a run begins with.

    Attributes:
        path: of a checkpoint.
        is_resumed: whether it is a training checkpoint that the run goes on from; else it begins with its weights.
    """

    path: Path
    is_resumed: bool = False

    @classmethod
    def of(cls, run: RunConfig, *, resume: Resume = False, load: Path | None = None) -> StartingPoint:
        """That of ``run``, as its caller and what is in its directory of checkpoints say.

        Processes that torchrun has started anew go on from the newest checkpoint, if there is one.

        Raises:
            CheckpointError: when there is nothing to resume from, or it is broken.
            ConfigError: when there are checkpoints that the run would neither resume from nor may overwrite.
            WorkerError: when a process that torchrun has started does not come.
        """
        if resume is True and load is not None:
            raise ConfigError(
                "--resume goes on from the newest checkpoint of the run, and --load from the one that it names: give "
                "one of them"
            )
        # Asked first: until all have answered, a process that torchrun is ending may still complete a checkpoint.
        is_anew = was_restarted(timedelta(seconds=run.parallel.timeout))
        own = CheckpointDirectory.of_run(run)
        newest = own.newest()
        if is_anew or resume == "auto":
            resume = newest is not None
        if resume and newest is not None:
            return cls(newest, is_resumed=True)
        if load is not None:
            return cls._loaded(load, own)
        if resume:
            raise CheckpointError(
                f"there is nothing to resume from: {own.path} holds no checkpoint, which a run has at its end if "
                "checkpoints.interval is set. Leave --resume out to start, or name another checkpoint with --load"
            )
        if newest is not None:
            raise ConfigError(
                f"{own.path} holds checkpoints of this run already, up to {newest.name}: go on from there with "
                "--resume, or name another directory with checkpoints.directory"
            )
        return cls(run.model.checkpoint)

    @classmethod
    def _loaded(cls, load: Path, own: CheckpointDirectory) -> StartingPoint:
        several = CheckpointDirectory(load)
        path = (several.newest() or load).resolve() if load.is_dir() else load
        with offering_the_one_before(path):
            checkpoint = Checkpoint(path)
        goes_back = checkpoint.manifest.training is not None and path.parent == own.path.resolve()
        if own.iterations() and not goes_back:
            raise ConfigError(
                f"{own.path} holds checkpoints of this run already: go on from them with --resume, or name another "
                "directory with checkpoints.directory"
            )
        return cls(path, is_resumed=checkpoint.manifest.training is not None)

    def resumed(self, checkpoint: Checkpoint) -> TrainingRecord | None:
        """What the run goes on with, of the ``checkpoint`` in ``path``; ``None`` where it begins with its weights."""
        return checkpoint.manifest.training if self.is_resumed else None

    @property
    def told(self) -> str:
        """For a comparison of what all nodes begin with."""
        return f"{self.path.name} {'resumed' if self.is_resumed else 'loaded'}"


@contextmanager
def offering_the_one_before(path: Path) -> Iterator[None]:
    """Where the block finds the training checkpoint in ``path`` broken, say which earlier one a run can go on from."""
    try:
        yield
    except CheckpointError as error:
        earlier = CheckpointDirectory(path.parent).before(path)
        if earlier is None:
            raise
        kind = CorruptCheckpointError if isinstance(error, CorruptCheckpointError) else CheckpointError
        raise kind(f"{error}. The one before it can be opened: go on from there with --load {earlier}") from error


def settings_of(run: RunConfig) -> dict[str, Any]:
    """Each key of the run file, by ``section.key``; JSON."""
    return {
        f"{section}.{key}": value
        for section, entries in run.model_dump(mode="json").items()
        for key, value in entries.items()
    }


def changes(run: RunConfig, record: TrainingRecord, datasets: dict[str, str]) -> list[str]:
    """What is told otherwise than the run was told that saved ``record``, one line each.

    Args:
        run: to resume with.
        record: of the checkpoint.
        datasets: a digest of each, by the key that names it.

    Raises:
        ConfigError: when the samples to come would not be those that were not seen yet, and ``checkpoints.may_change``
            does not allow it.
    """
    now, before = settings_of(run), record.state["settings"]
    differing = {key: (before.get(key), now.get(key)) for key in before | now if before.get(key) != now.get(key)}
    of_data = [key for key in differing if _says_which_data(key)]
    # By their content: the same data may be elsewhere.
    earlier = record.state["datasets"]
    trained_on = {key for key in datasets.keys() | earlier.keys() if key.startswith("data.prefix")}
    of_data += [key for key in sorted(datasets.keys() | earlier.keys()) if _differs(key, datasets, earlier, trained_on)]
    if _weights(before.get("data.prefix")) != _weights(now["data.prefix"]):
        of_data.append("data.prefix")
    if refused := [key for key in dict.fromkeys(of_data) if key not in run.checkpoints.may_change]:
        told = ", ".join(
            f"{key} was {differing[key][0]!r} and is {differing[key][1]!r}"
            if key in differing
            else f"{key} has changed"
            for key in refused
        )
        allowed = json.dumps([*run.checkpoints.may_change, *refused])
        raise ConfigError(
            f"the run cannot go on with other data than it began with: {told}. Put that back, or allow it with "
            f"--set 'checkpoints.may_change={allowed}'"
        )
    return [
        f"{key} is {value!r} from iteration {record.iteration + 1} on, and was {old!r}"
        for key, (old, value) in differing.items()
        if not key.startswith(_ELSEWHERE) and key not in _FREE
    ]


def _differs(key: str, datasets: dict[str, str], earlier: dict[str, str], trained_on: set[str]) -> bool:
    """Whether a dataset is another one than before; of those to evaluate on, one that was not there before is none."""
    if key in trained_on:
        return datasets.get(key) != earlier.get(key)
    return key in datasets and key in earlier and datasets[key] != earlier[key]


def _weights(prefix: Any) -> list[float] | None:
    """Those of a mixture, as ``data.prefix`` of :func:`settings_of` has them."""
    return [entry["weight"] for entry in prefix] if isinstance(prefix, list) else None


def _says_which_data(key: str) -> bool:
    return key.startswith("data.") and key not in _FREE
