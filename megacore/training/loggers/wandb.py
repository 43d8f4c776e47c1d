"""Weights & Biases. The key is that of ``wandb login`` or of ``WANDB_API_KEY``; megacore never sees it."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from pathlib import Path

import wandb

from megacore.atomic_output import write_file
from megacore.training.loggers import LoggedRun


class WandbLogger:
    """A run of wandb. A resumed run continues the one whose identifier is in the run directory.

    ``WANDB_ENTITY``, ``WANDB_MODE`` and all other variables of wandb apply.
    """

    def __init__(self, run: LoggedRun) -> None:
        self._run = wandb.init(
            project=run.project,
            name=run.name,
            id=None if run.directory is None else _id_of(run.directory),
            resume=None if run.directory is None else "allow",
            dir=run.directory,
            config={section: dict(table) for section, table in run.settings.items()},
            # megacore has its own console, code is not part of a run, and a repository's address may hold a password.
            settings=wandb.Settings(console="off", disable_code=True, disable_git=True),
        )
        # wandb's own step must not fall, and the iteration of a run that resumes from a checkpoint does.
        self._run.define_metric("iteration")
        self._run.define_metric("*", step_metric="iteration")

    def log(self, values: Mapping[str, float], *, iteration: int) -> None:
        self._run.log({"iteration": iteration, **values})

    def close(self) -> None:
        self._run.finish()


def _id_of(directory: Path) -> str:
    """Return the identifier of the run in wandb, the same whenever the run resumes."""
    file = directory / "wandb-id.txt"
    if not file.is_file():
        write_file(file, secrets.token_hex(4) + "\n")
    return file.read_text(encoding="utf-8").strip()
