"""The training checkpoints of a run: where they are, which of them is the newest, and which are kept.

    DIRECTORY/iteration-0000030/    a checkpoint, there as a whole or not at all
    DIRECTORY/latest                a symbolic link to the newest
    DIRECTORY/.run.lock             locked by the run that saves here

What a killed run leaves beside them begins with a dot too, and is removed by the next.
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
from megacore.training.config.checkpoints import CheckpointsSection
from megacore.training.config.run_config import RunConfig

LATEST = "latest"
_CHECKPOINT = re.compile(r"iteration-(\d{7,})")
_LEFT_OVER = re.compile(r"\.(iteration-\d{7,}\.(incomplete|lock|removed)|latest\.new)")


class CheckpointDirectory:
    """The directory of a run's checkpoints, which need not be there yet."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def of_run(cls, run: RunConfig) -> CheckpointDirectory:
        """That of the run file, else ``checkpoints`` in the run's directory, else the one beside its output."""
        out, directory = run.output.checkpoint, run.output.directory
        beside = out.with_name(f"{out.name}-checkpoints") if directory is None else directory / "checkpoints"
        return cls(run.checkpoints.directory or beside)

    def of_iteration(self, iteration: int) -> Path:
        """Where the checkpoint after ``iteration`` steps is."""
        return self.path / f"iteration-{iteration:07d}"

    def iterations(self) -> list[int]:
        """Of all checkpoints, the oldest first."""
        if not self.path.is_dir():
            return []
        found = (_CHECKPOINT.fullmatch(path.name) for path in self.path.iterdir())
        return sorted(int(match[1]) for match in found if match)

    def newest(self) -> Path | None:
        """The newest checkpoint; ``None`` where there is none. It may have been published without :data:`LATEST`."""
        iterations = self.iterations()
        return self.of_iteration(iterations[-1]) if iterations else None

    def before(self, path: Path) -> Path | None:
        """The newest one before that in ``path`` that can be opened."""
        match = _CHECKPOINT.fullmatch(path.name)
        for iteration in reversed(self.iterations()):
            if match is None or iteration < int(match[1]):
                earlier = self.of_iteration(iteration)
                try:
                    Checkpoint(earlier)
                except CheckpointError:
                    continue
                return earlier
        return None

    # --- what only the run that saves here does, on rank 0

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Create the directory, keep other runs from saving into it, and remove what a killed one left.

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
        """Rename the checkpoints after ``iteration``, which the run goes back to; return their new names."""
        iterations = self.iterations()
        to_rename = [number for number in iterations if number > iteration]
        if to_rename:  # first, so that a process that is killed meanwhile leaves no link that leads nowhere
            self._point_to(max((number for number in iterations if number <= iteration), default=None))
        renamed = []
        for later in to_rename:
            path = self.of_iteration(later)
            aside = next(
                name for i in range(1, 10_000) if not (name := path.with_name(f"aside-{i}-{path.name}")).exists()
            )
            renamed.append(path.rename(aside))
        return renamed

    def point_to_latest(self) -> None:
        """Let :data:`LATEST` lead to the newest checkpoint."""
        self._point_to(max(self.iterations(), default=None))

    def _point_to(self, iteration: int | None) -> None:
        if iteration is None:
            (self.path / LATEST).unlink(missing_ok=True)
            return
        link = self.path / f".{LATEST}.new"
        link.unlink(missing_ok=True)
        try:
            link.symlink_to(self.of_iteration(iteration).name)
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):
                raise
            return  # a file system without links; the newest is found by its name anyway
        link.replace(self.path / LATEST)

    def keep(self, settings: CheckpointsSection) -> None:
        """Remove what is not to be kept, now that the newest checkpoint is whole."""
        iterations = self.iterations()
        for iteration in iterations[: -settings.keep_last]:
            if settings.keep_every is None or iteration % settings.keep_every:
                path = self.of_iteration(iteration)
                # Under its name it is whole, or it is not there.
                _remove(path.rename(path.with_name(f".{path.name}.removed")))


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
