"""Encoding of pieces in several processes, with results in order and only a few pieces in memory.

``concurrent.futures.ProcessPoolExecutor`` does not fit. Its processes import the caller's script, so that a script
without ``if __name__ == "__main__":`` fails with ``BrokenProcessPool``, and they survive a caller that is killed. The
processes here do not import the script, and end when the connection to the caller is closed.
"""

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
"""Number of pieces assigned to a process at a time: one that it encodes and others queued, so that it never waits."""

_REPORT_MISSING_ENGINE_BYTES = 1 << 20
"""Bytes of input from which it is worth reporting that a faster library is not installed."""

_SINGLE_THREAD_ENVIRONMENT = {
    "RAYON_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "FASTOKENS_BPE_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}
"""Environment of the processes. There are as many as cores, so threads of libraries would only compete with them."""


class Encoders:
    """A pool of processes that encode with :class:`PieceEncoder`; with one worker, the calling process encodes.

    The processes start, and load the tokenizer, at construction; leaving the ``with`` block ends them. ``report`` is
    called once with the reason if a faster library was requested and is not used.
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
        """Yield each piece with its result, in order. Pieces are assigned to the processes in turn.

        Raises:
            MegacoreError: The error that a process raised.
            WorkerError: A process died.
        """
        num_bytes, is_reported = 0, False
        for piece, encoded in self._encode(pieces):
            num_bytes += piece.num_input_bytes
            unused = encoded.unused
            is_large = num_bytes >= _REPORT_MISSING_ENGINE_BYTES
            if unused is not None and not is_reported and (is_large or not unused.is_missing):
                self._report(f"{encoded.engine} is used alone: {unused.reason}")
                is_reported = True
            yield piece, encoded

    def _encode(self, pieces: Iterable[Piece]) -> Iterator[tuple[Piece, EncodedPiece]]:
        if not self._workers:
            encoder = PieceEncoder(self._job)
            for number, piece in enumerate(pieces):
                yield piece, encoder.encode(number, piece)
            return
        pending: deque[tuple[_Worker, Piece]] = deque()
        for number, piece in enumerate(pieces):
            worker = self._workers[number % len(self._workers)]
            if len(pending) == len(self._workers) * _PIECES_AHEAD:
                first_worker, first = pending.popleft()
                yield first, first_worker.receive()
            worker.send((number, piece))
            pending.append((worker, piece))
        while pending:
            first_worker, first = pending.popleft()
            yield first, first_worker.receive()

    def _end(self) -> None:
        for worker in self._workers:
            worker.connection.close()
            worker.process.terminate()
        for worker in self._workers:
            worker.process.wait()


@dataclass(frozen=True)
class _Worker:
    """A worker process and the connection to it."""

    process: subprocess.Popen[bytes]
    connection: Connection

    @classmethod
    def start(cls, job: Job) -> _Worker:
        # A fork would copy locks of the caller's threads, such as torch's, in any state.
        ours, theirs = multiprocessing.Pipe()
        with theirs:
            body = f"from megacore.data.preprocess.worker_pool import work; work({theirs.fileno()})"
            process = subprocess.Popen(
                [sys.executable, "-P", "-c", body],
                pass_fds=[theirs.fileno()],
                env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), **_SINGLE_THREAD_ENVIRONMENT},
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
            result: EncodedPiece | MegacoreError = self.connection.recv()
        except (EOFError, OSError) as error:
            raise self._death() from error
        if isinstance(result, MegacoreError):
            raise result
        return result

    def _death(self) -> WorkerError:
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=5)
        return WorkerError(
            f"a tokenizing process ended with exit code {self.process.returncode}; -9 usually means that it took too "
            "much memory: try fewer with --workers"
        )


def work(descriptor: int) -> None:
    """Run a worker process: encode the pieces that arrive over a connection until its other end is closed."""
    # Ctrl-C reaches every process of the terminal; the caller ends this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    connection = Connection(descriptor)
    try:
        job = connection.recv()
    except (EOFError, OSError):
        return
    tasks: queue.SimpleQueue[tuple[int, Piece] | None] = queue.SimpleQueue()
    # A thread receives, since otherwise the two ends could both be sending, each pending for the other to receive.
    threading.Thread(target=_receive, args=(connection, tasks), daemon=True).start()
    # Load the tokenizer before the first piece; its error, if any, is the result of that piece.
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
        except OSError:  # the caller is gone
            return


def _receive(connection: Connection, tasks: queue.SimpleQueue[tuple[int, Piece] | None]) -> None:
    while True:
        try:
            tasks.put(connection.recv())
        except (EOFError, OSError):
            tasks.put(None)
            return
