"""Parameters of which only some are tried by `make test`, and all by `make soak` too."""

from __future__ import annotations

from collections.abc import Iterable

import pytest


def all_but(ordinary: Iterable[str], names: Iterable[str]) -> list[object]:
    """Return all ``names``, those that are not ``ordinary`` marked as tests of ``make soak``."""
    ordinary = {*ordinary}
    assert ordinary <= {*names}
    return [pytest.param(name, marks=() if name in ordinary else pytest.mark.soak) for name in names]
