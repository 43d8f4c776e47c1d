"""Parameters that are not trained."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from megacore.errors import ConfigError


def frozen_names(patterns: Sequence[str], names: Iterable[str]) -> set[str]:
    """Those of a model's ``names`` that any of the ``patterns`` matches, as the shell matches names of files.

    Args:
        patterns: of ``training.freeze``.
        names: of all parameters of the whole model.

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
    return frozen
