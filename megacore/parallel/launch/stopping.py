"""Being asked to stop by a signal: the work in hand is finished first; asked again, a process ends at once."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import NoReturn

from megacore.signals import SAME_REQUEST, Leave

SIGNALS = (signal.SIGTERM, signal.SIGINT)
"""What asks a process to stop."""


class StopRequest:
    """Whether this process was asked to stop.

    Attributes:
        signal: by which; ``None`` while it was not.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None


class LeaveCleanly(Leave):
    """What a rank does with a SIGTERM when nothing in it knows how to stop: it leaves, and the stack is unwound.

    The launcher sends one too when another rank has failed, whose report is then among ``reports``.
    """

    def __init__(self, reports: Path) -> None:
        super().__init__()
        self._reports = reports

    @property
    def is_due(self) -> bool:
        """Whether a rank has failed, so that there is nothing to go on with."""
        return any(self._reports.glob("rank-*.json"))


@contextmanager
def stop_requests(*, told: bool = True) -> Iterator[StopRequest]:
    """Within the block, which looks at it now and then, take signals as requests to stop.

    A second request ends the process, whatever it is doing. The block is left when no signal can be taken for one any
    more that belongs to the first.

    ``told`` says whether a request is acknowledged on standard error.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():  # elsewhere signals cannot be taken
        yield request
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    for leave in before.values():
        if isinstance(leave, Leave) and leave.received:  # its exit was caught by a library
            sys.exit(leave.exit_code)
    first_at: float | None = None

    def leaves(number: int) -> LeaveCleanly | None:
        """What is called for the signal when there is nothing to go on with."""
        leave = before[signal.Signals(number)]
        return leave if isinstance(leave, LeaveCleanly) and leave.is_due else None

    def ask(number: int, frame: FrameType | None) -> None:
        if leave := leaves(number):
            leave(number, frame)
        if request.signal is None:
            request.signal = signal.Signals(number)
            if told:
                _tell(f"Note: {request.signal.name}: stopping once the last step is saved; again ends at once.\n")

    def arrive(number: int) -> None:
        nonlocal first_at
        now = time.monotonic()
        first_at = now if first_at is None else first_at
        if now - first_at > SAME_REQUEST and not leaves(number):
            os._exit(128 + number)  # nothing is flushed: the main thread may hang in a print, and have the lock

    taken = [number for number in SIGNALS if before[number] != signal.SIG_IGN]  # a started rank leaves SIGINT to others
    with _told_on_arrival(taken, arrive):
        for number in taken:
            signal.signal(number, ask)
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
def _told_on_arrival(numbers: Collection[int], arrive: Callable[[int], None]) -> Iterator[None]:
    """Within the block, call ``arrive`` with each signal of these ``numbers`` when it arrives, in another thread.

    Python calls a handler when the main thread comes back from what it has called in C, a backward pass or a
    collective: maybe much later, and once for several signals. On arrival it only writes to a file descriptor, one for
    all of the process. Who has set one before, as asyncio does, goes on to get the other signals.
    """
    arrived, written_to = socket.socketpair()
    written_to.setblocking(False)

    def watch() -> None:
        while received := arrived.recv(4096):
            for number in received:
                if number in numbers:
                    arrive(number)
                elif other >= 0:
                    with suppress(OSError):
                        os.write(other, bytes([number]))

    other = signal.set_wakeup_fd(written_to.fileno(), warn_on_full_buffer=False)
    thread = threading.Thread(target=watch, name="signals", daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(other)
        written_to.close()
        thread.join()
        arrived.close()


def grant(handlers: Iterable[object], received_at: float) -> None:
    """Where ``handlers`` come back after a request was met, let them take no signal of it for another request."""
    for handler in handlers:
        if isinstance(handler, Leave):
            handler.grant(received_at)


def exit_process(exit_code: int) -> NoReturn:
    """End a process that was part of a group, at once.

    torch 2.13 sometimes aborts ("terminate called without an active exception") when a process that has used gloo
    through DTensors unloads its libraries, with all work done: 3 of 24 runs of a script that did nothing but
    ``DTensor.full_tensor``. So they are not unloaded.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)


def _tell(line: str) -> None:
    with suppress(OSError):  # who read it may be gone: a terminal's SIGINT ends a pipe's reader first
        os.write(2, line.encode())  # a handler may interrupt a print
