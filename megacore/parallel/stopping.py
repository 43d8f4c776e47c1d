"""Being asked to stop by a signal: the work in hand is finished first; asked again, a process ends at once."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
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
        self.received_at = 0.0


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

    @property
    def is_granted(self) -> bool:
        return super().is_granted and not self.is_due


@contextmanager
def stop_requests(*, told: bool = True) -> Iterator[StopRequest]:
    """Within the block, which looks at it now and then, take signals as requests to stop.

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

    def ask(number: int, frame: FrameType | None) -> None:
        leave = before[signal.Signals(number)]
        if isinstance(leave, LeaveCleanly) and leave.is_due:
            leave(number, frame)
        now = time.monotonic()
        if request.signal is None:
            request.signal, request.received_at = signal.Signals(number), now
            if told:
                _tell(f"Note: {request.signal.name}: stopping once the last step is saved; again ends at once.\n")
        elif now - request.received_at > SAME_REQUEST:
            end_process(128 + number)

    taken = [number for number in SIGNALS if before[number] != signal.SIG_IGN]  # a started rank leaves SIGINT to others
    for number in taken:
        signal.signal(number, ask)
    try:
        yield request
    finally:
        if request.signal is not None:
            grant(before.values(), request.received_at)
        for number in taken:
            signal.signal(number, before[number])


def grant(handlers: Iterable[object], received_at: float) -> None:
    """Where ``handlers`` come back after a request was met, let them take no signal of it for another request."""
    for handler in handlers:
        if isinstance(handler, Leave):
            handler.grant(received_at)


def end_process(exit_code: int) -> NoReturn:
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
