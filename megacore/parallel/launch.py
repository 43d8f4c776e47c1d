"""Running a function on several processes of this machine, through torch's elastic launcher."""

from __future__ import annotations

import atexit
import json
import logging
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from megacore import errors
from megacore.errors import MegacoreError, WorkerError
from megacore.parallel.context import ParallelContext, local_device, process_group
from megacore.parallel.sizes import ParallelSizes

_LAUNCHER = ("torch.distributed.elastic", "torch.multiprocessing")
"""The loggers of torch's launcher begin with this."""

_LET_THE_LAUNCHER_NOTICE = 2.0
"""Seconds that a rank stays after an error that may only be the echo of another rank's death."""


def on_ranks(function: Callable[..., Any], *arguments: Any, sizes: ParallelSizes) -> Any:
    """Call ``function(parallel, *arguments)`` on every rank and return what rank 0 returned.

    One rank is this process. Several are started by torch's elastic launcher, unless this process was itself started
    by torchrun (``RANK`` is set): then it joins the others. ``function``, ``arguments`` and the result are pickled, and
    each started rank imports the main module: a script guards what it does with ``if __name__ == "__main__":``.

    Raises:
        MegacoreError: what the first rank to fail raised, in the kind of :mod:`megacore.errors` that it is.
        WorkerError: when a rank died of something else.
    """
    if "RANK" in os.environ:
        return _on_this_rank(_told_to_all, (function, arguments), sizes)
    if sizes.world == 1:
        return function(ParallelContext.single(local_device()), *arguments)
    with tempfile.TemporaryDirectory(prefix="megacore-ranks-") as directory, _undisturbed():
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=sizes.world,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            local_addr="localhost",
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(log_dir=directory),
        )
        reports = Path(directory)
        try:
            return elastic_launch(config, _on_started_rank)(reports, function, arguments, sizes)[0]
        except ChildFailedError as failed:
            raise _cause(*failed.get_first_failure(), reports) from None
        except SignalException as stopped:
            if stopped.sigval == signal.SIGINT:
                raise KeyboardInterrupt from None
            sys.exit(128 + stopped.sigval)


def is_first_process() -> bool:
    """Whether this process speaks for all that torchrun started; a process on its own does."""
    return os.environ.get("RANK", "0") == "0"


def end_process(exit_code: int) -> NoReturn:
    """End a process that was part of a group, at once.

    torch 2.13 sometimes aborts ("terminate called without an active exception") when a process that has used gloo
    through DTensors unloads its libraries, with all work done: 3 of 24 runs of a script that did nothing but
    ``DTensor.full_tensor``. So they are not unloaded.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)


def _on_this_rank(function: Callable[..., Any], arguments: tuple[Any, ...], sizes: ParallelSizes) -> Any:
    device = local_device()
    if device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks_here))
    with process_group(device):
        parallel = ParallelContext.of_world(sizes, device=device)
        return function(parallel, *arguments)


def _told_to_all(parallel: ParallelContext, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    """What ``function`` returns on rank 0, on every rank."""
    result = [function(parallel, *arguments)]
    if parallel.mesh is not None:
        dist.broadcast_object_list(result, src=0)
    return result[0]


def _on_started_rank(
    reports: Path, function: Callable[..., Any], arguments: tuple[Any, ...], sizes: ParallelSizes
) -> Any:
    """What the launcher calls in each process that it starts."""
    signal.signal(signal.SIGTERM, _leave_cleanly)  # the launcher's, when another rank failed
    result = _on_this_rank(_reporting, (reports, function, arguments), sizes)
    atexit.register(end_process, 0)
    return result


def _reporting(
    parallel: ParallelContext, reports: Path, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> Any:
    """Call ``function``; if it fails, write down why for :func:`_cause`.

    That is done before this rank leaves the group, which breaks the collectives of the others: the first report is the
    cause. A rank that is killed writes none, and its peers fail at once; they stay a moment, so that the launcher finds
    the one that died first.
    """
    try:
        return function(parallel, *arguments)
    except Exception as error:
        # A plugin's own kind of error is told as the core's kind that it derives from.
        kind = next((kind for kind in type(error).__mro__ if kind.__module__ == errors.__name__), None)
        report = {
            "time": time.time_ns(),
            "rank": parallel.rank,
            "kind": kind and kind.__name__,
            "message": str(error),
            "traceback": traceback.format_exc(),
        }
        unfinished = reports / f"{parallel.rank}.unfinished"
        unfinished.write_text(json.dumps(report), encoding="utf-8")
        unfinished.rename(_report_of(reports, parallel.rank))
        if kind is None:
            time.sleep(_LET_THE_LAUNCHER_NOTICE)
        raise


def _report_of(reports: Path, rank: int) -> Path:
    return reports / f"rank-{rank}.json"


def _cause(rank: int, failure: ProcessFailure, reports: Path) -> MegacoreError:
    """Why the ranks failed, where ``rank`` was the first whose process ended."""
    if not _report_of(reports, rank).exists():
        if failure.exitcode < 0:
            name = signal.Signals(-failure.exitcode).name
            hint = ": was there too little memory?" if name == "SIGKILL" else ""
            return WorkerError(f"rank {rank} was killed by {name}{hint}")
        said = f": {failure.message['message']}" if isinstance(failure.message, dict) else ""
        return WorkerError(
            f"rank {rank} ended with exit code {failure.exitcode}{said} before it began. A script that starts several "
            'ranks must guard what it does with `if __name__ == "__main__":`, since each rank imports it'
        )
    written = [json.loads(path.read_text(encoding="utf-8")) for path in reports.glob("rank-*.json")]
    first = min(written, key=lambda report: report["time"])
    if first["kind"] is not None:
        return getattr(errors, first["kind"])(first["message"])
    return WorkerError(f"rank {first['rank']} failed:\n{first['traceback'].rstrip()}")


def _leave_cleanly(signal_number: int, frame: FrameType | None) -> None:
    sys.exit(128 + signal_number)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Keep the launcher from logging errors that reach the caller anyway, and give back the signals that it takes."""
    # One by one: torch gives each of the launcher's loggers a level of its own.
    loggers = [logging.getLogger(name) for name in list(logging.root.manager.loggerDict) if name.startswith(_LAUNCHER)]
    levels = [logger.level for logger in loggers]
    signals = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
    handlers = {number: signal.getsignal(number) for number in signals}
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if threading.current_thread() is threading.main_thread():  # elsewhere neither can set them
            for number, handler in handlers.items():
                signal.signal(number, handler)
