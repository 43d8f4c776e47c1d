"""What the processes of one round of torchrun agree on before they are a group.

torchrun starts all processes anew, in a further round, when one of them has failed or a node has come or gone. Its
store outlives the round, with all that was written there. TORCHELASTIC_RESTART_COUNT does not tell rounds apart: each
node counts by itself, and only what has failed there. So the processes of a round find each other by words that no
other round has.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Callable
from datetime import timedelta
from functools import cache

import torch.distributed as dist
from torch.distributed.constants import default_pg_timeout

from megacore.errors import WorkerError

_THIS_PROCESS = uuid.uuid4().hex

_LONGEST_PAUSE = 0.25
"""Seconds between two looks into the store."""


def is_started_by_torchrun() -> bool:
    """Whether torch's elastic launcher has started this process, by itself or as torchrun."""
    return dist.is_torchelastic_launched()


def was_restarted(timeout: timedelta) -> bool:
    """Whether torchrun has started processes before those of this round. All of them must ask, and are told alike.

    Once they are, none of an earlier round writes any more. Not noticed is a round whose node 0 is new, and in which no
    node has counted a failure.

    Raises:
        WorkerError: when a process does not come in time.
    """
    if not is_started_by_torchrun():
        return False
    store, rank, world_size = _place_in_round()
    is_anew = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    if rank == 0:
        # Of the first round, unless the store is of this round only. An empty string stands for no value.
        first = store.compare_set("megacore/first process", "", _THIS_PROCESS).decode()
        is_anew = is_anew or first != _THIS_PROCESS
    words = meet("start", "anew" if is_anew else "first", store, rank, world_size, timeout=timeout)
    return "anew" in words


def store_of_group(timeout: timedelta | None) -> tuple[dist.Store, int, int]:
    """A store for the group of this round's processes, which no earlier group has used; rank and size of the group.

    All of them must ask for it.

    Raises:
        WorkerError: when a process does not come in time.
    """
    store, rank, world_size = _place_in_round()
    name, *_ = meet("group", uuid.uuid4().hex, store, rank, world_size, timeout=timeout or default_pg_timeout)
    return dist.PrefixStore(f"megacore/{name}", store), rank, world_size


def meet(about: str, word: str, store: dist.Store, rank: int, world_size: int, *, timeout: timedelta) -> list[str]:
    """Wait for all processes of this round, and return the word that each of them says, in the order of their ranks.

    What rank 0 finds in the store may be of a process that is gone, so nothing is taken for said that does not answer
    this very meeting:

        rank 2 to rank 0      knock of rank 2: f81d    under a name that an earlier knock may have had
        rank 0 to rank 2      f81d: 09ac               the name of the meeting
        rank 2 to rank 0      09ac of rank 2: word
        rank 0 to all         09ac: [word, ...]

    Raises:
        WorkerError: when one does not come in time.
    """
    deadline = time.monotonic() + timeout.total_seconds()
    knocks = [f"megacore/{about}/knock of rank {other}" for other in range(1, world_size)]
    if rank > 0:
        answer = f"megacore/{about}/{uuid.uuid4().hex}"
        store.set(knocks[rank - 1], answer)
        _wait_for([answer], store, rank, deadline)
        meeting = store.get(answer).decode()
        store.set(f"{meeting} of rank {rank}", word)
        _wait_for([meeting], store, rank, deadline)
        return json.loads(store.get(meeting))

    meeting = f"megacore/{about}/{uuid.uuid4().hex}"
    words = [f"{meeting} of rank {other}" for other in range(world_size)]

    def answer_knocks() -> None:
        if store.check(knocks):
            for knock in store.multi_get(knocks):
                store.set(knock.decode(), meeting)

    store.set(f"{meeting} of rank 0", word)
    _wait_for(words, store, rank, deadline, meanwhile=answer_knocks)
    said = [said.decode() for said in store.multi_get(words)]
    store.set(meeting, json.dumps(said))
    return said


@cache
def _place_in_round() -> tuple[dist.Store, int, int]:
    """torchrun's store, the rank of this process, and how many there are.

    Opened once: where torchrun is told not to keep the store, rank 0 does, for as long as it has it open.
    """
    return next(dist.rendezvous("env://"))


def _wait_for(
    keys: list[str], store: dist.Store, rank: int, deadline: float, *, meanwhile: Callable[[], None] = lambda: None
) -> None:
    """Wait until all ``keys`` are in the store. Not as torch does, during whose waiting no signal is heeded."""
    pause = 0.01
    while not store.check(keys):
        if time.monotonic() > deadline:
            error = WorkerError(
                f"rank {rank} waited in vain for all processes to start: one of them hangs or is gone, or "
                "parallel.timeout is too short for how long they take"
            )
            error.rank = rank
            raise error
        meanwhile()
        time.sleep(pause)
        pause = min(1.5 * pause, _LONGEST_PAUSE)
