"""``python -m megacore …`` without the seconds that Python takes to import torch.

A command is a process of its own: it has its own process id, session, environment and standard streams, takes signals
and ends with an exit code. It is forked from a process that has imported torch and megacore; in all else it is what
``python -m`` starts. So are the ranks that it starts itself, which are forked from it.

Tests of what happens while Python starts, or of torchrun, which starts processes by name, start Python themselves.
"""

from __future__ import annotations

import atexit
import ctypes
import json
import multiprocessing
import multiprocessing.context
import os
import runpy
import selectors
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import IO, Any

from megacore.testing.ranks import warm_processes

BIN = Path(__file__).parent / "bin"
"""Has programs ``megacore`` and ``warm-python``, which run as warm commands; see :func:`script_environment`."""

_LENGTH = struct.Struct("!I")
_ADDRESS = "MEGACORE_WARM_COMMANDS"
_CLONE_NEWNET = 0x40000000


class Command:
    """A running command, with what tests use of :class:`subprocess.Popen`.

    Attributes:
        pid: Its process id.
        stdout: The end of a pipe that its standard output is read from; None where that goes elsewhere.
        stderr: The same for its standard error.
        returncode: Its exit code, or the negative number of the signal that ended it; None until it is waited for.
    """

    def __init__(
        self,
        *arguments: str | Path,
        module: str = "megacore",
        stdout: int = subprocess.PIPE,
        stderr: int = subprocess.PIPE,
        environment: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        start_new_session: bool = False,
        network: str | None = None,
        imports: tuple[str, ...] = (),
    ) -> None:
        """Start ``python -m module arguments``.

        Args:
            arguments: Those of the command.
            module: The module that is run, or ``"-c"`` for a program that is the first of the arguments.
            stdout: Where its output goes: ``PIPE``, ``DEVNULL`` or a descriptor.
            stderr: The same for its errors, or ``STDOUT``.
            environment: Variables beside those of this process.
            cwd: The directory that it starts in.
            start_new_session: True for a session of its own.
            network: The name of a network namespace that it runs in.
            imports: Modules to import before it is forked, once for all later commands.
        """
        self.arguments = arguments
        self.returncode: int | None = None
        out, self.stdout = _pipe(stdout)
        err, self.stderr = (out, None) if stderr == subprocess.STDOUT else _pipe(stderr)
        words = {
            "module": module,
            "arguments": [str(argument) for argument in arguments],
            "environment": {**os.environ, **(environment or {})},
            "cwd": str(cwd or Path.cwd()),
            "session": start_new_session,
            "network": network,
            "imports": imports,
            "dies_with_client": False,
        }
        with Path(os.devnull).open() as nothing:
            self._connection = request(words, [nothing.fileno(), out, err], _server())
        for descriptor in {out, err} - {stdout, stderr}:
            os.close(descriptor)
        self.pid = _LENGTH.unpack(self._connection.recv(_LENGTH.size, socket.MSG_WAITALL))[0]

    def poll(self) -> int | None:
        """Return the exit code, or None while it runs."""
        try:
            return self.wait(timeout=0)
        except subprocess.TimeoutExpired:
            return None

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit code once it has ended."""
        if self.returncode is None:
            with selectors.DefaultSelector() as selector:
                selector.register(self._connection, selectors.EVENT_READ)
                if not selector.select(timeout):
                    raise subprocess.TimeoutExpired([*self.arguments], timeout or 0.0)
            self.returncode = exit_code(self._connection)
            self._connection.close()
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Return what it writes to its pipes until it ends."""
        read = dict.fromkeys(("stdout", "stderr"), "")

        def read_all(name: str, file: IO[str]) -> None:
            read[name] = file.read()

        files = {name: file for name in read if (file := getattr(self, name)) is not None and not file.closed}
        threads = [threading.Thread(target=read_all, args=item, daemon=True) for item in files.items()]
        for thread in threads:
            thread.start()
        try:
            self.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise
        for thread in threads:
            thread.join(timeout)
        return read["stdout"], read["stderr"]

    def send_signal(self, number: int) -> None:
        """Send it a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """End it at once."""
        self.send_signal(signal.SIGKILL)


def run(*arguments: str | Path, timeout: float = 120, **how: Any) -> subprocess.CompletedProcess[str]:
    """Run a :class:`Command` to its end; return what it wrote and its exit code."""
    command = Command(*arguments, **how)
    stdout, stderr = command.communicate(timeout)
    return subprocess.CompletedProcess(list(map(str, arguments)), command.wait(), stdout, stderr)


def script_environment() -> dict[str, str]:
    """Return the variables with which a shell script's ``megacore`` is a warm command, and torchrun's processes are."""
    return {
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "PYTHON_EXEC": str(BIN / "warm-python"),
        "MEGACORE_PYTHON": sys.executable,
        _ADDRESS: _server(),
    }


# --- the protocol


def request(words: Mapping[str, Any], descriptors: list[int], address: str) -> socket.socket:
    """Ask the server for a command with these standard streams; return a connection that says how it ends."""
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(address)
    payload = json.dumps(words).encode()
    socket.send_fds(connection, [_LENGTH.pack(len(payload))], descriptors)
    connection.sendall(payload)
    return connection


def exit_code(connection: socket.socket) -> int:
    """Wait for the exit code that the server sends at the end."""
    return struct.unpack("!i", connection.recv(4, socket.MSG_WAITALL))[0]


def _pipe(kind: int) -> tuple[int, IO[str] | None]:
    """Return a descriptor to write to, and the file that reads what is written if it is that of a pipe."""
    if kind == subprocess.PIPE:
        read, write = os.pipe()
        return write, os.fdopen(read)
    return (os.open(os.devnull, os.O_WRONLY) if kind == subprocess.DEVNULL else kind), None


# --- the server


@cache
def _server() -> str:
    """Start the process that commands are forked from; return the address of its socket."""
    directory = tempfile.TemporaryDirectory(prefix="warm-")
    atexit.register(directory.cleanup)
    address = f"{directory.name}/socket"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        warm_processes().Process(target=_serve, args=(listener,), daemon=True).start()
    return address


def _serve(listener: socket.socket) -> None:
    """Fork commands until the process that asks for them is gone."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    signal.pthread_sigmask(signal.SIG_SETMASK, ())  # whoever asked for the first process may have blocked some
    woken, wakes = socket.socketpair()
    for one in (woken, wakes):
        one.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    signal.set_wakeup_fd(wakes.fileno())
    running: dict[int, socket.socket] = {}
    with selectors.DefaultSelector() as selector:
        for readable in (listener, woken, parent.sentinel):
            selector.register(readable, selectors.EVENT_READ)
        while True:
            ready = [key.fileobj for key, _ in selector.select()]
            if parent.sentinel in ready:
                return
            for pid in [pid for pid, connection in running.items() if connection in ready]:
                selector.unregister(running[pid])
                os.kill(pid, signal.SIGKILL)  # as the program is that stands for it
            if woken in ready:
                woken.recv(1000)
                _report_ended(running, selector)
            if listener in ready:
                connection, _ = listener.accept()
                header, descriptors, _, _ = socket.recv_fds(connection, _LENGTH.size, 3)
                words = json.loads(connection.recv(*_LENGTH.unpack(header), socket.MSG_WAITALL))
                for name in words["imports"]:
                    __import__(name)
                pid = os.fork()
                if pid == 0:
                    for own in (listener, woken, wakes, connection, *running.values()):
                        own.close()
                    selector.close()
                    _become(words, descriptors)
                running[pid] = connection
                if words["dies_with_client"]:
                    selector.register(connection, selectors.EVENT_READ)
                for descriptor in descriptors:
                    os.close(descriptor)
                connection.sendall(_LENGTH.pack(pid))


def _report_ended(running: dict[int, socket.socket], selector: selectors.BaseSelector) -> None:
    while running:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            return
        with suppress(KeyError):
            selector.unregister(running[pid])
        with running.pop(pid) as connection, suppress(BrokenPipeError):  # nobody waits for it
            connection.sendall(struct.pack("!i", os.waitstatus_to_exitcode(status)))


# --- the process of a command


def _become(words: Mapping[str, Any], descriptors: list[int]) -> None:
    """Be the command, and end."""
    signal.set_wakeup_fd(-1)
    for number, handler in (
        (signal.SIGCHLD, signal.SIG_DFL),
        (signal.SIGTERM, signal.SIG_DFL),
        (signal.SIGINT, signal.default_int_handler),
    ):
        signal.signal(number, handler)
    code = 1
    try:
        if words["session"]:
            os.setsid()
        if words["network"]:
            with Path("/run/netns", words["network"]).open() as namespace:
                if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), _CLONE_NEWNET):
                    raise OSError(ctypes.get_errno(), "setns")
        for number, descriptor in enumerate(descriptors):
            os.dup2(descriptor, number)
            os.close(descriptor)
        os.environ.clear()
        os.environ.update(words["environment"])
        os.chdir(words["cwd"])
        _be_a_fresh_interpreter(words)
        code = _exit_code_of(words["module"], words["arguments"])
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    except BrokenPipeError:
        code = 120  # as Python ends when it cannot write its last output
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _be_a_fresh_interpreter(words: Mapping[str, Any]) -> None:
    import torch

    sys.stdin, sys.stdout = os.fdopen(0), os.fdopen(1, "w", buffering=1 if os.isatty(1) else -1)
    sys.stderr = os.fdopen(2, "w", buffering=1, errors="backslashreplace")
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr
    sys.path[:0] = [words["cwd"], *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    sys.argv = [words["module"], *words["arguments"]]
    if "PYTHONPATH" in os.environ and (custom := Path(sys.path[1], "sitecustomize.py")).exists():
        runpy.run_path(str(custom))
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 0)) or len(os.sched_getaffinity(0)))
    atexit._clear()
    own = multiprocessing.current_process()
    own._config["daemon"], own._identity, own._name = False, (), "MainProcess"
    multiprocessing.process._children, multiprocessing.process._parent_process = set(), None
    contexts = multiprocessing.context._concrete_contexts
    contexts["spawn"] = contexts["fork"]  # so that ranks need not import torch either


def _exit_code_of(module: str, arguments: list[str]) -> int:
    """Run the module as ``python -m`` does; return the exit code that it ends with."""
    try:
        if module == "-c":
            sys.argv = ["-c", *arguments[1:]]
            exec(compile(arguments[0], "<string>", "exec"), {"__name__": "__main__"})
        else:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as left:
        if left.code is None or isinstance(left.code, int):
            return int(left.code or 0)
        print(left.code, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        traceback.print_exc()
        sys.stderr.flush()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0
