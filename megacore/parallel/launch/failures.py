"""Failures of ranks: each writes its reason to torch's error file, where the launching command finds the cause.

torch takes the rank whose process ended first for the cause. That may be an echo: a rank that lost the connection to
the one that failed. So the files also carry the rank, the time in nanoseconds and the kind of error.
"""

from __future__ import annotations

import json
import os
import re
import signal
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import ErrorHandler, ProcessFailure

from megacore import errors
from megacore.errors import MegacoreError, WorkerError
from megacore.parallel.context import ParallelContext

_ECHO_DELAY = 2.0
"""Seconds that a rank stays after an error that may be an echo, so that the launcher sees the other rank first."""

_LOST_CONNECTION = re.compile(r"gloo/|torch\.distributed\.Dist\w+Error")
"""Pattern in the traceback of a lost connection: gloo's errors name its source file, NCCL's have types."""

_OWN, _ECHO = "own", "echo"
"""The two kinds of failure of a rank: its own, and one that follows from that of another rank."""


@dataclass(frozen=True)
class Failure:
    """The reason why the processes of a node failed.

    Attributes:
        kind: Name of a class of :mod:`megacore.errors`.
        message: Its message.
        is_echo: True if it only says that another process did not answer, whose failure would be the cause.
    """

    kind: str
    message: str
    is_echo: bool = False

    def error(self) -> MegacoreError:
        """Return the exception; a :class:`WorkerError` for a kind that is unknown here."""
        kind = getattr(errors, self.kind, None)
        if not (isinstance(kind, type) and issubclass(kind, MegacoreError)):
            kind = WorkerError
        return kind(self.message)


@dataclass(frozen=True)
class _Report:
    """The fields of megacore in an error file. ``failed_rank`` is the rank whose failure ``rank`` reports."""

    rank: int
    failed_rank: int
    time_ns: int
    kind: str | None
    message: str
    traceback: str

    @property
    def is_echo(self) -> bool:
        return self.kind is None and _LOST_CONNECTION.search(self.traceback) is not None


class _ReportingErrorHandler(ErrorHandler):
    """Writes torch's error file with the fields of :class:`_Report`, and so that it is never seen half-written."""

    def record_exception(self, error: BaseException) -> None:
        rank = int(os.environ["RANK"])
        failed_rank = getattr(error, "rank", None)
        # A plugin's own kind of error is reported as the core's kind that it derives from.
        kind = next((kind.__name__ for kind in type(error).__mro__ if kind.__module__ == errors.__name__), None)
        report = _Report(
            rank=rank,
            failed_rank=rank if failed_rank is None else failed_rank,
            time_ns=time.time_ns(),
            kind=kind,
            message=str(error),
            traceback=traceback.format_exc(),
        )
        required = {"py_callstack": report.traceback, "timestamp": str(report.time_ns // 10**9)}
        file = own_error_file()
        unfinished = file.with_suffix(".unfinished")
        unfinished.write_text(
            json.dumps({"message": {"message": report.message, "extraInfo": required | {"megacore": asdict(report)}}}),
            encoding="utf-8",
        )
        unfinished.rename(file)


@contextmanager
def recording_errors() -> Iterator[None]:
    """Write the reason why the block fails to this rank's error file.

    The block must end before the rank leaves its group, which breaks the collectives of the others: the first report is
    the cause. A killed rank writes none, and its peers fail at once, so these stay alive for :data:`_ECHO_DELAY`.
    """
    file = own_error_file()
    unfinished = file.with_name("started.unfinished")
    unfinished.write_text(str(os.getpid()), encoding="utf-8")
    unfinished.rename(file.with_name(f"started-{os.environ['RANK']}"))
    try:
        yield
    except Exception as error:
        if not file.exists():  # else an inner block has recorded it
            _ReportingErrorHandler().record_exception(error)
            if not isinstance(error, MegacoreError):
                time.sleep(_ECHO_DELAY)
        raise


def own_error_file() -> Path:
    """Return the file that torch's launcher reads when this rank has failed; those of the others lie beside it."""
    return Path(os.environ["TORCHELASTIC_ERROR_FILE"])


def has_failed_rank() -> bool:
    """Return whether a rank of this node, which runs under torch's launcher, has recorded an error."""
    file = own_error_file()
    return any(file.parents[1].glob(f"*/{file.name}"))


def find_cause(rank: int, ended: ProcessFailure, directory: Path, *, where: str = "") -> Failure:
    """Return why the ranks of this node failed, where ``rank`` was the first whose process ended.

    Args:
        rank: The first rank whose process ended.
        ended: What torch's launcher knows of it.
        directory: The launcher's directory of logs.
        where: Text that follows the number of a rank in the message.
    """
    reports = _reports(directory)
    started = started_ranks(directory)
    if not any(report.rank == rank for report in reports):
        if ended.exitcode < 0:
            name = signal.Signals(-ended.exitcode).name
            hint = ": was there too little memory?" if name == "SIGKILL" else ""
            # NCCL's watchdog aborts a process whose peer is gone.
            return Failure("WorkerError", f"rank {rank}{where} was killed by {name}{hint}", is_echo=name == "SIGABRT")
        if rank in started:
            by_signals = {128 + number: number.name for number in signal.Signals}
            how = by_signals.get(ended.exitcode, f"exit code {ended.exitcode}")
            return Failure("WorkerError", f"rank {rank}{where} was ended by {how} in the middle of its work")
        reason = f": {ended.message['message']}" if isinstance(ended.message, dict) else ""
        return Failure(
            "WorkerError",
            f"rank {rank}{where} ended with exit code {ended.exitcode}{reason} before it began. A script that starts "
            'several ranks must guard what it does with `if __name__ == "__main__":`, since each rank imports it',
        )
    first = min(reports, key=lambda report: report.time_ns)
    # The failed rank's own report says more, unless that rank failed of something else before it could write it.
    own = (report for report in reports if report.rank == first.failed_rank)
    first = next((report for report in own if report.message == first.message), first)
    if first.kind is not None:
        return Failure(first.kind, first.message)
    trace = first.traceback.rstrip()
    if first.is_echo:
        # Ranks that can write a report do so within moments of each other.
        missing = _describe_ranks(sorted(set(started) - {report.rank for report in reports}), where)
        message = f"rank {first.rank}{where} timed out waiting for {missing}:\n{trace}"
        return Failure("WorkerError", message, is_echo=True)
    is_here = first.failed_rank in started
    return Failure("WorkerError", f"rank {first.failed_rank}{where if is_here else ''} failed:\n{trace}")


def started_ranks(directory: Path) -> dict[int, int]:
    """Return the process ids of the ranks whose work has begun, by rank."""
    started = directory.rglob("started-*")
    return {int(file.name.removeprefix("started-")): int(file.read_text(encoding="utf-8")) for file in started}


def has_cause(directory: Path) -> bool:
    """Return whether a rank has reported a failure that is its own, and no echo of another's."""
    return any(not report.is_echo for report in _reports(directory))


def _reports(directory: Path) -> list[_Report]:
    messages = [json.loads(file.read_text(encoding="utf-8"))["message"] for file in directory.rglob("error.json")]
    details = [message["extraInfo"].get("megacore") for message in messages]
    return [_Report(**fields) for fields in details if fields is not None]  # torch's own have none, before the work


def _describe_ranks(ranks: list[int], where: str) -> str:
    """Name the ranks that the others may have waited for."""
    if not ranks:
        return "another rank, which hangs or is gone"
    if len(ranks) == 1:
        return f"rank {ranks[0]}{where}, which hangs or is gone"
    return f"ranks {', '.join(map(str, ranks))}{where}, which hang or are gone"


def set_failed_rank(error: BaseException, rank: int) -> None:
    """Note in an error that several ranks raise, since one has shared it with the others, that ``rank`` has failed."""
    vars(error)["rank"] = rank


def is_lost_connection(error: BaseException) -> bool:
    """Return whether ``error`` only says that another rank did not answer."""
    return _LOST_CONNECTION.search("".join(traceback.format_exception(error))) is not None


@contextmanager
def report_unresponsive_ranks(parallel: ParallelContext) -> Iterator[None]:
    """Name the ranks that failed or did not answer when the block fails on this rank.

    This is for ranks that torchrun or srun has started, whose error files no command of ours reads: they share their
    state through the store of their group.

    Raises:
        WorkerError: When the block fails since others did not answer.
        MegacoreError: What the block raises, with its rank.
    """
    try:
        yield
    except MegacoreError as error:
        error.rank = parallel.rank if error.rank is None else error.rank
        _share_failure(parallel, _OWN)
        raise
    except Exception as error:
        if not is_lost_connection(error):
            _share_failure(parallel, _OWN)
            raise
        failures = _share_failure(parallel, _ECHO)
        if failed := [rank for rank, kind in failures.items() if kind == _OWN]:
            cause = f"rank {failed[0]}, which has failed"
        else:
            cause = _describe_ranks([rank for rank, kind in failures.items() if kind is None], "")
        failure = WorkerError(f"rank {parallel.rank} timed out waiting for {cause}:\n{traceback.format_exc().rstrip()}")
        failure.rank = parallel.rank
        raise failure from error


def _share_failure(parallel: ParallelContext, kind: str) -> dict[int, str | None]:
    """Announce to the other ranks that this one has failed; return the kind of failure of each, ``None`` without any.

    The result is empty when there are no others, or the process that serves the store is gone.
    """
    if parallel.mesh is None:
        return {}
    try:
        store = dist.distributed_c10d._get_default_store()
        keys = {rank: f"megacore/failed/{rank}" for rank in range(parallel.sizes.world)}
        store.set(keys[parallel.rank], kind)
        time.sleep(_ECHO_DELAY if kind == _ECHO else 0)
        return {rank: store.get(key).decode() if store.check([key]) else None for rank, key in keys.items()}
    except (RuntimeError, OSError):
        return {}
