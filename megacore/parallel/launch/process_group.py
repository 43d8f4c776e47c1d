"""The process group of the ranks, the device of each, and the network interface that gloo uses."""

from __future__ import annotations

import itertools
import os
import socket
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from fcntl import ioctl
from typing import NoReturn

import torch
import torch.distributed as dist
from torch.distributed.constants import default_pg_timeout

from megacore.parallel.launch.restarts import join_round

_OTHER_MACHINE = "192.0.2.1"
"""An address reserved for documentation (RFC 5737): the route to it is the one to any other machine."""

_GROUP_NUMBERS = itertools.count()
"""Numbers of the groups that this process forms one after another."""

_SIOCGIFADDR = 0x8915
"""Linux's request for an interface's IPv4 address (netdevice(7))."""


def local_device() -> torch.device:
    """Return the device of this process: its own GPU if there are any, else the CPU."""
    if torch.cuda.is_available():
        # srun --gpus-per-task shows each process a single GPU.
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) if torch.cuda.device_count() > 1 else 0)
    return torch.device("cpu")


@contextmanager
def process_group(device: torch.device, *, timeout: timedelta | None = None) -> Iterator[None]:
    """Join the processes that torchrun started (NCCL on GPUs, gloo on CPUs), and leave them at the end.

    ``timeout`` is how long a collective waits for a rank that does not take part; by default torch's own.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    elif os.environ["WORLD_SIZE"] != os.environ.get("LOCAL_WORLD_SIZE"):
        # By default gloo takes the address that this machine's own name resolves to, which may well be 127.0.1.1.
        master = os.environ["MASTER_ADDR"]
        interface = interface_towards(master)
        if interface == "lo" and not (master == "localhost" or master.startswith("127.")):
            interface = interface_towards(_OTHER_MACHINE)  # this is the master, and its own name is 127.0.1.1
        if interface is not None:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    backend = "nccl" if device.type == "cuda" else "gloo"
    if dist.is_torchelastic_launched():
        store, rank, world_size, _ = join_round(timeout or default_pg_timeout)
        store = dist.PrefixStore(f"group {next(_GROUP_NUMBERS)}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    else:
        dist.init_process_group(backend, timeout=timeout)
    try:
        yield
    finally:
        dist.destroy_process_group()


def interface_towards(host: str) -> str | None:
    """Return the network interface that leads from this machine to ``host``, by IPv4; ``None`` without a route."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, 9))  # sends nothing: the kernel looks up the route
        except OSError:
            return None
        own_address = probe.getsockname()[0]
        for _, name in socket.if_nameindex():
            try:
                answer = ioctl(probe, _SIOCGIFADDR, struct.pack("256s", name.encode()))
            except OSError:  # an interface without an address
                continue
            if socket.inet_ntoa(answer[20:24]) == own_address:
                return name
    return None


def exit_process(exit_code: int) -> NoReturn:
    """End a process that was part of a group at once, without unloading its libraries.

    torch 2.13 sometimes aborts ("terminate called without an active exception") when a process that has used gloo
    through DTensors unloads its libraries, with all work done: 3 of 24 runs of a script that did nothing but
    ``DTensor.full_tensor``.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)
