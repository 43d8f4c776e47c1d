"""Running a function on several processes, of this machine and of others, through torch's elastic launcher."""

from __future__ import annotations

import atexit
import logging
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from megacore.errors import ConfigError, LayoutError
from megacore.parallel.context import ParallelContext, local_device, process_group
from megacore.parallel.failures import cause, reporting
from megacore.parallel.nodes import ONE_NODE, Nodes, joined_nodes
from megacore.parallel.sizes import ParallelSizes
from megacore.parallel.slurm import srun_variables

_LAUNCHER = ("torch.distributed.elastic", "torch.multiprocessing")
"""The loggers of torch's launcher begin with this."""

_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun tells each process."""

HALF_AN_HOUR = timedelta(minutes=30)


def on_ranks(
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
        return _on_this_rank(_told_to_all, (function, arguments), sizes, timeout)
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
                )
                try:
                    with link.ending_ranks():
                        results = elastic_launch(config, _on_started_rank)(reports, function, arguments, sizes, timeout)
                except ChildFailedError as failed:
                    failure = cause(*failed.get_first_failure(), reports, where=where)
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


def end_process(exit_code: int) -> NoReturn:
    """End a process that was part of a group, at once.

    torch 2.13 sometimes aborts ("terminate called without an active exception") when a process that has used gloo
    through DTensors unloads its libraries, with all work done: 3 of 24 runs of a script that did nothing but
    ``DTensor.full_tensor``. So they are not unloaded.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)


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


def _on_started_rank(
    reports: Path, function: Callable[..., Any], arguments: tuple[Any, ...], sizes: ParallelSizes, timeout: timedelta
) -> Any:
    """What the launcher calls in each process that it starts."""
    signal.signal(signal.SIGTERM, _leave_cleanly)  # the launcher's, when another rank failed
    with reporting(reports):
        result = _on_this_rank(_reporting, (reports, function, arguments), sizes, timeout)
    atexit.register(end_process, 0)
    return result


def _reporting(
    parallel: ParallelContext, reports: Path, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> Any:
    with reporting(reports):  # before this rank leaves the group
        return _told_to_all(parallel, function, arguments)


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
