"""What every output takes: a lock beside it, so that two processes never write the same one, and to be on the disk."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from megacore.errors import OutputError


@contextmanager
def sole_writer(out: Path) -> Iterator[None]:
    """Hold the lock on the output ``out``, the file ``.NAME.lock`` beside it, which is gone afterwards.

    Raises:
        OutputError: another process holds it. (One that was killed holds none, even where its file is left.)
        OSError: the file cannot be made or locked.
    """
    lock = out.with_name(f".{out.name}.lock")
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_still(lock, descriptor):
                break
        except BlockingIOError:
            os.close(descriptor)
            raise OutputError(
                f"{out} is being written by another process: wait for it, or name another output"
            ) from None
        os.close(descriptor)  # its owner removed the file between our opening and locking it
    try:
        yield
    finally:
        with suppress(OSError):  # unlocked it is in nobody's way
            lock.unlink()
        os.close(descriptor)


def flush(path: Path) -> None:
    """Wait until ``path``, a file or a directory, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_still(path: Path, descriptor: int) -> bool:
    """Whether ``path`` is the file that ``descriptor`` was opened on."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False
