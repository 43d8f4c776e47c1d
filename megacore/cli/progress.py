"""Progress bars on standard error, drawn only on a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


def published_bytes(directory: Path, source: str | None = None) -> int:
    """Return the size of the weight files of the published checkpoint in ``directory``, by default of any known format.

    Raises:
        CheckpointError: There is no checkpoint, or none in a known format.
    """
    from megacore.weights.formats import FORMATS, recognise

    format = FORMATS.get(source or recognise(directory))
    return 0 if format is None else sum(path.stat().st_size for path in format.weight_files(directory))


@contextmanager
def bytes_progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show a progress bar of ``total`` bytes; yield the function that advances it by a number of bytes."""
    with documents_progress(what, total) as (advance, _):
        yield advance


@contextmanager
def documents_progress(what: str, total: int) -> Iterator[tuple[Callable[[int], None], Callable[[int], None]]]:
    """Show a progress bar of ``total`` bytes, and documents per second; yield the functions that advance each."""
    if not sys.stderr.isatty():
        yield (lambda num_bytes: None), (lambda num_documents: None)
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    documents_column = TextColumn("{task.fields[documents]}")
    with Progress(
        TextColumn(what), BarColumn(), DownloadColumn(), TransferSpeedColumn(), documents_column, TimeRemainingColumn(),
        console=Console(stderr=True), transient=True,
    ) as progress:  # fmt: skip
        task = progress.add_task(what, total=total, documents="")
        num_documents, started = 0, time.monotonic()

        def advance_documents(number: int) -> None:
            nonlocal num_documents
            num_documents += number
            per_second = num_documents / max(time.monotonic() - started, 1e-9)
            progress.update(task, documents=f"{per_second:,.0f} documents/s")

        yield (lambda num_bytes: progress.advance(task, num_bytes)), advance_documents
