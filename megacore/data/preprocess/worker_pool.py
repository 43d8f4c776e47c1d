"""Encoding pieces on several processes, with the results in order and never more than a few of them in memory."""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import subprocess
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from multiprocessing.connection import Connection

from megacore.data.preprocess.encoder import EncodedPiece, Job, PieceEncoder
from megacore.data.preprocess.readers import Piece
from megacore.errors import MegacoreError, WorkerError

_PIECES_AHEAD = 3
"""Of each process: one that it encodes and others that wait, so that it need not."""

_WORTH_A_LIBRARY = 1 << 20
"""Bytes of input below which nobody would notice that a faster library is not installed."""

_ONE_THREAD = {
    "RAYON_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "FASTOKENS_BPE_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}
"""The processes are as many as the cores: what threads a library would start, and let spin, are in their way."""


class Encoders:
    """Processes that each make what :class:`PieceEncoder` makes; one worker is this process itself.

    They start, and read the tokenizer, as soon as this is built; leaving its ``with`` block ends them. ``report`` is
    told once why no faster library encodes, where one was to.
    """

    def __init__(self, job: Job, *, num_workers: int, report: Callable[[str], None] = lambda note: None) -> None:
        self._job = job
        self._report = report
        self._workers: list[_Worker] = []
        try:
            for _ in range(num_workers if num_workers > 1 else 0):
                self._workers.append(_Worker.start(job))
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
        num_bytes, is_told = 0, False
        for piece, encoded in self._encode(pieces):
            num_bytes += piece.num_input_bytes
            left_out = encoded.left_out
            if left_out is not None and not is_told and (num_bytes >= _WORTH_A_LIBRARY or not left_out.is_missing):
                self._report(f"{encoded.engine} encodes alone: {left_out.reason}")
                is_told = True
            yield piece, encoded

    def _encode(self, pieces: Iterable[Piece]) -> Iterator[tuple[Piece, EncodedPiece]]:
        if not self._workers:
            encoder = PieceEncoder(self._job)
            for number, piece in enumerate(pieces):
                yield piece, encoder.encode(number, piece)
            return
        waiting: deque[tuple[_Worker, Piece]] = deque()
        for number, piece in enumerate(pieces):
            worker = self._workers[number % len(self._workers)]
            if len(waiting) == len(self._workers) * _PIECES_AHEAD:
                earlier, first = waiting.popleft()
                yield first, earlier.receive()
            worker.send((number, piece))
            waiting.append((worker, piece))
        while waiting:
            earlier, first = waiting.popleft()
            yield first, earlier.receive()

    def _end(self) -> None:
        for worker in self._workers:
            worker.connection.close()
            worker.process.terminate()
        for worker in self._workers:
            worker.process.wait()


@dataclass(frozen=True)
class _Worker:
    """A process, and the connection to it."""

    process: subprocess.Popen[bytes]
    connection: Connection

    @classmethod
    def start(cls, job: Job) -> _Worker:
        # Not by a fork: the caller may have threads, torch's for example, whose locks a fork would copy in any state.
        # Nor by multiprocessing, whose processes import the script that was started, and all that it imports.
        ours, theirs = multiprocessing.Pipe()
        with theirs:
            body = f"from megacore.data.preprocess.worker_pool import work; work({theirs.fileno()})"
            process = subprocess.Popen(
                [sys.executable, "-P", "-c", body],
                pass_fds=[theirs.fileno()],
                env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), **_ONE_THREAD},
            )
        worker = cls(process, ours)
        worker.send(job)
        return worker

    def send(self, message: Job | tuple[int, Piece]) -> None:
        try:
            self.connection.send(message)
        except OSError as error:
            raise self._death() from error

    def receive(self) -> EncodedPiece:
        try:
            result = self.connection.recv()
        except (EOFError, OSError) as error:
            raise self._death() from error
        if isinstance(result, MegacoreError):
            raise result
        return result

    def _death(self) -> WorkerError:
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=5)
        return WorkerError(
            f"a tokenizing process ended with exit code {self.process.returncode}; -9 is what a process gets that "
            "takes too much memory: try fewer with --workers"
        )


def work(descriptor: int) -> None:
    """The body of a process: encodes what comes over a connection, until its other end is closed."""
    # Ctrl-C reaches every process of the terminal; the one that started this one ends it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    connection = Connection(descriptor)
    try:
        job = connection.recv()
    except (EOFError, OSError):
        return
    tasks: queue.SimpleQueue[tuple[int, Piece] | None] = queue.SimpleQueue()
    # A thread takes what comes: else the two ends could both be sending, each waiting for the other to receive.
    threading.Thread(target=_receive, args=(connection, tasks), daemon=True).start()
    # Before there is anything to do; what is wrong with the tokenizer is told when there is.
    load_encoder = cache(partial(PieceEncoder, job, one_thread=True))
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
