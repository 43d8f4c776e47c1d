"""Training on ranks that can import what lies in a directory; in a module of its own, so that the ranks find it."""

from __future__ import annotations

import sys
from functools import partialmethod
from unittest.mock import patch

from torch import nn

from megacore.parallel import ParallelContext
from megacore.training import RunConfig, Step
from recorded_steps import steps_on_rank


def trained_with(parallel: ParallelContext, run: RunConfig, site: str) -> list[Step]:
    """The steps of the run, with the packages in ``site``."""
    sys.path.insert(0, site)
    try:
        return steps_on_rank(parallel, run)
    finally:
        sys.path.remove(site)
        for name in [name for name in sys.modules if name.partition(".")[0] == "apex"]:
            del sys.modules[name]


def trained_by(parallel: ParallelContext, run: RunConfig, backend: str) -> list[Step]:
    """The steps of the run, whose layers are compiled by this backend of ``torch.compile``."""
    with patch.object(nn.Module, "compile", partialmethod(nn.Module.compile, backend=backend)):
        return steps_on_rank(parallel, run)
