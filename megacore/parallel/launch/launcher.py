"""Run a function on several processes, of this machine and of others, with torch's elastic launcher."""

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
from megacore.parallel.context import ParallelContext
from megacore.parallel.launch.failures import (
    find_cause,
    has_cause,
    has_failed_rank,
    recording_errors,
    report_unresponsive_ranks,
    started_ranks,
)
from megacore.parallel.launch.nodes import ONE_NODE, Nodes, join_nodes
from megacore.parallel.launch.process_group import exit_process, local_device, process_group
from megacore.parallel.launch.slurm import srun_variables
from megacore.parallel.sizes import ParallelSizes
from megacore.signals import SAME_REQUEST, SIGNALS, ExitOnSignal

_LAUNCHER = ("torch.distributed.elastic", "torch.multiprocessing")
"""Prefixes of the loggers of torch's launcher."""

_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Variables that torchrun sets for each process."""

_SIGNAL_POLL_INTERVAL = 0.1
"""Seconds between two looks for signals to pass on."""

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
        function: A function of a module, called on every rank.
        arguments: Its further arguments.
        sizes: The layout of the ranks.
        nodes: All nodes. Each starts an equal share of the ranks in a call of its own, which returns the same.
        timeout: Time limit for the nodes to start, and for a rank that waits for another one.
        settings: Settings by name that must be equal on all nodes; JSON.
        on_note: Called now and then, while waiting, with a note on the nodes that have not come yet.

    Raises:
        MegacoreError: What the first rank to fail raised, in the kind of :mod:`megacore.errors` that it derives from.
        WorkerError: When a rank died of something else, or a node did.
    """
    if launched := launched_environment(nodes):
        os.environ.update(launched)
        return _on_this_rank(_on_joined_rank, (function, arguments), sizes, timeout)
    if sizes.world == nodes.count == 1:
        return function(ParallelContext.single(local_device()), *arguments)
    ranks_here, left_over = divmod(sizes.world, nodes.count)
    if left_over:
        raise LayoutError(f"{sizes} takes {sizes.world} processes, which {nodes.count} nodes cannot share equally")
    where = f" on node {nodes.rank}" if nodes.count > 1 else ""
    with tempfile.TemporaryDirectory(prefix="megacore-ranks-") as directory, _launcher_isolated():
        logs = Path(directory)
        try:
            common = {"layout": str(sizes)} | dict(settings or {})
            with join_nodes(nodes, common, timeout=timeout, on_note=on_note) as joined:
                config = LaunchConfig(
                    min_nodes=nodes.count,
                    max_nodes=nodes.count,
                    nproc_per_node=ranks_here,
                    run_id=joined.run_id,
                    rdzv_backend="static",
                    rdzv_endpoint=joined.endpoint,
                    rdzv_configs={"rank": nodes.rank, "timeout": timeout.total_seconds()},
                    max_restarts=0,
                    logs_specs=DefaultLogsSpecs(log_dir=directory),
                    signals_to_handle="SIGHUP,SIGQUIT",  # SIGTERM and SIGINT are passed on instead
                )
                try:
                    with _passing_on_signals(logs) as received, joined.interrupted_on_failure():
                        results = elastic_launch(config, _on_started_rank)(function, arguments, sizes, timeout)
                except ChildFailedError as failed:
                    rank, ended = failed.get_first_failure()
                    if received and ended.exitcode >= 0 and not has_cause(logs):
                        number = signal.Signals(received[0])
                        raise SignalException(f"stopped by {number.name}", number) from None
                    failure = find_cause(rank, ended, logs, where=where)
                    raise joined.settle(failure).error() from None
                return results[min(results)]
        except SignalException as stopped:
            if joined.failure_elsewhere is not None:
                raise joined.failure_elsewhere.error() from None
            if stopped.sigval == signal.SIGINT:
                raise KeyboardInterrupt from None
            sys.exit(128 + stopped.sigval)


def launched_environment(nodes: Nodes = ONE_NODE) -> Mapping[str, str]:
    """Return torchrun's variables for a process that torchrun or srun has started; empty for any other process.

    Raises:
        ConfigError: When torchrun has started this process and ``nodes`` are several, or only some of the variables
            are set.
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
    """Return whether this process, of all that were started for the work, is the one that prints."""
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


def _broadcast_result(parallel: ParallelContext, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    """Return on every rank what ``function`` returns on rank 0."""
    result = [function(parallel, *arguments)]
    if parallel.mesh is not None:
        dist.broadcast_object_list(result, src=0)
    return result[0]


def _on_joined_rank(parallel: ParallelContext, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    """Do the work in a process that torchrun or srun has started."""
    with report_unresponsive_ranks(parallel):
        return _broadcast_result(parallel, function, arguments)


def _on_started_rank(
    function: Callable[..., Any], arguments: tuple[Any, ...], sizes: ParallelSizes, timeout: timedelta
) -> Any:
    """Do the work in a process that torch's launcher has started for this command."""
    exit_on_signal = ExitOnSignal(has_failed_rank)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the command that started this rank passes it on
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, exit_on_signal)
    # When that command is killed, this rank exits too. torch has asked for a SIGINT then.
    torch.multiprocessing._prctl_pr_set_pdeathsig(signal.SIGHUP)  # type: ignore[attr-defined]
    try:
        with recording_errors():
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
            result = _on_this_rank(_recording_errors_in_group, (function, arguments), sizes, timeout)
    except (Exception, SystemExit) as error:
        # torch would overwrite the error file; and what a logger has registered for the exit, such as to wait for a
        # network, is not to keep the other ranks waiting.
        exit_process(int(error.code or 0) if isinstance(error, SystemExit) else 1)
    atexit.register(exit_process, 0)
    return result


def _recording_errors_in_group(
    parallel: ParallelContext, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> Any:
    with recording_errors():  # before this rank leaves the group
        return _broadcast_result(parallel, function, arguments)


@contextmanager
def _passing_on_signals(logs: Path) -> Iterator[list[int]]:
    """Pass the first SIGTERM or SIGINT on to the ranks, as a SIGTERM; a later one ends them and this process at once.

    Yields the signals that arrived. The ranks are started with them blocked, so that none is lost while they import
    torch, nor ends that with a traceback: a terminal sends its SIGINT to them too.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # only the main thread can install handlers
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
        # Signals are blocked in the main thread, which starts the ranks, but not in this one. Python calls their
        # handlers in the main thread all the same.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        signalled: set[int] = set()
        while not is_over.wait(_SIGNAL_POLL_INTERVAL):
            if received:
                for pid in set(started_ranks(logs).values()) - signalled:
                    signalled.add(pid)
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
        for number, handler in handlers.items():
            if received and isinstance(handler, ExitOnSignal):
                handler.complete_request(received_at)
            signal.signal(number, handler)


@contextmanager
def _launcher_isolated() -> Iterator[None]:
    """Keep torch's launcher from logging errors that reach the caller anyway, and restore the signal handlers."""
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
        if threading.current_thread() is threading.main_thread():  # else neither of them can install handlers
            for number, handler in handlers.items():
                signal.signal(number, handler)
