"""Loggers by name: those that come with megacore, each in a file of its own, and those that other packages have.

A package adds one with an entry point in the group ``megacore.loggers``, whose name is what the run file says:

    [project.entry-points."megacore.loggers"]
    postcard = "megacore_postcard:PostcardLogger"

It leads to something that is called with a :class:`LoggedRun` and returns a :class:`Logger`, on rank 0 alone, in a
thread that the logger's methods are called in too. None is imported unless it is named.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from megacore.errors import ConfigError

GROUP = "megacore.loggers"
"""The entry-point group of other packages' loggers."""

BUILT_IN = {
    "tensorboard": EntryPoint("tensorboard", "megacore.training.loggers.tensorboard:TensorboardLogger", GROUP),
    "wandb": EntryPoint("wandb", "megacore.training.loggers.wandb:WandbLogger", GROUP),
    "trackio": EntryPoint("trackio", "megacore.training.loggers.trackio:TrackioLogger", GROUP),
}
"""Each needs the library of its name, which the extra of that name installs."""


@dataclass(frozen=True, kw_only=True)
class LoggedRun:
    """What a logger is told of the run.

    Attributes:
        project: what runs are filed under.
        name: of the run.
        directory: of the run; ``None`` where it has none.
        settings: the resolved run file, plain values by section and key. It holds no secret.
        iteration: after which the run starts; what was logged of later ones is superseded.
    """

    project: str
    name: str
    directory: Path | None
    settings: Mapping[str, Mapping[str, Any]]
    iteration: int


class Logger(Protocol):
    """Who is told how a run goes. What it raises is told to the user and does not end the training."""

    def log(self, values: Mapping[str, float], *, iteration: int) -> None:
        """Take values of a step, ``train/loss`` for example, or of an evaluation after it, ``valid/loss``."""

    def close(self) -> None:
        """The run has ended, whether it did all it should or not."""


def check_loggers(names: Iterable[str], *, directory: Path | None) -> None:
    """Refuse loggers that are not there, before anything is loaded.

    Raises:
        ConfigError: says which name is not known, or what to install.
    """
    for name in names:
        _find(name)
        if name == "tensorboard" and directory is None:
            raise ConfigError(
                "the logger tensorboard writes into the run's directory: name one in output.directory, for example "
                '"runs/first"'
            )


def open_logger(name: str, run: LoggedRun) -> Logger:
    """Start the logger ``name``. What its library raises is not caught."""
    logger: Callable[[LoggedRun], Logger] = _find(name).load()
    return logger(run)


def _find(name: str) -> EntryPoint:
    found = [point for point in entry_points(group=GROUP) if point.name == name]
    if name in BUILT_IN:
        found.append(BUILT_IN[name])
        if find_spec(name) is None:
            raise ConfigError(
                f"the logger {name} needs the package {name}, which is not installed: pip install 'megacore[{name}]'"
            )
    if not found:
        known = [*BUILT_IN, *sorted({point.name for point in entry_points(group=GROUP)})]
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
        raise ConfigError(f"logging.loggers: no logger is called {name!r}; {hint}")
    if len(found) > 1:
        told = ", ".join(sorted(_distribution(point) for point in found))
        raise ConfigError(f"several packages have a logger called {name}: {told}; uninstall all but one")
    return found[0]


def _distribution(point: EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist else "megacore itself"
