"""Signals that ask a program to end: exit by unwinding the stack, or stop after the step in progress.

Standard library only: the command line installs its handler before torch is imported. No library is used, since those
for signals belong to event loops (asyncio, anyio), and none of them covers a main thread that waits in C.
"""

from __future__ import annotations

import _thread
import math
import os
import signal
import socket
import sys
import threading
import time
import weakref
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT)
"""Signals that ask a process to stop."""

SAME_REQUEST = 1.0
"""Seconds in which a repeated signal is the same request: a batch system signals the launcher and the ranks alike."""


class ExitOnSignal:
    """A signal handler that exits by unwinding the stack, so that half-written output is removed.

    A library may catch the exit (a bare ``except`` around an import), and Python drops it in ``__del__`` and in the
    callbacks of weak references. The exception is freed then, which delivers the signal again, so that the program
    exits after the next call. Code that installs handlers of its own checks ``received`` first. A signal that arrives
    while the stack is unwound is ignored for :data:`SAME_REQUEST` seconds, and ends the process at once after that.

    Args:
        has_failed_rank: For a rank: return whether another rank has failed, so that there is no work left to finish.
            A rank ignores signals while it exits, since its launcher repeats them, and kills it in the end.

    Attributes:
        received: The first signal that arrived; ``None`` before.
    """

    def __init__(self, has_failed_rank: Callable[[], bool] | None = None) -> None:
        self.received: int | None = None
        self.has_failed_rank = has_failed_rank
        self._received_at = -math.inf
        self._completed_at = -math.inf
        self._exit: Callable[[], BaseException | None] = lambda: None

    @property
    def exit_code(self) -> int:
        """The exit code that a shell reports for a program that the signal has ended."""
        assert self.received is not None
        return 128 + self.received

    @property
    def ignores_signals(self) -> bool:
        """Return whether a signal that arrives now repeats a request that has been met."""
        return time.monotonic() - self._completed_at <= SAME_REQUEST

    def complete_request(self, received_at: float) -> None:
        """Ignore repeated signals of a request that was met; ``received_at`` is its time on ``time.monotonic()``."""
        self._completed_at = received_at

    def __call__(self, signal_number: int, frame: FrameType | None) -> None:
        if self.ignores_signals:
            return
        if self.received is None:
            self.received, self._received_at = signal_number, time.monotonic()
        elif self._exit() is not None:  # the stack is being unwound
            if self.has_failed_rank is None and time.monotonic() - self._received_at > SAME_REQUEST:
                os._exit(self.exit_code)
            return
        # A finalizer in C: the handler runs in the code that caught the exit, and not in a frame of the finalizer.
        finalizer = staticmethod(partial(_thread.interrupt_main, signal.Signals(signal_number)))
        leaving = type("SignalExit", (SystemExit,), {"__del__": finalizer})(self.exit_code)
        self._exit = weakref.ref(leaving)
        try:
            raise leaving
        finally:
            del leaving  # else this frame, which the traceback refers to, would keep the exception alive


class StopRequest:
    """A request to stop after the step in progress.

    Attributes:
        signal: The signal that made it; ``None`` before.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None


@contextmanager
def stop_requests(*, acknowledge: bool = True) -> Iterator[StopRequest]:
    """Take signals as requests to stop; the block checks the yielded request now and then.

    A second request ends the process at once, even in the middle of a call in C. The block ends only when no further
    signal can belong to the first request.

    Args:
        acknowledge: Write a note to standard error when a request arrives.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():  # only the main thread can install handlers
        yield request
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    for handler in before.values():
        if isinstance(handler, ExitOnSignal) and handler.received:  # a library has caught its exit
            sys.exit(handler.exit_code)
    first_at: float | None = None

    def exit_of_failed_run(number: int) -> ExitOnSignal | None:
        """Return the handler to call when another rank has failed, so that there is nothing left to finish."""
        handler = before[signal.Signals(number)]
        if isinstance(handler, ExitOnSignal) and handler.has_failed_rank is not None and handler.has_failed_rank():
            return handler
        return None

    def handle(number: int, frame: FrameType | None) -> None:
        if exit_now := exit_of_failed_run(number):
            exit_now(number, frame)
        if request.signal is None:
            request.signal = signal.Signals(number)
            if acknowledge:
                note = f"Note: {request.signal.name}: stopping once the last step is saved; again ends at once.\n"
                with suppress(OSError):  # a terminal's SIGINT may have ended the reader of a pipe first
                    os.write(2, note.encode())  # print would fail where the handler interrupts a print

    def arrive(number: int) -> None:
        nonlocal first_at
        now = time.monotonic()
        first_at = now if first_at is None else first_at
        if now - first_at > SAME_REQUEST and not exit_of_failed_run(number):
            os._exit(128 + number)  # without a flush: the main thread may hang in a print and hold its lock

    taken = [number for number in SIGNALS if before[number] != signal.SIG_IGN]  # a rank ignores SIGINT
    with _calling_on_arrival(arrive, taken):
        for number in taken:
            signal.signal(number, handle)
        try:
            try:
                yield request
            finally:
                if request.signal is not None:
                    began = time.monotonic() if first_at is None else first_at
                    time.sleep(max(0.0, began + SAME_REQUEST - time.monotonic()))
        finally:
            for number in taken:
                signal.signal(number, before[number])


@contextmanager
def _calling_on_arrival(callback: Callable[[int], None], numbers: Collection[int]) -> Iterator[None]:
    """Call ``callback`` in another thread with each signal of ``numbers`` as soon as it arrives.

    Python calls a handler only when the main thread returns from C (a backward pass, a collective): maybe much later,
    and once for several signals. On arrival it writes to one file descriptor per process. Other signals are passed on
    to the descriptor that was set before, such as that of asyncio.
    """
    reader, writer = socket.socketpair()
    writer.setblocking(False)

    def watch() -> None:
        while received := reader.recv(4096):
            for number in received:
                if number in numbers:
                    callback(number)
                elif previous >= 0:
                    with suppress(OSError):
                        os.write(previous, bytes([number]))

    previous = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    thread = threading.Thread(target=watch, name="signals", daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(previous)
        writer.close()
        thread.join()
        reader.close()
