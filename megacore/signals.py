"""Leaving when a signal asks for it."""

from __future__ import annotations

import math
import signal
import sys
import time
import weakref
from types import FrameType

SAME_REQUEST = 1.0
"""Seconds in which a signal that comes again is the same request: a batch system's goes to launcher and ranks alike."""

_LOOK_AGAIN = 0.05
"""Seconds after which a program that could not leave where it was tries again."""

_LOSES_EXITS = {
    "<frozen importlib._bootstrap>",  # libraries import what may be missing under an except that catches everything
    weakref.WeakSet.__init__.__code__.co_filename,  # from callbacks, Python prints and drops what is raised
    weakref.finalize.__call__.__code__.co_filename,
}
"""Files with code under which an exit would not get far."""


class Leave:
    """A signal handler that ends the program by unwinding its stack, so that half-written output is removed.

    It waits for the end of an import, of a callback of a weak reference or of a ``__del__``, where the exit would be
    caught. Whoever takes the signals over looks at ``received`` first, for the same reason.

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
        if _is_lost(frame):
            signal.signal(signal.SIGALRM, self)
            signal.setitimer(signal.ITIMER_REAL, _LOOK_AGAIN)
            return
        sys.exit(self.exit_code)


def _is_lost(frame: FrameType | None) -> bool:
    """Whether an exit that is raised in ``frame`` would not unwind the stack."""
    while frame is not None:
        if frame.f_code.co_filename in _LOSES_EXITS or frame.f_code.co_name == "__del__":
            return True
        frame = frame.f_back
    return False
