"""Output that is there whole or not at all.

A directory is filled under a temporary name beside its final one, flushed to the disk, and renamed. A process that is
killed leaves nothing under the final name; what it leaves under the temporary one is removed by the next that writes
the same output. A temporary directory in use is locked by the process that fills it.
"""

from __future__ import annotations

import errno
import fcntl
import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megacore.errors import DiskFullError, OutputError


@contextmanager
def staged_directory(out: Path) -> Iterator[Path]:
    """Yield an empty directory that becomes ``out`` when the block ends without an exception, and vanishes otherwise.

    Raises:
        OutputError: when ``out`` exists, or its parent does not or cannot be written to.
        DiskFullError: when the block, or the flush after it, runs out of space.
    """
    with reported_as_output_error(out):
        require_absent(out)
    parent = out.absolute().parent
    prefix = f".{out.name}.incomplete-"
    _remove_abandoned(parent, prefix)
    with reported_as_output_error(out):
        staging = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    try:
        with _locked(staging), reported_as_output_error(out):
            yield staging
            staging.chmod(0o777 & ~_umask())
            for path in (*staging.rglob("*"), staging):
                _flush(path)
            if out.exists():
                raise OutputError(f"{out} was created by another process meanwhile; nothing was overwritten")
            staging.rename(out)
            _flush(parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


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
    """Turn the operating system's refusal to write into an error that names ``out``."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise DiskFullError(
                f"there is no room for {out} ({error.strerror}): what was begun of it was removed"
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO):
            raise OutputError(f"{out} could not be written: {error.strerror} ({error.filename or out})") from error
        raise


def _remove_abandoned(parent: Path, prefix: str) -> None:
    for leftover in parent.glob(f"{glob.escape(prefix)}*"):
        try:
            with _locked(leftover):
                shutil.rmtree(leftover, ignore_errors=True)
        except OSError:
            continue  # in use by a process that is alive


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def _flush(path: Path) -> None:
    """Wait until ``path``, a file or a directory, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
