"""The programs of scripts and of torchrun that run as warm commands; see ``warm_commands.py``. Imports nothing slow.

It is called with the words of ``python``, of which it takes ``-u`` and ``-m``.
"""

import json
import os
import signal
import socket
import struct
import sys

words = sys.argv[1:]
if words[0] == "-u":
    del words[0]
assert words[0] == "-m", words
request = {
    "module": words[1],
    "arguments": words[2:],
    "environment": dict(os.environ),
    "cwd": os.getcwd(),  # noqa: PTH109
    "session": False,
    "network": None,
    "imports": (),
    "dies_with_client": True,
}
payload = json.dumps(request).encode()
with socket.socket(socket.AF_UNIX) as connection:
    connection.connect(os.environ["MEGACORE_WARM_COMMANDS"])
    socket.send_fds(connection, [struct.pack("!I", len(payload))], [0, 1, 2])
    connection.sendall(payload)
    [pid] = struct.unpack("!I", connection.recv(4, socket.MSG_WAITALL))
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: os.kill(pid, number))
    [code] = struct.unpack("!i", connection.recv(4, socket.MSG_WAITALL))
if code < 0:
    signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
sys.exit(code)
