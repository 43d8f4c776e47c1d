"""Atomic output: every file, directory or dataset appears whole or not at all, and one process at a time writes it.

    .NAME.incomplete    what is being written, beside its final place
    .NAME.lock          the lock that the writing process holds

What was written is flushed to the disk before it is renamed. A process that is killed therefore leaves nothing under a
final name; what it leaves beside it is removed by the next process that writes the same output.

Locks are ``flock``, which the system releases when a process dies, however it dies. They are taken here and not by the
`filelock` package, because megacore ends at Ctrl-C and SIGTERM with an exception raised by the signal handler: filelock
4.3.1 swallows it where it arrives in a ``__del__`` of its locks, so that the process continues, and leaves lock files
behind 2.5 times as often (6.4% of 2000 processes that were terminated while they did nothing but take locks and write
small directories; 2.6% with the code below).
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Self

from megacore.errors import CheckpointError, DiskFullError, OutputError

_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_DISK_FAILURE = {errno.EIO, errno.EROFS, errno.ESTALE, errno.EACCES, errno.EPERM}


# --- locks and errors


@contextmanager
def lock_output(out: Path, *, refusal: str | None = None) -> Iterator[None]:
    """Hold the lock on the output ``out``, the file ``.NAME.lock`` beside it, which is removed at the end.

    Raises:
        OutputError: Another process holds the lock; its message is ``refusal``, if given.
        OSError: The lock file cannot be created or locked.
    """
    lock = out.with_name(f".{out.name}.lock")
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(descriptor).st_nlink:
                break
        except BlockingIOError:
            os.close(descriptor)
            raise OutputError(
                refusal or f"{out} is being written by another process: wait for it, or name another output"
            ) from None
        os.close(descriptor)  # its owner removed the file after it was opened here
    try:
        yield
    finally:
        with suppress(OSError):  # a file that nobody has locked does no harm
            lock.unlink()  # while it is locked, so that nobody else can have taken it
        os.close(descriptor)


@contextmanager
def output_errors(out: Path) -> Iterator[None]:
    """Turn an ``OSError`` raised while ``out`` is written into an error that names the file.

    Raises:
        DiskFullError: There is no space left.
        OutputError: A file in the directory of ``out`` cannot be written.
        CheckpointError: Any other file, from which ``out`` is made, cannot be read.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _DISK_FULL:
            raise DiskFullError(
                f"there is no room for {out} ({error.strerror}): what was begun of it was removed"
            ) from error
        if error.filename is None and error.errno not in _DISK_FAILURE:
            raise  # such as an error of a connection
        name = error.filename2 or error.filename
        file = Path(os.fsdecode(name)).absolute() if name else out.absolute()
        if (directory := out.absolute().parent) in (file, *file.parents) or file in directory.parents:
            raise OutputError(f"{out} could not be written: {error.strerror} ({file})") from error
        raise CheckpointError(f"{file} could not be read: {error.strerror}; {out} was not written") from error


def fsync_path(path: Path) -> None:
    """Wait until ``path``, a file or a directory, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- checks


def require_absent(*outputs: Path) -> None:
    """Raise :class:`OutputError` for an output that exists, or whose parent directory does not."""
    existing = [str(out) for out in outputs if out.exists() or out.is_symlink()]
    if existing:
        verb, it = ("exists", "it") if len(existing) == 1 else ("exist", "them")
        raise OutputError(
            f"{' and '.join(existing)} {verb} already. Nothing is overwritten: name another output, or remove {it} "
            "first"
        )
    for out in outputs:
        parent = out.absolute().parent
        if not parent.is_dir():
            raise OutputError(f"{parent}, which {out.name} is to be written into, is not a directory: create it first")


def require_space(directory: Path, needed: int, out: Path) -> None:
    """Raise :class:`DiskFullError` when ``directory`` has no room for the ``needed`` bytes of ``out``."""
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise DiskFullError(
            f"{out} needs {needed / 1e9:.2f} GB, and {out.absolute().parent} has {free / 1e9:.2f} GB free. "
            "Nothing was written"
        )


def require_name(out: Path) -> None:
    """Raise :class:`OutputError` for an output prefix that no file name can begin with, such as ``.``."""
    if out.name in ("", ".."):
        raise OutputError(f"{out} is a directory: give the beginning of the file names too, such as {out / 'text'}")


# --- one file, one directory, several files


def write_file(path: Path, text: str) -> None:
    """Write a text file, which replaces an earlier one as a whole, or raise :class:`OutputError` and leave that one."""
    staging = path.with_name(f".{path.name}.incomplete")
    with output_errors(path), lock_output(path):
        try:
            staging.write_text(text, encoding="utf-8")
            fsync_path(staging)
            staging.replace(path)
        except BaseException:
            staging.unlink(missing_ok=True)
            raise


@contextmanager
def staged_directory(out: Path) -> Iterator[Path]:
    """Yield an empty directory that becomes ``out`` when the block ends, and is removed when it raises.

    Raises:
        OutputError: ``out`` exists, is being written by another process, or cannot be created. If another program
            creates it during the block, the finished directory is kept under the name that the message gives.
        DiskFullError: There is no space left for what the block writes.
    """
    out = out.absolute()
    with output_errors(out):
        require_absent(out)  # before a lock is created beside it
        with _staging(out) as staging:
            require_absent(out)
            yield staging
            _flush(staging)
            _publish(staging, out)


class StagedFiles:
    """Files and directories beside ``out`` that get their names when the block ends, all of them or none.

    >>> with StagedFiles(Path("data/train")) as files:  # doctest: +SKIP
    ...     files.claim(Path("data/train"), [".bin"])
    ...     files.path(Path("data/train.bin")).write_bytes(b"")

    An exception, in the block or at its end, leaves none. A process that is killed leaves none either, unless it was
    just renaming them.

    Raises:
        OutputError: ``out`` has no name, another process writes it, or a file cannot be written
            (:class:`DiskFullError` when there is no room).
    """

    def __init__(self, out: Path) -> None:
        require_name(out)
        self.out = out
        self._claimed: list[list[Path]] = []

    def __enter__(self) -> Self:
        with ExitStack() as stack, output_errors(self.out):
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self._directory = stack.enter_context(_staging(self.out))
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._stack:
            if kind is None:
                with output_errors(self.out):
                    self._publish()

    def claim(self, prefix: Path, suffixes: Sequence[str] = ("",)) -> None:
        """Reserve ``prefix`` + each suffix. Raises :class:`OutputError` if one exists or is being written."""
        if prefix != self.out:
            with output_errors(prefix):
                self._stack.enter_context(lock_output(prefix))
        # Path.with_suffix would replace whatever follows the last dot of the prefix.
        claimed = [Path(f"{prefix}{suffix}") for suffix in suffixes]
        require_absent(*claimed)
        self._claimed.append(claimed)

    def path(self, final: Path) -> Path:
        """Return the path at which to write what becomes ``final``, a file or directory beside ``out``."""
        return self._directory / final.name

    def _publish(self) -> None:
        _flush(self._directory)
        for claimed in self._claimed:
            require_absent(*claimed)  # another program may have written one, and renaming would replace it
        written = [final for claimed in self._claimed for final in claimed if self.path(final).exists()]
        # A dataset is one as soon as its index is there.
        written.sort(key=lambda final: final.suffix == ".idx")
        try:
            for final in written:
                self.path(final).rename(final)
            fsync_path(self.out.parent)
        except BaseException as error:
            published = [final for final in reversed(written) if not self.path(final).exists()]
            if remaining := [str(final) for final in published if not _is_removed(final)]:
                raise OutputError(
                    f"{self.out} could not be written ({error}), and what was in place already cannot be removed: "
                    f"delete {' and '.join(reversed(remaining))}"
                ) from error
            raise


@contextmanager
def _staging(out: Path) -> Iterator[Path]:
    """Lock ``out`` and yield an empty directory beside it, which is removed at the end if it still has its name."""
    with lock_output(out):
        staging = out.with_name(f".{out.name}.incomplete")
        shutil.rmtree(staging, ignore_errors=True)  # left by a process that was killed
        staging.mkdir()
        try:
            yield staging
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def _publish(staging: Path, out: Path) -> None:
    """Rename the finished directory ``staging`` to ``out``."""
    try:
        staging.rename(out)  # replaces nothing but an empty directory
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR, errno.EISDIR):
            raise
        kept = next(name for name in (out.with_name(f"{out.name}-{i}") for i in count(2)) if not name.exists())
        staging.rename(kept)
        raise OutputError(
            f"{out} was created by another program in the meantime; the finished output is kept as {kept}"
        ) from error
    try:
        fsync_path(out.parent)
    except OSError as error:
        raise OutputError(f"{out} is in place, but the disk did not confirm it: {error.strerror}") from error


def _flush(directory: Path) -> None:
    """Wait until ``directory`` and everything in it is on the disk."""
    for path in (*directory.rglob("*"), directory):
        fsync_path(path)


def _is_removed(path: Path) -> bool:
    """Remove ``path``, and return whether it is gone."""
    with suppress(OSError):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    return not path.exists()
