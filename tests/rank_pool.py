"""Two processes joined in a gloo group, for the tests to run functions on.

Starting them takes seconds, so there is one :class:`RankPool` for the whole session, started when it is first needed;
:func:`shared_pool` returns it, to the fixture ``ranks`` in ``conftest.py`` and to whoever tests a plugin. Functions are
pickled by reference: pytest's own import mode makes a test module unknown elsewhere, so functions for ranks live in
modules that lie in ``tests`` (which is on ``sys.path``) or in the library.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

TIMEOUT = 60.0
"""Seconds that a function may take on the ranks; a deadlock lasts that long."""

GRACE = 5.0
"""Seconds that a rank has to end by itself once another one has failed, before it counts as waiting for that one."""


class RankError(Exception):
    """A function failed on a rank. The message has the kind and the traceback of what it raised there."""


class RankTimeout(RankError):
    """A function took too long on the ranks. The message says where each rank was."""


class RankPool:
    """Processes that wait for functions to run. They are started again when one died or hangs."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._processes: list[Any] = []
        self._connections: list[Connection] = []

    def run(
        self, function: Callable[..., Any], *arguments: Any, sequence_parallel: bool = False, timeout: float = TIMEOUT
    ) -> list[Any]:
        """Call ``function(parallel, *arguments)`` on every rank; return what each returned, in the order of the ranks.

        Raises:
            RankError: when it raises on one of them.
            RankTimeout: when it takes longer than ``timeout`` seconds.
        """
        if not self._processes:
            self._start()
        for connection in self._connections:
            connection.send((function, arguments, sequence_parallel))
        answers: dict[int, tuple[bool, Any]] = {}
        deadline = time.monotonic() + timeout
        while len(answers) < self.size and (left := deadline - time.monotonic()) > 0:
            waiting = {self._connections[rank]: rank for rank in range(self.size) if rank not in answers}
            for connection in multiprocessing.connection.wait(list(waiting), left):
                rank = waiting[connection]
                answers[rank] = self._receive(rank)
                if not answers[rank][0]:
                    deadline = min(deadline, time.monotonic() + GRACE)
        silent = [rank for rank in range(self.size) if rank not in answers]
        positions = {rank: self._where_it_is(rank) for rank in silent}
        if silent or not all(process.is_alive() for process in self._processes):
            self.close()
        failures = [f"rank {rank}:\n{what}" for rank, (succeeded, what) in sorted(answers.items()) if not succeeded]
        if failures:
            raise RankError("\n".join(failures))
        if silent:
            raise RankTimeout(
                "\n".join(f"rank {rank} gave no answer within {timeout:g} s; it was at\n{positions[rank]}" for rank in silent)
            )
        return [answers[rank][1] for rank in range(self.size)]

    def close(self) -> None:
        """End the processes; the next :meth:`run` starts new ones."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        for connection in self._connections:
            connection.close()
        self._processes, self._connections = [], []

    def _start(self) -> None:
        spawning = multiprocessing.get_context("spawn")
        self._directory = Path(tempfile.mkdtemp(prefix="rank-pool-"))
        for rank in range(self.size):
            ours, theirs = spawning.Pipe()
            process = spawning.Process(target=_serve, args=(theirs, rank, self.size, self._directory), daemon=True)
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

    def _where_it_is(self, rank: int) -> str:
        """The stack of a rank that gives no answer."""
        stack = self._directory / f"stack-{rank}"
        process = self._processes[rank]
        if not stack.exists():
            return "its start"
        signal.pidfd_send_signal(process_fd := _pidfd(process.pid), signal.SIGUSR1)
        del process_fd
        time.sleep(0.2)
        return stack.read_text()


@cache
def shared_pool() -> RankPool:
    """The pool of this session: two ranks."""
    return RankPool(2)


def _serve(connection: Connection, rank: int, size: int, directory: Path) -> None:
    import torch
    import torch.distributed as dist

    from megacore.parallel import ParallelContext

    with (directory / f"stack-{rank}").open("w") as stack:
        faulthandler.register(signal.SIGUSR1, file=stack, all_threads=False)
        torch.set_num_threads(1)
        dist.init_process_group("gloo", store=dist.FileStore(str(directory / "store"), size), rank=rank, world_size=size)
        while True:
            try:
                function, arguments, sequence_parallel = connection.recv()
            except EOFError:  # the session is over
                return
            try:
                parallel = ParallelContext.of_world(
                    tp=size, device=torch.device("cpu"), sequence_parallel=sequence_parallel
                )
                answer = True, function(parallel, *arguments)
            except Exception:
                answer = False, traceback.format_exc()
            try:
                connection.send(answer)
            except Exception:
                connection.send((False, f"the result cannot be sent: {traceback.format_exc()}"))
