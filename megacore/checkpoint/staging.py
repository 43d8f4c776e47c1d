"""Output that is there whole or not at all.

A directory is filled under a temporary name beside its final one, flushed to the disk, and renamed. A process that is
killed leaves nothing under the final name; what it leaves beside it is removed by the next that writes the same output.

    .NAME.incomplete    the directory while it is filled
    .NAME.lock          locked by the process that fills it, so that two never write the same output
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

from megacore.errors import CheckpointError, DiskFullError, OutputError
from megacore.outputs import flush, sole_writer


@contextmanager
def staged_directory(out: Path) -> Iterator[Path]:
    """Yield an empty directory that becomes ``out`` when the block ends without an exception, and vanishes otherwise.

    Raises:
        OutputError: when ``out`` exists, is being written by another process, or cannot be created. If somebody creates
            it while the block runs, the finished directory is kept under another name, which the message tells.
        DiskFullError: when the block, or the flush after it, runs out of space.
    """
    out = out.absolute()
    staging = out.with_name(f".{out.name}.incomplete")
    with reported_as_output_error(out):
        require_absent(out)  # before a lock is made beside it
    with reported_as_output_error(out), sole_writer(out):
        require_absent(out)
        shutil.rmtree(staging, ignore_errors=True)  # of a process that was killed
        staging.mkdir()
        try:
            yield staging
            for path in (*staging.rglob("*"), staging):
                flush(path)
            _publish(staging, out)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def _publish(staging: Path, out: Path) -> None:
    """Make the finished ``staging`` visible as ``out``."""
    try:
        staging.rename(out)  # replaces nothing but an empty directory
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR, errno.EISDIR):
            raise
        kept = next(name for name in (out.with_name(f"{out.name}-{i}") for i in count(2)) if not name.exists())
        staging.rename(kept)
        raise OutputError(f"{out} was created by somebody else meanwhile; what was made is kept as {kept}") from error
    try:
        flush(out.parent)
    except OSError as error:
        raise OutputError(f"{out} is in place, but the disk did not confirm it: {error.strerror}") from error


def require_absent(out: Path) -> None:
    """Refuse an output that exists, or whose parent does not."""
    if out.exists() or out.is_symlink():
        raise OutputError(f"{out} exists already. Nothing is overwritten: name another output, or remove it first")
    parent = out.absolute().parent
    if not parent.is_dir():
        raise OutputError(f"{parent}, which {out.name} is to be written into, is not a directory: create it first")


def require_space(directory: Path, needed: int, out: Path) -> None:
    """Refuse to start writing ``needed`` bytes into ``directory`` for ``out`` when they cannot fit."""
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise DiskFullError(
            f"{out} needs {needed / 1e9:.2f} GB, and {out.absolute().parent} has {free / 1e9:.2f} GB free. "
            "Nothing was written"
        )


@contextmanager
def reported_as_output_error(out: Path) -> Iterator[None]:
    """Turn the system's refusal to write ``out``, or to read what goes into it, into an error that says which."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise DiskFullError(
                f"there is no room for {out} ({error.strerror}): what was begun of it was removed"
            ) from error
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.ENOENT):
            raise
        file = Path(os.fsdecode(error.filename)) if error.filename else out
        if out.parent in file.absolute().parents or file == out.parent:
            raise OutputError(f"{out} could not be written: {error.strerror} ({file})") from error
        raise CheckpointError(f"{file} could not be read: {error.strerror}; {out} was not written") from error
