"""Signals that come at a bad moment."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megacore.parallel import stop_requests
from megacore.parallel.stopping import LeaveCleanly
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
