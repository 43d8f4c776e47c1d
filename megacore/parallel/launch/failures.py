"""Why processes failed: each writes down what it raised, and the command that started them reads who was first."""

from __future__ import annotations

import json
import os
import re
import signal
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from megacore import errors
from megacore.errors import MegacoreError, WorkerError
from megacore.parallel.context import ParallelContext

_LET_THE_LAUNCHER_NOTICE = 2.0
"""Seconds that a rank stays after an error that may only be the echo of another rank's death."""

_LOST_CONNECTION = re.compile(r"gloo/|torch\.distributed\.Dist\w+Error")
"""In the traceback of a rank that another one did not answer: gloo's errors name its source file, NCCL's have types."""


_OWN, _ECHO = "own", "echo"
"""Of a rank: it has failed by itself, or since another did not answer."""


@dataclass(frozen=True)
class Failure:
    """Why the processes of a node failed.

    Attributes:
        kind: name of a class of :mod:`megacore.errors`.
        message: for that class.
        is_echo: whether all that is known is that another process did not answer, whose failure would be the cause.
    """

    kind: str
    message: str
    is_echo: bool = False

    @classmethod
    def told(cls, fields: Any) -> Failure:
        """What another node tells of its own, as ``asdict`` made it; whatever else arrives is taken for a message."""
        if isinstance(fields, dict) and isinstance(fields.get("kind"), str) and isinstance(fields.get("message"), str):
            return cls(fields["kind"], fields["message"], fields.get("is_echo") is True)
        return cls("WorkerError", f"another node failed: {fields}")

    def error(self) -> MegacoreError:
        """The exception that tells of it; a :class:`WorkerError` for a kind that this megacore does not have."""
        kind = getattr(errors, self.kind, None)
        if not (isinstance(kind, type) and issubclass(kind, MegacoreError)):
            kind = WorkerError
        return kind(self.message)


@contextmanager
def report_unresponsive_ranks(parallel: ParallelContext) -> Iterator[None]:
    """Where the block fails on this rank of a group, tell the others; where they do not answer, say which.

    For ranks that torchrun or srun has started, which no launcher of ours watches.

    Raises:
        WorkerError: when the block fails since others did not answer.
        MegacoreError: what the block raises, with the rank that it is of.
    """
    try:
        yield
    except MegacoreError as error:
        error.rank = parallel.rank if error.rank is None else error.rank
        _tell_of_failure(parallel, _OWN)
        raise
    except Exception as error:
        if not is_lost_connection(error):
            _tell_of_failure(parallel, _OWN)
            raise
        of_others = _tell_of_failure(parallel, _ECHO)
        if failed := [rank for rank, kind in of_others.items() if kind == _OWN]:
            who = f"rank {failed[0]}, which has failed"
        else:
            who = _named([rank for rank, kind in of_others.items() if kind is None], "")
        failure = WorkerError(f"rank {parallel.rank} waited in vain for {who}:\n{traceback.format_exc().rstrip()}")
        failure.rank = parallel.rank
        raise failure from error


def attribute(error: BaseException, rank: int) -> None:
    """Say of an error, which several ranks raise since one has told the others of it, that it is that of ``rank``."""
    vars(error)["rank"] = rank


def is_lost_connection(error: BaseException) -> bool:
    """Whether all that ``error`` says is that another rank did not answer."""
    return _LOST_CONNECTION.search("".join(traceback.format_exception(error))) is not None


def _tell_of_failure(parallel: ParallelContext, kind: str) -> dict[int, str | None]:
    """Tell the other ranks that this one has failed, by itself or as an ``_ECHO``; what they tell in a moment.

    ``None`` stands for a rank that tells nothing; with nobody to ask, nothing is known of any.
    """
    if parallel.mesh is None:
        return {}
    try:
        store = dist.distributed_c10d._get_default_store()
        names = {rank: f"megacore/failed/{rank}" for rank in range(parallel.sizes.world)}
        store.set(names[parallel.rank], kind)
        time.sleep(_LET_THE_LAUNCHER_NOTICE if kind == _ECHO else 0)
        return {rank: store.get(name).decode() if store.check([name]) else None for rank, name in names.items()}
    except (RuntimeError, OSError):  # the process that keeps the store is gone
        return {}


@contextmanager
def reporting(reports: Path) -> Iterator[None]:
    """Write down in the directory ``reports`` why the block fails, for :func:`cause`.

    That must be done before this rank leaves the group, which breaks the collectives of the others: the first report is
    the cause. A rank that is killed writes none, and its peers fail at once; they stay a moment, so that the launcher
    finds the one that died first.
    """
    rank = os.environ["RANK"]
    begun = reports / f"{rank}.begins"
    begun.write_text(str(os.getpid()), encoding="utf-8")
    begun.rename(_begun(reports, rank))
    try:
        yield
    except Exception as error:
        if not _report_of(reports, rank).exists():  # else an inner block has told already
            # A plugin's own kind of error is told as the core's kind that it derives from.
            kind = next((kind for kind in type(error).__mro__ if kind.__module__ == errors.__name__), None)
            of_rank = getattr(error, "rank", None)
            report = {
                "time": time.time_ns(),
                "rank": rank,
                "of_rank": rank if of_rank is None else str(of_rank),
                "kind": kind and kind.__name__,
                "message": str(error),
                "traceback": traceback.format_exc(),
            }
            unfinished = reports / f"{rank}.unfinished"
            unfinished.write_text(json.dumps(report), encoding="utf-8")
            unfinished.rename(_report_of(reports, rank))
            if kind is None:
                time.sleep(_LET_THE_LAUNCHER_NOTICE)
        raise


def cause(rank: int, ended: ProcessFailure, reports: Path, *, where: str = "") -> Failure:
    """Why the ranks of this node failed, where ``rank`` was the first whose process ended.

    ``where`` follows the number of a rank in the message.
    """
    if not _report_of(reports, rank).exists():
        if ended.exitcode < 0:
            name = signal.Signals(-ended.exitcode).name
            hint = ": was there too little memory?" if name == "SIGKILL" else ""
            # NCCL's watchdog aborts a process whose peer is gone.
            return Failure("WorkerError", f"rank {rank}{where} was killed by {name}{hint}", is_echo=name == "SIGABRT")
        if _begun(reports, rank).exists():
            by_signals = {128 + number: number.name for number in signal.Signals}
            how = by_signals.get(ended.exitcode, f"exit code {ended.exitcode}")
            return Failure("WorkerError", f"rank {rank}{where} was ended by {how} in the middle of its work")
        said = f": {ended.message['message']}" if isinstance(ended.message, dict) else ""
        return Failure(
            "WorkerError",
            f"rank {rank}{where} ended with exit code {ended.exitcode}{said} before it began. A script that starts "
            'several ranks must guard what it does with `if __name__ == "__main__":`, since each rank imports it',
        )
    written = [json.loads(path.read_text(encoding="utf-8")) for path in reports.glob("rank-*.json")]
    first = min(written, key=lambda report: report["time"])
    # Whose failure it is knows more of it than who was told, unless it failed of something else before it could tell.
    own = (report for report in written if report["rank"] == first["of_rank"])
    first = next((report for report in own if report["message"] == first["message"]), first)
    if first["kind"] is not None:
        return Failure(first["kind"], first["message"])
    told = first["traceback"].rstrip()
    if _LOST_CONNECTION.search(told):
        # Those that can, tell of it within moments of each other.
        begun = {int(path.name.removeprefix("begun-")) for path in reports.glob("begun-*")}
        silent = sorted(begun - {int(report["rank"]) for report in written})
        message = f"rank {first['rank']}{where} waited in vain for {_named(silent, where)}:\n{told}"
        return Failure("WorkerError", message, is_echo=True)
    is_here = _begun(reports, first["of_rank"]).exists()
    return Failure("WorkerError", f"rank {first['of_rank']}{where if is_here else ''} failed:\n{told}")


def _named(silent: list[int], where: str) -> str:
    """The ranks that the others may have waited for."""
    if not silent:
        return "another rank, which hangs or is gone"
    if len(silent) == 1:
        return f"rank {silent[0]}{where}, which hangs or is gone"
    return f"ranks {', '.join(map(str, silent))}{where}, which hang or are gone"


def started_ranks(reports: Path) -> set[int]:
    """The process ids of the ranks that have begun."""
    return {int(path.read_text(encoding="utf-8")) for path in reports.glob("begun-*")}


def has_cause(reports: Path) -> bool:
    """Whether a rank has told of a failure that is its own, and no echo of another's."""
    reported = [json.loads(path.read_text(encoding="utf-8")) for path in reports.glob("rank-*.json")]
    return any(report["kind"] is not None or not _LOST_CONNECTION.search(report["traceback"]) for report in reported)


def _begun(reports: Path, rank: int | str) -> Path:
    return reports / f"begun-{rank}"


def _report_of(reports: Path, rank: int | str) -> Path:
    return reports / f"rank-{rank}.json"
