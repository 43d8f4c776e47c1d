"""The directory of a run's training checkpoints: finding the newest, keeping some, removing the rest.

    DIRECTORY/iteration-0000030/    a checkpoint, complete or absent
    DIRECTORY/latest                a symbolic link to the newest
    DIRECTORY/.run.lock             locked by the run that saves here

Names beginning with a dot that a killed run left beside them are removed by the next run.
"""

from __future__ import annotations

import errno
import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from megacore.atomic_output import lock_output, output_errors
from megacore.checkpoint import Checkpoint
from megacore.errors import CheckpointError
from megacore.training.config import CheckpointsSection

LATEST = "latest"
_CHECKPOINT = re.compile(r"iteration-(\d{7,})")
_LEFT_OVER = re.compile(r"\.(iteration-\d{7,}\.(incomplete|lock|removed)|latest\.new)")


class CheckpointDirectory:
    """The directory of a run's checkpoints, which need not exist yet."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def checkpoint_path(self, iteration: int) -> Path:
        """Return the path of the checkpoint after ``iteration`` steps."""
        return self.path / f"iteration-{iteration:07d}"

    def iterations(self) -> list[int]:
        """Return the iterations of all checkpoints, in ascending order."""
        if not self.path.is_dir():
            return []
        found = (_CHECKPOINT.fullmatch(path.name) for path in self.path.iterdir())
        return sorted(int(match[1]) for match in found if match)

    def newest(self) -> Path | None:
        """Return the newest checkpoint, whether or not :data:`LATEST` leads to it; ``None`` if there is none."""
        iterations = self.iterations()
        return self.checkpoint_path(iterations[-1]) if iterations else None

    def before(self, path: Path) -> Path | None:
        """Return the newest checkpoint before the one in ``path`` that can be opened."""
        match = _CHECKPOINT.fullmatch(path.name)
        for iteration in reversed(self.iterations()):
            if match is None or iteration < int(match[1]):
                earlier = self.checkpoint_path(iteration)
                try:
                    Checkpoint(earlier)
                except CheckpointError:
                    continue
                return earlier
        return None

    # --- for the run that saves here, on rank 0

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Create the directory, lock it against other runs, and remove what a killed run left.

        Raises:
            OutputError: when another run saves here, or the directory cannot be created.
        """
        refusal = (
            f"another run saves its checkpoints in {self.path}: wait for it, or name another directory with "
            "checkpoints.directory"
        )
        with ExitStack() as stack:
            with output_errors(self.path / "run"):
                self.path.mkdir(parents=True, exist_ok=True)
                stack.enter_context(lock_output(self.path / "run", refusal=refusal))
            for path in [path for path in self.path.iterdir() if _LEFT_OVER.fullmatch(path.name)]:
                _remove(path)
            yield

    def set_aside_after(self, iteration: int) -> list[Path]:
        """Rename the checkpoints after ``iteration``, to which the run goes back; return their new paths."""
        iterations = self.iterations()
        to_rename = [number for number in iterations if number > iteration]
        if to_rename:  # first, so that a process killed meanwhile leaves no broken link
            self._point_to(max((number for number in iterations if number <= iteration), default=None))
        renamed = []
        for later in to_rename:
            path = self.checkpoint_path(later)
            aside = next(
                name for i in range(1, 10_000) if not (name := path.with_name(f"aside-{i}-{path.name}")).exists()
            )
            renamed.append(path.rename(aside))
        return renamed

    def point_to_latest(self) -> None:
        """Point :data:`LATEST` to the newest checkpoint."""
        self._point_to(max(self.iterations(), default=None))

    def _point_to(self, iteration: int | None) -> None:
        if iteration is None:
            (self.path / LATEST).unlink(missing_ok=True)
            return
        link = self.path / f".{LATEST}.new"
        link.unlink(missing_ok=True)
        try:
            link.symlink_to(self.checkpoint_path(iteration).name)
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):
                raise
            return  # a file system without symbolic links; the newest checkpoint is found by its name
        link.replace(self.path / LATEST)

    def keep(self, settings: CheckpointsSection) -> None:
        """Remove old checkpoints, now that the newest one is complete."""
        iterations = self.iterations()
        for iteration in iterations[: -settings.keep_last]:
            if settings.keep_every is None or iteration % settings.keep_every:
                path = self.checkpoint_path(iteration)
                # Renamed first: under its name a checkpoint is complete or absent.
                _remove(path.rename(path.with_name(f".{path.name}.removed")))


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
