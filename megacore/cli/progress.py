"""Progress bars on standard error, drawn only on a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

_WEIGHTS = {"hf": "*.safetensors", "meta": "consolidated.*.pth", "megatron-llm": "mp_rank_*/*.pt"}
"""The weight files of each published format."""


def published_bytes(directory: Path, source: str | None = None) -> int:
    """The size of the weight files of the published checkpoint in ``directory``, of format ``source``.

    Raises:
        CheckpointError: when there is no checkpoint, or in no format that is known.
    """
    from megacore.weights import recognise

    source = source or recognise(directory)
    if source not in _WEIGHTS:
        return 0
    weights = _tracked(directory) if source == "megatron-llm" else directory
    return sum(path.stat().st_size for path in weights.glob(_WEIGHTS[source]))


def _tracked(directory: Path) -> Path:
    """Where the iteration is that the tracker of a Megatron-LLM checkpoint names; it is checked when it is read."""
    tracker = directory / "latest_checkpointed_iteration.txt"
    said = tracker.read_text(encoding="utf-8", errors="replace").strip() if tracker.is_file() else ""
    return directory / (f"iter_{said:0>7}" if said.isdecimal() else "release")


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
