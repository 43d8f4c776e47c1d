"""Running a function on several processes, of this machine and of others, through torch's elastic launcher."""

from __future__ import annotations

import atexit
import logging
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from megacore.errors import ConfigError, LayoutError
from megacore.parallel.context import ParallelContext, local_device, process_group
from megacore.parallel.launch.failures import cause, has_cause, report_unresponsive_ranks, reporting, started_ranks
from megacore.parallel.launch.nodes import ONE_NODE, Nodes, joined_nodes
from megacore.parallel.launch.slurm import srun_variables
from megacore.parallel.launch.stopping import SIGNALS, LeaveCleanly, exit_process, grant
from megacore.parallel.sizes import ParallelSizes
from megacore.signals import SAME_REQUEST

_LAUNCHER = ("torch.distributed.elastic", "torch.multiprocessing")
"""The loggers of torch's launcher begin with this."""

_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun tells each process."""

_LOOK_FOR_SIGNALS = 0.1
"""Seconds."""

HALF_AN_HOUR = timedelta(minutes=30)


def run_on_ranks(
    function: Callable[..., Any],
    *arguments: Any,
    sizes: ParallelSizes,
    nodes: Nodes = ONE_NODE,
    timeout: timedelta = HALF_AN_HOUR,
    settings: Mapping[str, Any] | None = None,
    on_note: Callable[[str], None] | None = None,
) -> Any:
    """Call ``function(parallel, *arguments)`` on every rank and return what rank 0 returned.

    One rank is this process. Several are started by torch's elastic launcher, unless this process was itself started
    by torchrun or srun: then it joins the others. ``function``, ``arguments`` and the result are pickled, and
    each started rank imports the main module: a script guards what it does with ``if __name__ == "__main__":``.

    Args:
        function: is called on every rank, as one of a module.
        arguments: for it.
        sizes: how the ranks are laid out.
        nodes: each starts an equal share of the ranks, in a call of its own, which returns the same.
        timeout: how long the nodes wait for each other at the start, and a rank for another one.
        settings: by name, what must be the same on all nodes; JSON.
        on_note: is told, now and then, which nodes have not come yet.

    Raises:
        MegacoreError: what the first rank to fail raised, in the kind of :mod:`megacore.errors` that it is.
        WorkerError: when a rank died of something else, or a node did.
    """
    if launched := launched_environment(nodes):
        os.environ.update(launched)
        return _on_this_rank(_among_launched, (function, arguments), sizes, timeout)
    if sizes.world == nodes.count == 1:
        return function(ParallelContext.single(local_device()), *arguments)
    ranks_here, left_over = divmod(sizes.world, nodes.count)
    if left_over:
        raise LayoutError(f"{sizes} takes {sizes.world} processes, which {nodes.count} nodes cannot share equally")
    where = f" on node {nodes.rank}" if nodes.count > 1 else ""
    with tempfile.TemporaryDirectory(prefix="megacore-ranks-") as directory, _undisturbed():
        reports = Path(directory)
        try:
            told = {"layout": str(sizes)} | dict(settings or {})
            with joined_nodes(nodes, told, timeout=timeout, on_note=on_note) as link:
                config = LaunchConfig(
                    min_nodes=nodes.count,
                    max_nodes=nodes.count,
                    nproc_per_node=ranks_here,
                    run_id="megacore",
                    rdzv_backend="static",
                    rdzv_endpoint="{}:{}".format(*link.store),
                    rdzv_configs={"rank": nodes.rank, "timeout": timeout.total_seconds()},
                    max_restarts=0,
                    logs_specs=DefaultLogsSpecs(log_dir=directory),
                    signals_to_handle="SIGHUP,SIGQUIT",  # the others are passed on, not taken for the end
                )
                try:
                    with _passing_on_signals(reports) as received, link.ending_ranks():
                        results = elastic_launch(config, _on_started_rank)(reports, function, arguments, sizes, timeout)
                except ChildFailedError as failed:
                    rank, ended = failed.get_first_failure()
                    if received and ended.exitcode >= 0 and not has_cause(reports):
                        number = signal.Signals(received[0])
                        raise SignalException(f"stopped by {number.name}", number) from None
                    failure = cause(rank, ended, reports, where=where)
                    raise link.settle(failure).error() from None
                return results[min(results)]
        except SignalException as stopped:
            if link.failure_elsewhere is not None:
                raise link.failure_elsewhere.error() from None
            if stopped.sigval == signal.SIGINT:
                raise KeyboardInterrupt from None
            sys.exit(128 + stopped.sigval)


def launched_environment(nodes: Nodes = ONE_NODE) -> Mapping[str, str]:
    """The variables by which torchrun or srun tells this process of its place; empty where it starts the others itself.

    Raises:
        ConfigError: when torchrun has started it, and it is told of several nodes all the same; when only some of
            torchrun's variables are there.
    """
    if "RANK" in os.environ:
        if missing := [name for name in _TORCHRUN if name not in os.environ]:
            raise ConfigError(
                f"the environment variable RANK says that torchrun has started this process, but {', '.join(missing)} "
                "of its variables are not there: start it with torchrun, or unset RANK"
            )
        if nodes.count > 1:
            raise ConfigError("under torchrun, which knows the nodes (--nnodes), --nodes is left out")
        return os.environ
    if nodes.count > 1:
        return {}  # srun, if it is there, starts one command a node, which starts the ranks
    return srun_variables(os.environ)


def is_first_process(nodes: Nodes = ONE_NODE) -> bool:
    """Whether this process speaks for all that were started for the work; one on its own does."""
    return nodes.rank == 0 and launched_environment(nodes).get("RANK", "0") == "0"


def _on_this_rank(
    function: Callable[..., Any], arguments: tuple[Any, ...], sizes: ParallelSizes, timeout: timedelta
) -> Any:
    device = local_device()
    if device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks_here))
    with process_group(device, timeout=timeout):
        parallel = ParallelContext.of_world(sizes, device=device, timeout=timeout)
        return function(parallel, *arguments)


def _told_to_all(parallel: ParallelContext, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    """What ``function`` returns on rank 0, on every rank."""
    result = [function(parallel, *arguments)]
    if parallel.mesh is not None:
        dist.broadcast_object_list(result, src=0)
    return result[0]


def _among_launched(parallel: ParallelContext, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    with report_unresponsive_ranks(parallel):
        return _told_to_all(parallel, function, arguments)


def _on_started_rank(
    reports: Path, function: Callable[..., Any], arguments: tuple[Any, ...], sizes: ParallelSizes, timeout: timedelta
) -> Any:
    """What the launcher calls in each process that it starts."""
    leave_cleanly = LeaveCleanly(reports)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the command that started this rank passes it on
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, leave_cleanly)
    # When that command is killed, this rank leaves too. torch has asked for a SIGINT then.
    torch.multiprocessing._prctl_pr_set_pdeathsig(signal.SIGHUP)  # type: ignore[attr-defined]
    try:
        with reporting(reports):
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
            result = _on_this_rank(_reporting, (reports, function, arguments), sizes, timeout)
    except Exception:
        # It is reported. torch would write it to one more file, which it leaves behind; and nothing that a logger has
        # registered for the exit, such as to wait for a network, is to keep the other ranks waiting.
        exit_process(1)
    atexit.register(exit_process, 0)
    return result


def _reporting(
    parallel: ParallelContext, reports: Path, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> Any:
    with reporting(reports):  # before this rank leaves the group
        return _told_to_all(parallel, function, arguments)


@contextmanager
def _passing_on_signals(reports: Path) -> Iterator[list[int]]:
    """Pass a SIGTERM or SIGINT on to the ranks, once, as a SIGTERM; a later one ends them, and this process, at once.

    Yields the signals that came. The ranks are born with them blocked, so that none is lost while they import torch,
    nor ends that with a traceback: a terminal sends its SIGINT to them too.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # elsewhere signals cannot be taken
        yield received
        return
    received_at = 0.0
    is_over = threading.Event()

    def receive(number: int, frame: FrameType | None) -> None:
        nonlocal received_at
        received.append(number)
        if len(received) == 1:
            received_at = time.monotonic()
        elif time.monotonic() - received_at > SAME_REQUEST:
            for rank in multiprocessing.active_children():
                rank.kill()
            raise SignalException(f"stopped by {signal.Signals(number).name}", signal.Signals(number))

    def pass_on() -> None:
        # This thread, unlike the one that starts the ranks, lets signals come. Python calls their handlers in that one.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        told: set[int] = set()
        while not is_over.wait(_LOOK_FOR_SIGNALS):
            if received:
                for pid in started_ranks(reports) - told:
                    told.add(pid)
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGTERM)

    handlers = {number: signal.signal(number, receive) for number in SIGNALS}
    thread = threading.Thread(target=pass_on, daemon=True)
    thread.start()
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield received
    finally:
        is_over.set()
        thread.join()
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if received:
            grant(handlers.values(), received_at)
        for number, handler in handlers.items():
            signal.signal(number, handler)


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
