"""Two processes joined in a gloo group, for tests to run functions on.

Starting them takes seconds, so there is one :class:`RankPool` for the whole session, started when it is first needed.
The fixture ``ranks`` is that pool; a test gets it by importing :func:`ranks` into a ``conftest.py``. Functions are
pickled by reference, and pytest's import mode ``importlib`` gives a test module a name that no other process knows:
functions for ranks live in an installed package, or in a module on ``sys.path`` that is not a test.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from functools import cache
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

import pytest

TIMEOUT = 60.0
"""Seconds that a function may take; a deadlock lasts that long."""

GRACE = 2.0
"""Seconds that the other ranks have to end once one has failed; then they are taken to wait for it in a collective."""


class RankError(Exception):
    """A function failed on a rank. The message has the traceback of what it raised there."""


class RankTimeoutError(RankError):
    """A function took too long. The message has the stack of each rank that gave no answer."""


class RankPool:
    """Processes that wait for functions to run. When one dies or hangs, the next run starts them anew."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._processes: list[SpawnProcess] = []
        self._connections: list[Connection] = []

    def run(
        self, function: Callable[..., Any], *arguments: Any, sequence_parallel: bool = False, timeout: float = TIMEOUT
    ) -> list[Any]:
        """Call ``function(parallel, *arguments)`` on every rank; return what each returned, in the order of the ranks.

        Raises:
            RankError: when it raises on one of them.
            RankTimeoutError: when it takes longer than ``timeout`` seconds.
        """
        if not self._processes:
            self._start()
        for connection in self._connections:
            connection.send((function, arguments, sequence_parallel))
        results: dict[int, Any] = {}
        failures: dict[int, str] = {}
        deadline = time.monotonic() + timeout
        while pending := [rank for rank in range(self.size) if rank not in results and rank not in failures]:
            ready = wait([self._connections[rank] for rank in pending], max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for rank in (rank for rank in pending if self._connections[rank] in ready):
                succeeded, answer = self._receive(rank)
                (results if succeeded else failures)[rank] = answer
                if not succeeded:
                    deadline = min(deadline, time.monotonic() + GRACE)
        stacks = [f"rank {rank} gave no answer in {timeout:g} s:\n{self._stack(rank)}" for rank in pending]
        if pending or not all(process.is_alive() for process in self._processes):
            self.close()
        if failures:
            raise RankError("\n".join(f"rank {rank}: {failures[rank]}" for rank in sorted(failures)))
        if stacks:
            raise RankTimeoutError("\n".join(stacks))
        return [results[rank] for rank in range(self.size)]

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
            process.join()
        for connection in self._connections:
            connection.close()
        if self._processes:
            self._directory.cleanup()
        self._processes, self._connections = [], []

    def _start(self) -> None:
        spawning = multiprocessing.get_context("spawn")
        self._directory = tempfile.TemporaryDirectory(prefix="rank-pool-")
        for rank in range(self.size):
            ours, theirs = spawning.Pipe()
            process = spawning.Process(target=_serve, args=(theirs, rank, self.size, self._directory.name), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._connections.append(ours)

    def _receive(self, rank: int) -> tuple[bool, Any]:
        try:
            return self._connections[rank].recv()
        except EOFError:
            self._processes[rank].join()
            return False, f"the process ended with exit code {self._processes[rank].exitcode}"

    def _stack(self, rank: int) -> str:
        file = _stack_file(self._directory.name, rank)
        pid = self._processes[rank].pid
        if pid is None or not file.exists():
            return "not even started"
        os.kill(pid, signal.SIGUSR1)
        time.sleep(0.2)
        return file.read_text()


@cache
def shared_pool() -> RankPool:
    """The pool of this session: two ranks."""
    return RankPool(2)


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """Two ranks to run functions on."""
    yield shared_pool()
    shared_pool().close()


def _serve(connection: Connection, rank: int, size: int, directory: str) -> None:
    """What a process of the pool does until it is killed."""
    import torch
    import torch.distributed as dist

    from megacore.parallel import ParallelContext

    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(directory) / "store"), size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    with _stack_file(directory, rank).open("w") as stack:
        faulthandler.register(signal.SIGUSR1, file=stack, all_threads=False)
        while True:
            try:
                function, arguments, sequence_parallel = connection.recv()
                parallel = ParallelContext.of_world(
                    tp=size, device=torch.device("cpu"), sequence_parallel=sequence_parallel
                )
                answer = True, function(parallel, *arguments)
            except EOFError:  # the session is over
                return
            except Exception:
                answer = False, traceback.format_exc()
            connection.send(answer)


def _stack_file(directory: str, rank: int) -> Path:
    return Path(directory) / f"stack-{rank}"
