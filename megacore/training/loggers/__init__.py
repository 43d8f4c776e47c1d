"""Loggers by name: the built-in ones, each in its own file, and those of other packages. ``dispatch.py`` calls them.

A package adds one with an entry point in the group ``megacore.loggers``, whose name is used in the run file:

    [project.entry-points."megacore.loggers"]
    postcard = "megacore_postcard:PostcardLogger"

The entry point is called with a :class:`LoggedRun` and returns a :class:`Logger`, on rank 0 only, in the thread that
calls the logger's methods too. A logger is imported only if the run file names it.
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
"""The built-in loggers. Each needs the library of its name, which the extra of that name installs."""


@dataclass(frozen=True, kw_only=True)
class LoggedRun:
    """The description of a run for its loggers.

    Attributes:
        project: The project of the run.
        name: The name of the run.
        directory: The run directory; ``None`` without one.
        settings: The run file with its defaults, plain values by section and key. It holds no secret.
        iteration: The iteration after which the run starts; entries of later ones are superseded.
    """

    project: str
    name: str
    directory: Path | None
    settings: Mapping[str, Mapping[str, Any]]
    iteration: int


class Logger(Protocol):
    """A receiver of the values of a run. Its exceptions are reported to the user and do not end the training."""

    def log(self, values: Mapping[str, float], *, iteration: int) -> None:
        """Log the values of a step, for example ``train/loss``, or of an evaluation after it, ``valid/loss``."""

    def close(self) -> None:
        """Finish the log: the run has ended, completed or not."""


def check_loggers(names: Iterable[str], *, directory: Path | None) -> None:
    """Check that the loggers are available, before anything is loaded.

    Raises:
        ConfigError: names an unknown logger, or the package to install.
    """
    for name in names:
        _find(name)
        if name == "tensorboard" and directory is None:
            raise ConfigError(
                "the logger tensorboard writes into the run's directory: name one in output.directory, for example "
                '"runs/first"'
            )


def open_logger(name: str, run: LoggedRun) -> Logger:
    """Start the logger ``name``. Exceptions of its library are not caught."""
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
        packages = ", ".join(sorted(_distribution(point) for point in found))
        raise ConfigError(f"several packages have a logger called {name}: {packages}; uninstall all but one")
    return found[0]


def _distribution(point: EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist else "megacore itself"
