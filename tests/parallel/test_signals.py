"""Signals that arrive at a bad moment."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading

import pytest

from megacore.parallel import stop_requests
from megacore.signals import ExitOnSignal

PROGRAM = """
import os, signal, sys, time, weakref
import megacore.cli
def kill():
    os.kill(os.getpid(), signal.SIGTERM)
def wait():
    for _ in range(600):
        time.sleep(0.1)
def kill_in_callback(frame, event, argument):
    if frame.f_code.co_name == "_remove" and event == "call":
        sys.setprofile(None)
        kill()
def command():{work}
megacore.cli.cli = command
megacore.cli.main()
"""
"""``megacore`` with a single command, whose work is ``work``."""


def test_a_signal_during_an_import_that_catches_everything_ends_the_program(tmp_path):
    (tmp_path / "optional.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGTERM)\n")
    (tmp_path / "library.py").write_text("try:\n    import optional\nexcept:\n    pass\n")
    work = """
    try:
        import library
        wait()
    finally:
        print("cleaned up")
"""

    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(work=work)], cwd=tmp_path, capture_output=True, text=True, timeout=30
    )

    assert (ended.returncode, ended.stdout, ended.stderr) == (128 + signal.SIGTERM, "cleaned up\n", "")


@pytest.mark.parametrize(
    "dropping",
    [
        """
    class Dropped:
        def __del__(self): kill()
    Dropped()
""",
        """
    class Dropped: pass
    one = Dropped()
    weakref.finalize(one, kill)
    del one
""",
        # The callback of a WeakSet, which a signal reaches at its first line.
        """
    class Dropped: pass
    one = Dropped()
    all = weakref.WeakSet([one])
    sys.setprofile(kill_in_callback)
    del one
""",
    ],
    ids=["__del__", "finalize", "WeakSet"],
)
def test_a_signal_where_python_drops_exceptions_ends_the_program_after_it(dropping):
    work = f"{dropping}    wait()"

    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(work=work)], capture_output=True, text=True, timeout=30
    )

    assert (ended.returncode, ended.stdout) == (128 + signal.SIGTERM, "")


def no_rank_has_failed() -> bool:
    return False


TWICE = """
import os, signal, sys, time
from megacore.signals import ExitOnSignal
signal.signal(signal.SIGTERM, ExitOnSignal(None if sys.argv[1] == "program" else lambda: False))
try:
    signal.raise_signal(signal.SIGTERM)
finally:
    time.sleep(float(sys.argv[2]))
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.1)
    print("cleaned up", flush=True)
    os._exit(143)
"""


@pytest.mark.parametrize(
    ("kind", "pause", "printed"),
    [("program", "0.1", "cleaned up\n"), ("program", "1.2", ""), ("rank", "1.2", "cleaned up\n")],
    ids=["the same request", "a second request", "a second signal to a rank"],
)
def test_a_signal_while_the_stack_is_unwound_ends_only_the_program_and_only_as_a_second_request(kind, pause, printed):
    ended = subprocess.run([sys.executable, "-c", TWICE, kind, pause], capture_output=True, text=True, timeout=30)

    assert (ended.returncode, ended.stdout, ended.stderr) == (128 + signal.SIGTERM, printed, "")


@pytest.mark.parametrize("has_failed_rank", [None, no_rank_has_failed], ids=["of the program", "of a rank"])
def test_work_does_not_begin_after_an_exit_that_was_caught(has_failed_rank):
    before = signal.signal(signal.SIGTERM, ExitOnSignal(has_failed_rank))
    try:
        with pytest.raises(SystemExit) as caught:
            signal.raise_signal(signal.SIGTERM)

        with pytest.raises(SystemExit) as left, stop_requests():
            pytest.fail("it began")
        assert caught.value.code == left.value.code
    finally:
        signal.signal(signal.SIGTERM, before)

    assert left.value.code == 128 + signal.SIGTERM


@pytest.mark.parametrize("has_failed_rank", [None, no_rank_has_failed], ids=["of the program", "of a rank"])
def test_a_request_that_was_met_may_come_again_for_a_second_and_then_is_another(has_failed_rank):
    before = signal.signal(signal.SIGTERM, ExitOnSignal(has_failed_rank))
    again = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM))  # of the batch system, after the launcher's
    try:
        with stop_requests(acknowledge=False) as stop:
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


def test_other_signals_still_reach_the_wakeup_descriptor_that_was_set_before():
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


def test_a_rank_exits_when_another_has_failed_whatever_it_was_asked_before():
    failed_ranks: list[int] = []
    before = signal.signal(signal.SIGTERM, ExitOnSignal(lambda: bool(failed_ranks)))
    try:
        with stop_requests(acknowledge=False):
            signal.raise_signal(signal.SIGTERM)
        failed_ranks.append(1)
        with pytest.raises(SystemExit) as left:
            signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)

    assert left.value.code == 128 + signal.SIGTERM


def test_the_first_signal_after_a_block_without_a_request_exits():
    before = signal.signal(signal.SIGTERM, ExitOnSignal())
    try:
        with stop_requests():
            pass
        with pytest.raises(SystemExit) as left:
            signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)

    assert left.value.code == 128 + signal.SIGTERM
