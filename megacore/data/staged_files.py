"""The files of a dataset, which appear together or not at all.

They are filled in a directory beside their final places, flushed to the disk, and renamed. A process that is killed
leaves nothing under a final name, unless it was renaming; what it leaves beside is removed by the next that writes the
same output.

    .NAME.incomplete    the directory in which they are filled
    .NAME.lock          locked by the process that fills it, so that two never write the same output
"""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from megacore.errors import DiskFullError, OutputError
from megacore.outputs import flush, sole_writer


class StagedFiles:
    """Files and directories beside ``out`` that get their names when the block ends, all of them or none.

    >>> with StagedFiles(Path("data/train")) as files:  # doctest: +SKIP
    ...     files.claim(Path("data/train"), [".bin"])
    ...     files.path(Path("data/train.bin")).write_bytes(b"")

    An exception, in the block or at its end, leaves none.

    Raises:
        OutputError: ``out`` has no name, another process writes it, or a file cannot be written
            (:class:`DiskFullError` when there is no room).
    """

    def __init__(self, out: Path) -> None:
        require_name(out)
        self.out = out
        self._directory = out.with_name(f".{out.name}.incomplete")
        self._claimed: list[list[Path]] = []

    def __enter__(self) -> Self:
        with ExitStack() as stack, output_errors(self.out):
            self.out.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(sole_writer(self.out))
            shutil.rmtree(self._directory, ignore_errors=True)  # of a process that was killed
            self._directory.mkdir()
            stack.callback(shutil.rmtree, self._directory, ignore_errors=True)
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
        """Say that the files ``prefix`` + suffix are to be written, or some of them, by this process alone.

        Raises:
            OutputError: one of them exists, or another process writes them.
        """
        if prefix != self.out:
            with output_errors(prefix):
                self._stack.enter_context(sole_writer(prefix))
        # Not Path.with_suffix, which would take away what follows the last dot of the prefix.
        claimed = [Path(f"{prefix}{suffix}") for suffix in suffixes]
        _refuse_existing(claimed)
        self._claimed.append(claimed)

    def path(self, final: Path) -> Path:
        """Where to write what is to become ``final``, beside ``out``."""
        return self._directory / final.name

    def _publish(self) -> None:
        for path in (*self._directory.rglob("*"), self._directory):
            flush(path)
        for claimed in self._claimed:
            # No other megacore, but somebody else may have written one; renaming would replace it.
            _refuse_existing(claimed)
        written = [final for claimed in self._claimed for final in claimed if self.path(final).exists()]
        # A dataset is one as soon as its index is there.
        written.sort(key=lambda final: final.suffix == ".idx")
        try:
            for final in written:
                self.path(final).rename(final)
            flush(self.out.parent)
        except BaseException as error:
            published = [final for final in reversed(written) if not self.path(final).exists()]
            if remaining := [str(final) for final in published if not _removed(final)]:
                raise OutputError(
                    f"{self.out}: cannot be written ({error}), and what was in place already cannot be removed: "
                    f"delete {' and '.join(reversed(remaining))}"
                ) from error
            raise


def require_name(out: Path) -> None:
    """Refuse an output prefix that no name of a file can begin with, such as ``.``."""
    if out.name in ("", ".."):
        raise OutputError(
            f"{out}: is a directory; give what the names of the files begin with too, such as {out / 'text'}"
        )


@contextmanager
def output_errors(out: Path) -> Iterator[None]:
    """Turn the system's refusal to write ``out`` into an error that says so. The block must leave nothing of it."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        file = error.filename2 or error.filename or out
        raise (DiskFullError if full else OutputError)(
            f"{file}: cannot be written: {error.strerror}. No dataset was left behind"
        ) from error


def _refuse_existing(files: Sequence[Path]) -> None:
    existing = [str(path) for path in files if path.exists() or path.is_symlink()]
    if existing:
        raise OutputError(
            f"{' and '.join(existing)} exist{'s' if len(existing) == 1 else ''}: "
            f"delete what is not needed, or choose another output prefix"
        )


def _removed(path: Path) -> bool:
    with suppress(OSError):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    return not path.exists()
