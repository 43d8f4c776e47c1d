"""What the tests of faults run on each rank; in a module of its own, so that the ranks can import it."""

from __future__ import annotations

import errno
import os
import threading
import time
from pathlib import Path
from unittest.mock import patch

from megacore.checkpoint import safetensors_file
from megacore.errors import DataError, DiskFullError
from megacore.parallel import ParallelContext
from megacore.training import RunConfig, Step
from megacore.training.checkpointing.storage import SafetensorsWriter
from megacore.training.resolved import resolve_run
from megacore.training.trainer import train_on_rank

_fails = threading.Event()


def train_with_little_room(parallel: ParallelContext | None, run: RunConfig, last_saved: int) -> tuple[list[str], str]:
    """Train on a disk that is full once the checkpoint after ``last_saved`` steps is there; what is told, and the end.

    Of several ranks the last one has no room.
    """
    parallel = parallel or ParallelContext.single()
    told: list[str] = []
    write_all = safetensors_file._write_all

    def write_until_full(descriptor: int, chunk: memoryview) -> None:
        path = str(Path(f"/proc/self/fd/{descriptor}").readlink())
        is_late = "iteration-" in path and int(path.split("iteration-")[1][:7]) > last_saved
        if is_late and parallel.rank == parallel.sizes.world - 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write_all(descriptor, chunk)

    def tell(step: Step) -> None:
        told.extend(step.notes)

    with patch.object(safetensors_file, "_write_all", write_until_full):
        try:
            train_on_rank(parallel, resolve_run(run), tell)
        except DiskFullError as error:
            return told, str(error)
    return told, ""


def train_without_room_for(parallel: ParallelContext | None, run: RunConfig, name: str) -> str:
    """Train where the last rank that writes ``name`` finds the disk full; how that ends."""
    parallel = parallel or ParallelContext.single()
    write_all = safetensors_file._write_all

    def write_until_full(descriptor: int, chunk: memoryview) -> None:
        if name in str(Path(f"/proc/self/fd/{descriptor}").readlink()):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write_all(descriptor, chunk)

    with patch.object(safetensors_file, "_write_all", write_until_full):
        try:
            train_on_rank(parallel, resolve_run(run))
        except DiskFullError as error:
            return str(error)
    return ""


def fail_while_the_second_is_saved(step: Step) -> None:
    """Fail after 3 steps, in a process that writes no checkpoint before, and then slowly."""
    write_all = safetensors_file._write_all

    def write_late(descriptor: int, chunk: memoryview) -> None:
        _fails.wait()
        time.sleep(0.02)
        write_all(descriptor, chunk)

    if step.iteration == 1:
        _fails.clear()
        safetensors_file._write_all = write_late
    if step.iteration == 3:
        _fails.set()
        raise DataError("after iteration 3")


def fail_on_rank_0_when_a_checkpoint_is_completed(step: Step) -> None:
    """Let what only rank 0 does fail, in a way that no rank expects, and let it be the last to hear of that."""

    def fail(*arguments: object, **named: object) -> None:
        raise ZeroDivisionError("one over nothing")

    def abandon_late(*arguments: object) -> None:
        time.sleep(0.3)
        abandon(*arguments)

    abandon = SafetensorsWriter.abandon
    SafetensorsWriter.finish, SafetensorsWriter.abandon = fail, abandon_late
