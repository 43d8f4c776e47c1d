"""megacore: take a published language model through tokenizing, converting, verifying, splitting, training and export.

The names below are the public Python API. They are imported on first use, so that ``import megacore`` needs neither
torch nor transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megacore.checkpoint import Checkpoint as Checkpoint, inspect as inspect, split as split
    from megacore.config import ModelConfig as ModelConfig
    from megacore.data import tokenize as tokenize, tokenize_chat as tokenize_chat
    from megacore.errors import MegacoreError as MegacoreError
    from megacore.generation import generate as generate
    from megacore.hookspecs import ModelFamily as ModelFamily, hookimpl as hookimpl
    from megacore.plugins import get_family as get_family, list_families as list_families
    from megacore.runs import report as report
    from megacore.training import evaluate as evaluate, train as train
    from megacore.verification import verify as verify
    from megacore.weights import convert as convert, export as export, translate as translate

_HOME = {
    "Checkpoint": "megacore.checkpoint",
    "MegacoreError": "megacore.errors",
    "ModelConfig": "megacore.config",
    "ModelFamily": "megacore.hookspecs",
    "convert": "megacore.weights",
    "evaluate": "megacore.training",
    "export": "megacore.weights",
    "generate": "megacore.generation",
    "get_family": "megacore.plugins",
    "hookimpl": "megacore.hookspecs",
    "inspect": "megacore.checkpoint",
    "list_families": "megacore.plugins",
    "report": "megacore.runs",
    "split": "megacore.checkpoint",
    "tokenize": "megacore.data",
    "tokenize_chat": "megacore.data",
    "train": "megacore.training",
    "translate": "megacore.weights",
    "verify": "megacore.verification",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_HOME))
