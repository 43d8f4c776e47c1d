"""A small training run, for tests that train: its inputs, its run file, and the weights that come out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

import megacore
from megacore.checkpoint import Checkpoint
from megacore.training import RunConfig, read_run_config
from tiny_llama import published_model, write_dataset

RUN_FILE = """
model.checkpoint = "{checkpoint}"
data = {{ prefix = "{data}", seq_length = 12 }}
optimizer = {{ lr = 0.01, eps = 1e-5 }}
training = {{ train_iters = 5, global_batch_size = 8 }}
output.checkpoint = "{out}"
"""


def prepare(place: Path, **settings: Any) -> Path:
    """Write a dataset and a native checkpoint of a small Llama of random weights into ``place``."""
    write_dataset(place / "data")
    published_model(place / "published", **settings)
    megacore.convert("llama", place / "published", place / "checkpoint")
    return place


def run_of(place: Path, out: Path, *overrides: str, checkpoint: str = "checkpoint") -> RunConfig:
    """A run on what lies in ``place``; ``overrides`` are ``section.key=value``."""
    file = out.with_suffix(".toml")
    file.write_text(RUN_FILE.format(checkpoint=place / checkpoint, data=place / "data", out=out))
    return read_run_config(file, overrides)


def weights(checkpoint: Path) -> dict[str, Tensor]:
    """All parameters of a checkpoint, each as one matrix."""
    opened = Checkpoint(checkpoint)
    matrices = {name: opened.matrix(name) for name in opened.manifest.parameters}
    return {name: m.read(slice(0, m.rows), slice(0, m.columns)) for name, m in matrices.items()}
