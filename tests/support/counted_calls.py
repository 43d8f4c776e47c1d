"""Counting the expensive steps of resolving a run in this process; in a module of its own, which ranks can import."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

from megacore.checkpoint import Checkpoint
from megacore.model import model_specs
from megacore.parallel import ParallelContext
from megacore.training.batches import open_samples
from megacore.training.resolved import ResolvedRun
from megacore.training.schedule import resolve_spans
from megacore.training.trainer import train_on_rank


@contextmanager
def counted_calls() -> Iterator[Counter[str]]:
    """Count by name: opening a checkpoint or the samples of a split, resolving the specs of a model or the spans."""
    counts: Counter[str] = Counter()

    def counted(function: Callable[..., Any], name: Callable[..., str]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            counts[name(*arguments, **keywords)] += 1
            return function(*arguments, **keywords)

        return call

    named: list[tuple[Callable[..., Any], Callable[..., str]]] = [
        (model_specs, lambda *arguments: "specs"),
        (resolve_spans, lambda *arguments: "spans"),
        (open_samples, lambda run, checkpoint, split="train": f"samples to {split}"),
    ]
    with ExitStack() as patches:
        patches.enter_context(
            patch.object(Checkpoint, "__init__", counted(Checkpoint.__init__, lambda self, path: "checkpoint"))
        )
        for function, name in named:
            replacement = counted(function, name)
            for module in [module for key, module in sys.modules.items() if key.startswith("megacore")]:
                for attribute in [key for key, value in vars(module).items() if value is function]:
                    patches.enter_context(patch.object(module, attribute, replacement))
        yield counts


def calls_on_rank(parallel: ParallelContext, resolved: ResolvedRun) -> Counter[str]:
    """Train, and return the calls that this rank made of :func:`counted_calls`."""
    with counted_calls() as counts:
        train_on_rank(parallel, resolved)
    return counts
