"""Leaving when a signal asks for it."""

from __future__ import annotations

import math
import signal
import sys
import time
from types import FrameType

SAME_REQUEST = 1.0
"""Seconds in which a signal that comes again is the same request: a batch system's goes to launcher and ranks alike."""

_LOOK_AGAIN = 0.05
"""Seconds after which a program that could not leave in the middle of an import tries again."""


class Leave:
    """A signal handler that ends the program by unwinding its stack, so that half-written output is removed.

    It waits for the end of an import: libraries import what may be missing under an ``except`` that catches everything,
    the exit with it. Whoever takes the signals over looks at ``received`` first, for the same reason.

    Attributes:
        received: the first signal that came; ``None`` before.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._granted_at = -math.inf

    def grant(self, received_at: float) -> None:
        """Take the signals of a request that came at ``received_at``, of ``time.monotonic()``, for done with."""
        self._granted_at = received_at

    @property
    def is_granted(self) -> bool:
        """Whether a signal that comes now is one of a request that was granted."""
        return time.monotonic() - self._granted_at <= SAME_REQUEST

    @property
    def exit_code(self) -> int:
        """What a shell expects of a program that a signal has ended."""
        assert self.received is not None
        return 128 + self.received

    def __call__(self, signal_number: int, frame: FrameType | None) -> None:
        if signal_number != signal.SIGALRM:
            if self.is_granted:
                return
            self.received = self.received or signal_number
        if _imports(frame):
            signal.signal(signal.SIGALRM, self)
            signal.setitimer(signal.ITIMER_REAL, _LOOK_AGAIN)
            return
        sys.exit(self.exit_code)


def _imports(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False
