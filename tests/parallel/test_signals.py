"""Signals that come at a bad moment."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from megacore.parallel import stop_requests
from megacore.parallel.launch.stopping import LeaveCleanly
from megacore.signals import Leave


def test_a_signal_during_an_import_that_catches_everything_ends_the_program_after_it(tmp_path):
    (tmp_path / "optional.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGTERM)\n")
    (tmp_path / "library.py").write_text("try:\n    import optional\nexcept:\n    pass\nimported = True\n")
    script = """
import signal, sys, time
from megacore.signals import Leave
signal.signal(signal.SIGTERM, Leave())
try:
    import library
    time.sleep(60)
finally:
    print(library.imported)
"""

    ended = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=30)

    assert (ended.returncode, ended.stdout, ended.stderr) == (128 + signal.SIGTERM, "True\n", "")


@pytest.mark.parametrize(
    "dropping",
    [
        "class Dropped:\n    def __del__(self): kill()\nDropped()",
        "class Dropped: pass\none = Dropped()\nweakref.finalize(one, kill)\ndel one",
        # The callback of a WeakSet, which a signal reaches at its first line.
        "class Dropped: pass\none = Dropped()\nall = weakref.WeakSet([one])\nsys.setprofile(kill_in_callback)\ndel one",
    ],
    ids=["__del__", "finalize", "WeakSet"],
)
def test_a_signal_where_python_drops_exceptions_ends_the_program_after_it(dropping):
    script = f"""
import os, signal, sys, time, weakref
from megacore.signals import Leave
signal.signal(signal.SIGTERM, Leave())
def kill():
    os.kill(os.getpid(), signal.SIGTERM)
def kill_in_callback(frame, event, argument):
    if frame.f_code.co_name == "_remove" and event == "call":
        sys.setprofile(None)
        kill()
{dropping}
time.sleep(60)
"""

    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=30)

    assert (ended.returncode, ended.stdout, ended.stderr) == (128 + signal.SIGTERM, "", "")


@pytest.mark.parametrize("leave", [Leave(), LeaveCleanly(Path("reports"))], ids=["of the program", "of a rank"])
def test_work_that_begins_after_an_exit_that_was_caught_does_not_begin(leave):
    before = signal.signal(signal.SIGTERM, leave)
    try:
        with pytest.raises(SystemExit):
            signal.raise_signal(signal.SIGTERM)

        with pytest.raises(SystemExit) as left, stop_requests():
            pytest.fail("it began")
    finally:
        signal.signal(signal.SIGTERM, before)

    assert left.value.code == 128 + signal.SIGTERM


@pytest.mark.parametrize("kind", ["of the program", "of a rank"])
def test_a_request_that_was_met_may_come_again_for_a_second_and_then_is_another(tmp_path, kind):
    before = signal.signal(signal.SIGTERM, Leave() if kind == "of the program" else LeaveCleanly(tmp_path))
    again = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM))  # of the batch system, after the launcher's
    try:
        with stop_requests(told=False) as stop:
            again.start()
            signal.raise_signal(signal.SIGTERM)
        assert again.finished.is_set()
        with pytest.raises(SystemExit) as left:
            signal.raise_signal(signal.SIGTERM)
    finally:
        again.cancel()
        signal.signal(signal.SIGTERM, before)

    assert stop.signal == signal.SIGTERM
    assert left.value.code == 128 + signal.SIGTERM


IN_A_LONG_CALL = """
import hashlib, os, signal, sys, threading, time
from megacore.parallel import stop_requests
def signalled_twice():
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(float(sys.argv[1]))
    os.kill(os.getpid(), signal.SIGTERM)
with stop_requests() as stop:
    if sys.argv[2] == "before it":
        signal.raise_signal(signal.SIGTERM)
    threading.Thread(target=signalled_twice, daemon=True).start()
    hashlib.pbkdf2_hmac("sha512", b"", b"", int(sys.argv[3]))  # in C, as a backward pass is
print("saved")
"""


@pytest.mark.parametrize("first", ["before it", "within it"])
def test_signals_of_one_request_are_that_though_python_hears_of_them_after_a_long_call(first):
    arguments = [sys.executable, "-c", IN_A_LONG_CALL, "0.1", first, "4000000"]

    ended = subprocess.run(arguments, capture_output=True, text=True, timeout=120)

    note = "Note: SIGTERM: stopping once the last step is saved; again ends at once.\n"
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "saved\n", note)


def test_a_second_request_ends_the_process_though_it_is_in_a_long_call():
    arguments = [sys.executable, "-c", IN_A_LONG_CALL, "1.5", "within it", "1000000000"]  # minutes

    ended = subprocess.run(arguments, capture_output=True, text=True, timeout=60)

    assert (ended.returncode, ended.stdout) == (128 + signal.SIGTERM, "")


def test_who_hears_of_signals_on_arrival_goes_on_to_hear_of_those_that_ask_for_something_else():
    heard, written_to = socket.socketpair()
    written_to.setblocking(False)
    handler = signal.signal(signal.SIGUSR1, lambda number, frame: None)
    before = signal.set_wakeup_fd(written_to.fileno())  # as asyncio does
    heard.settimeout(10)
    try:
        with stop_requests():
            signal.raise_signal(signal.SIGUSR1)
            assert heard.recv(10) == bytes([signal.SIGUSR1])
        signal.raise_signal(signal.SIGUSR1)
        assert heard.recv(10) == bytes([signal.SIGUSR1])
    finally:
        signal.set_wakeup_fd(before)
        signal.signal(signal.SIGUSR1, handler)
        heard.close()
        written_to.close()


def test_a_rank_leaves_when_another_has_failed_whatever_it_was_asked_before(tmp_path):
    before = signal.signal(signal.SIGTERM, LeaveCleanly(tmp_path))
    try:
        with stop_requests(told=False):
            signal.raise_signal(signal.SIGTERM)
        (tmp_path / "rank-1.json").touch()
        with pytest.raises(SystemExit) as left:
            signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)

    assert left.value.code == 128 + signal.SIGTERM


def test_who_was_not_asked_to_stop_leaves_at_the_first_signal_after():
    before = signal.signal(signal.SIGTERM, Leave())
    try:
        with stop_requests():
            pass
        with pytest.raises(SystemExit):
            signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
