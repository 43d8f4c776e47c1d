"""Restart rounds of torchrun: the processes of one round find each other before they form a group.

torchrun restarts all processes, in a new round, when one has failed or a node has joined or left. torch has no means to
tell rounds apart: the agent's store outlives a round with all its keys, the number of the round is not passed on, and
each node counts TORCHELASTIC_RESTART_COUNT by itself, for failures there. So the processes of a round exchange names
that no other round has.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from megacore.errors import WorkerError

_MAX_POLL_INTERVAL = 0.25
"""Seconds between two looks into the store."""


_joined: list[tuple[Store, int, int, bool]] = []
"""The result of :func:`join_round`, once there is one."""


def was_restarted(timeout: timedelta) -> bool:
    """Return whether torchrun has started processes before those of this round; all of them must ask.

    By then no process of an earlier round writes any more. A round is missed whose node 0 is new and in which no node
    has counted a failure.

    Raises:
        WorkerError: When a process does not join in time.
    """
    return dist.is_torchelastic_launched() and join_round(timeout)[-1]


def join_round(timeout: timedelta) -> tuple[Store, int, int, bool]:
    """Wait for the other processes of this round, the first time.

    Returns:
        A store that no other round uses, the rank of this process, their number, and whether this is a restart.

    Raises:
        WorkerError: When a process does not join in time.
    """
    if not _joined:
        # Where torchrun does not share its store, rank 0 serves one for as long as this client is open.
        server, rank, world_size = next(rendezvous("env://"))
        store = PrefixStore(f"megacore/{os.environ['TORCHELASTIC_RUN_ID']}", server)
        name = uuid.uuid4().hex
        is_restart = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
        if rank == 0:
            first = store.compare_set("first round", "", name).decode()  # an empty string stands for no value
            is_restart = is_restart or first != name
        words = exchange([name, is_restart], store, rank, world_size, timeout=timeout)
        is_restart = any(restarted for _, restarted in words)
        _joined.append((PrefixStore(words[0][0], store), rank, world_size, is_restart))
    return _joined[0]


def exchange(word: object, store: Store, rank: int, world_size: int, *, timeout: timedelta) -> list[Any]:
    """Wait for all processes of this round, and return the words of all ranks, in their order. They travel as JSON.

    Keys that rank 0 finds in the store may be of a process that is gone, so it answers all of them, and counts only
    what replies to its own, unique, name:

        rank 2 to rank 0      join/2: f81d         may overwrite that of an earlier process
        rank 0 to rank 2      f81d: 09ac           the name of this exchange
        rank 2 to rank 0      09ac/2: word
        rank 0 to all         09ac: [word, ...]

    Raises:
        WorkerError: When a process does not join in time.
    """
    deadline = time.monotonic() + timeout.total_seconds()
    requests = [f"join/{other}" for other in range(1, world_size)]
    own_name = uuid.uuid4().hex
    if rank > 0:
        store.set(requests[rank - 1], own_name)
        _wait_for([own_name], store, rank, deadline)
        exchanged = store.get(own_name).decode()
        store.set(f"{exchanged}/{rank}", json.dumps(word))
        _wait_for([exchanged], store, rank, deadline)
        words: list[Any] = json.loads(store.get(exchanged))
        return words

    def answer_requests() -> None:
        if store.check(requests):
            for request in store.multi_get(requests):
                store.set(request.decode(), own_name)

    keys = [f"{own_name}/{other}" for other in range(1, world_size)]
    _wait_for(keys, store, rank, deadline, meanwhile=answer_requests)
    words = [word, *(json.loads(received) for received in store.multi_get(keys))]
    store.set(own_name, json.dumps(words))
    return words


def _wait_for(
    keys: list[str], store: Store, rank: int, deadline: float, *, meanwhile: Callable[[], None] = lambda: None
) -> None:
    """Wait until all ``keys`` are in the store. ``Store.wait`` would block signals meanwhile."""
    interval = 0.01
    while not store.check(keys):
        if time.monotonic() > deadline:
            error = WorkerError(
                f"rank {rank} timed out waiting for all processes to start: one of them hangs or is gone, or "
                "parallel.timeout is too short for the time that they take"
            )
            error.rank = rank
            raise error
        meanwhile()
        time.sleep(interval)
        interval = min(1.5 * interval, _MAX_POLL_INTERVAL)
