"""Locks, and errors that name the file; what each writer leaves is tested with the commands that use it."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
from contextlib import ExitStack
from pathlib import Path

import pytest

from megacore.atomic_output import lock_output, output_errors, staged_directory, write_file
from megacore.errors import CheckpointError, DiskFullError, OutputError

HOLD = """if True:
    import sys, time
    from pathlib import Path
    from megacore.atomic_output import lock_output
    with lock_output(Path(sys.argv[1])):
        print("held", flush=True)
        time.sleep(60)
"""


def listing(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_a_killed_process_holds_no_lock_and_its_lock_file_is_in_nobodys_way(tmp_path):
    out = tmp_path / "out"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(out)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    with pytest.raises(OutputError, match="out is being written by another process: wait for it"), lock_output(out):
        pass

    holder.send_signal(signal.SIGKILL)
    holder.communicate()

    assert listing(tmp_path) == [".out.lock"]
    with lock_output(out):
        pass
    assert listing(tmp_path) == []


def test_a_lock_that_one_thread_takes_another_may_release(tmp_path):
    with ExitStack() as stack:
        stack.enter_context(lock_output(tmp_path / "out"))
        thread = threading.Thread(target=stack.close)
        thread.start()
        thread.join()
        with lock_output(tmp_path / "out"):
            pass


def test_a_forked_process_does_not_keep_the_lock_of_its_parent(tmp_path):
    ready, done = os.pipe(), os.pipe()
    with lock_output(tmp_path / "out"):
        child = os.fork()
        if child == 0:
            os.write(ready[1], b".")
            os.read(done[0], 1)
            os._exit(0)
        os.read(ready[0], 1)
    try:
        with lock_output(tmp_path / "out"):
            pass
    finally:
        os.write(done[1], b".")
        os.waitpid(child, 0)


def test_no_symbolic_link_is_followed_for_a_lock(tmp_path):
    victim = tmp_path / "victim"
    (tmp_path / ".out.lock").symlink_to(victim)
    with (
        pytest.raises(OutputError, match=r"out could not be written: .*\(.*\.out\.lock\)"),
        staged_directory(tmp_path / "out"),
    ):
        pass
    assert not victim.exists()


def test_a_file_that_cannot_be_finished_leaves_the_earlier_one(tmp_path, monkeypatch):
    path = tmp_path / "run.toml"
    write_file(path, "before")

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch, pytest.raises(DiskFullError, match=r"no room for .*run\.toml"):
        patch.setattr(os, "fsync", full)
        write_file(path, "after")
    assert path.read_text() == "before" and listing(tmp_path) == ["run.toml"]
    write_file(path, "after")
    assert path.read_text() == "after" and listing(tmp_path) == ["run.toml"]


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (OSError(errno.EDQUOT, "over quota"), DiskFullError, r"no room for /a/b/out \(over quota\)"),
        (OSError(errno.EROFS, "read-only"), OutputError, r"/a/b/out could not be written: read-only \(/a/b/out\)"),
        (OSError(errno.EACCES, "denied", "/a/b"), OutputError, r"/a/b/out could not be written: denied \(/a/b\)"),
        (OSError(errno.EIO, "broken", "x", None, "/a/b/out.idx"), OutputError, r"\(/a/b/out\.idx\)"),
        (OSError(errno.ENOENT, "absent", "/c/in"), CheckpointError, "/c/in could not be read: absent; /a/b/out was no"),
        (ConnectionResetError(errno.ECONNRESET, "reset"), ConnectionResetError, "reset"),
    ],
)
def test_an_error_of_the_system_names_the_file_that_it_is_about(error, kind, message):
    with pytest.raises(kind, match=message), output_errors(Path("/a/b/out")):
        raise error
