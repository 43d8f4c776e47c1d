"""Encoding pieces on several processes, with the results in order and never more than a few of them in memory."""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import threading
import traceback
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import cache, partial
from multiprocessing.connection import Connection
from typing import Any

from megacore.data.encoding import EncodedPiece, Job, PieceEncoder
from megacore.data.inputs import Piece
from megacore.errors import MegacoreError, WorkerError

_PIECES_AHEAD = 3
"""Of each process: one that it encodes and others that wait, so that it need not."""


class Encoders:
    """Processes that each make what :class:`PieceEncoder` makes; one worker is this process itself.

    They start, and read the tokenizer, as soon as this is built; leaving its ``with`` block ends them.
    """

    def __init__(self, job: Job, *, num_workers: int) -> None:
        self._job = job
        self._workers: list[tuple[Any, Connection]] = []
        # Not fork: the caller may have threads, torch's for example, whose locks a fork would copy in any state.
        context = multiprocessing.get_context("spawn")
        try:
            for _ in range(num_workers if num_workers > 1 else 0):
                ours, theirs = context.Pipe()
                process = context.Process(target=_work, args=(job, theirs), daemon=True)
                process.start()
                theirs.close()
                self._workers.append((process, ours))
        except BaseException:
            self._end()
            raise

    def __enter__(self) -> Encoders:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def encode(self, pieces: Iterable[Piece]) -> Iterator[tuple[Piece, EncodedPiece]]:
        """Each piece with what becomes of it, in order. A piece goes to the process of its number, round and round.

        Raises:
            MegacoreError: what a process raised.
            WorkerError: a process died.
        """
        if not self._workers:
            encoder = PieceEncoder(self._job)
            for number, piece in enumerate(pieces):
                yield piece, encoder.encode(number, piece)
            return
        waiting: deque[tuple[Any, Connection, Piece]] = deque()
        for number, piece in enumerate(pieces):
            process, connection = self._workers[number % len(self._workers)]
            if len(waiting) == len(self._workers) * _PIECES_AHEAD:
                yield _received(*waiting.popleft())
            _send(process, connection, (number, piece))
            waiting.append((process, connection, piece))
        while waiting:
            yield _received(*waiting.popleft())

    def _end(self) -> None:
        for process, connection in self._workers:
            connection.close()
            process.terminate()
        for process, _ in self._workers:
            process.join()


def _send(process: Any, connection: Connection, task: tuple[int, Piece]) -> None:
    try:
        connection.send(task)
    except OSError as error:
        raise _death(process) from error


def _received(process: Any, connection: Connection, piece: Piece) -> tuple[Piece, EncodedPiece]:
    try:
        result = connection.recv()
    except (EOFError, OSError) as error:
        raise _death(process) from error
    if isinstance(result, MegacoreError):
        raise result
    return piece, result


def _death(process: Any) -> WorkerError:
    process.join(timeout=5)
    killed = "-9 is what a process gets that takes too much memory: try fewer with --workers"
    # Each process imports the script that was started, as Python's multiprocessing has it.
    by_itself = 'a script that tokenizes must do so under `if __name__ == "__main__":`, or with workers=1'
    code = process.exitcode
    return WorkerError(
        f"a tokenizing process ended with exit code {code}; {by_itself if code is not None and code >= 0 else killed}"
    )


def _work(job: Job, connection: Connection) -> None:
    """The body of a process: encodes what comes, until the other end is closed."""
    # Ctrl-C reaches every process of the terminal; the one that started this one ends it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # The processes are as many as the cores: no library need start more threads.
    os.environ["RAYON_NUM_THREADS"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tasks: queue.SimpleQueue[tuple[int, Piece] | None] = queue.SimpleQueue()
    # A thread takes what comes: else the two ends could both be sending, each waiting for the other to receive.
    threading.Thread(target=_receive, args=(connection, tasks), daemon=True).start()
    # Before there is anything to do; what is wrong with the tokenizer is told when there is.
    load_encoder = cache(partial(PieceEncoder, job))
    with suppress(Exception):
        load_encoder()
    while (task := tasks.get()) is not None:
        try:
            result: EncodedPiece | MegacoreError = load_encoder().encode(*task)
        except MegacoreError as error:
            result = error
        except Exception:
            result = WorkerError(f"a tokenizing process failed:\n{traceback.format_exc()}")
        try:
            connection.send(result)
        except OSError:  # nobody waits for it any more
            return


def _receive(connection: Connection, tasks: queue.SimpleQueue[tuple[int, Piece] | None]) -> None:
    while True:
        try:
            tasks.put(connection.recv())
        except (EOFError, OSError):
            tasks.put(None)
            return
