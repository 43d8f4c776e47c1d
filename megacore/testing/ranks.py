"""A pool of processes that form gloo groups, on which tests run functions.

One :class:`RankPool` serves the whole session; it starts as many processes as a run needs and keeps them. They are
forked from a process that has imported torch and megacore, which takes seconds, so that starting one takes
milliseconds. The fixture ``ranks`` is that pool; a test gets it by importing :func:`ranks` into a ``conftest.py``.
Functions are pickled by reference, and pytest's import mode ``importlib`` gives a test module a name that no other
process can import: functions for ranks must be in an installed package, or in a module on ``sys.path`` that is not a
test. torch's own multi-process tests start new processes for each test.
"""

from __future__ import annotations

import faulthandler
import gc
import multiprocessing
import os
import pkgutil
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

import pytest

from megacore.parallel.sizes import ParallelSizes

TIMEOUT = 60.0  # seconds that a function may take; a deadlock lasts that long
GRACE = 2.0  # seconds that the other ranks have once one has failed; after that they probably wait in a collective
TWO_RANKS = ParallelSizes(tp=2)


class RankError(Exception):
    """A function failed on a rank. The message has the traceback from that rank."""


class RankTimeoutError(RankError):
    """A function took too long. The message has the stack of each rank that did not answer."""


class RankPool:
    """Processes that wait for functions to run. After one has died or hung, the next run starts new ones."""

    def __init__(self) -> None:
        self._processes: list[ForkServerProcess] = []
        self._connections: list[Connection] = []
        self._directory: tempfile.TemporaryDirectory[str] | None = None

    def run(
        self,
        function: Callable[..., Any],
        *arguments: Any,
        sizes: ParallelSizes = TWO_RANKS,
        timeout: float = TIMEOUT,
    ) -> list[Any]:
        """Call ``function(parallel, *arguments)`` on ``sizes.world`` ranks; return the results in the order of ranks.

        Raises:
            RankError: when the function raises on a rank.
            RankTimeoutError: when it takes longer than ``timeout`` seconds.
        """
        directory = self._start(sizes.world)
        store = tempfile.mktemp(prefix="store-", dir=directory)
        connections = self._connections[: sizes.world]
        for connection in connections:
            connection.send((function, arguments, sizes, store))
        results: dict[int, Any] = {}
        failures: dict[int, str] = {}
        deadline = time.monotonic() + timeout
        while pending := [rank for rank in range(sizes.world) if rank not in results and rank not in failures]:
            ready = wait([connections[rank] for rank in pending], max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for rank in (rank for rank in pending if connections[rank] in ready):
                has_succeeded, answer = self._receive(rank)
                (results if has_succeeded else failures)[rank] = answer
                if not has_succeeded:
                    deadline = min(deadline, time.monotonic() + GRACE)
        stacks = [f"rank {rank} gave no answer in {timeout:g} s:\n{self._stack(rank)}" for rank in pending]
        if failures or pending or not all(process.is_alive() for process in self._processes):
            self.close()
        if failures:
            raise RankError("\n".join(f"rank {rank}: {failures[rank]}" for rank in sorted(failures)))
        if stacks:
            raise RankTimeoutError("\n".join(stacks))
        return [results[rank] for rank in range(sizes.world)]

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
            process.join()
        for connection in self._connections:
            connection.close()
        if self._directory is not None:
            self._directory.cleanup()
        self._processes, self._connections, self._directory = [], [], None

    def _start(self, size: int) -> str:
        """Start processes until there are ``size``; return the directory that they share."""
        warm = warm_processes()
        if self._directory is None:
            self._directory = tempfile.TemporaryDirectory(prefix="rank-pool-")
        for rank in range(len(self._processes), size):
            ours, theirs = warm.Pipe()
            process = warm.Process(target=_serve, args=(theirs, rank, self._directory.name), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._connections.append(ours)
        return self._directory.name

    def _receive(self, rank: int) -> tuple[bool, Any]:
        try:
            answer: tuple[bool, Any] = self._connections[rank].recv()
            return answer
        except EOFError:
            self._processes[rank].join()
            return False, f"the process ended with exit code {self._processes[rank].exitcode}"

    def _stack(self, rank: int) -> str:
        assert self._directory is not None
        file = _stack_file(self._directory.name, rank)
        pid = self._processes[rank].pid
        if pid is None or not file.exists():
            return "not started"
        os.kill(pid, signal.SIGUSR1)
        time.sleep(0.2)
        return file.read_text()


@cache
def warm_processes() -> ForkServerContext:
    """Return the context of ``multiprocessing`` whose processes are forked with torch and megacore imported."""
    context = multiprocessing.get_context("forkserver")
    # Importing these starts no thread.
    context.set_forkserver_preload(
        ["torch", "torch.distributed.tensor", "megacore.parallel", "megacore.training.trainer"]
    )
    return context


@cache
def shared_pool() -> RankPool:
    """Return the pool of this session."""
    return RankPool()


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """Yield the pool of this session."""
    yield shared_pool()
    shared_pool().close()


def _serve(connection: Connection, rank: int, directory: str) -> None:
    """Run functions in a process of the pool until it is killed."""
    import torch
    import torch.distributed as dist
    from torch._C._distributed_c10d import FileStore

    from megacore.parallel import ParallelContext

    torch.set_num_threads(1)
    gc.freeze()  # the collector need not traverse imported modules again and again
    with _stack_file(directory, rank).open("w") as stack:
        faulthandler.register(signal.SIGUSR1, file=stack, all_threads=False)
        while True:
            try:
                function, arguments, sizes, store = connection.recv()
                if dist.is_initialized():  # only now have all ranks finished the last run
                    dist.destroy_process_group()
                    _free_groups()
                dist.init_process_group("gloo", store=FileStore(store, sizes.world), rank=rank, world_size=sizes.world)
                answer = True, function(ParallelContext.of_world(sizes, device=torch.device("cpu")), *arguments)
            except EOFError:  # the session is over
                return
            except Exception:
                answer = False, traceback.format_exc()
            connection.send(answer)


_CACHES = (
    "torch.distributed.tensor.debug:_clear_sharding_prop_cache",
    "torch.distributed.tensor._redistribute:clear_redistribute_planner_cache",
    "torch.distributed.tensor._redistribute:_gen_transform_infos.cache_clear",
    "torch.distributed.tensor._collective_utils:MeshTopoInfo.build_from_mesh.cache_clear",
)
"""Functions that clear DTensor's caches of meshes and their groups. They are private to torch and may be absent."""


def _free_groups() -> None:
    """Free the groups of an earlier run, for each of which gloo wakes up 100 times a second."""
    for clear in _CACHES:
        with suppress(ImportError, AttributeError):  # without them tests are only slower
            pkgutil.resolve_name(clear)()
    gc.collect()  # some groups are in reference cycles


def _stack_file(directory: str, rank: int) -> Path:
    return Path(directory) / f"stack-{rank}"
