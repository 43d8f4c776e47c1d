"""Processes that torchrun starts anew, with a store that holds what those before them have written."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from torch.distributed import TCPStore

from megacore.errors import WorkerError
from megacore.parallel import was_restarted
from megacore.parallel.launch import rounds
from megacore.parallel.launch.rounds import meet
from warm_commands import Command

MOMENT = timedelta(seconds=1)


@pytest.fixture
def store() -> TCPStore:
    return TCPStore("localhost", 0, None, True, wait_for_workers=False)


def says(word: str, store: TCPStore, rank: int, timeout: timedelta = timedelta(seconds=30)) -> list[str]:
    """What one of three processes hears that says ``word``."""
    own = TCPStore("localhost", store.port, None, False)
    return meet("test", word, own, rank, 3, timeout=timeout)


def at_once(*calls: Callable[[], list[str]]) -> list[list[str]]:
    with ThreadPoolExecutor(len(calls)) as processes:
        return [future.result() for future in [processes.submit(call) for call in calls]]


def test_all_processes_of_a_round_hear_what_each_of_them_says(store):
    heard = at_once(*(lambda rank=rank: says(f"word {rank}", store, rank) for rank in range(3)))

    assert heard == [["word 0", "word 1", "word 2"]] * 3


def test_a_further_round_hears_nothing_of_those_before_that_met_or_did_not(store):
    at_once(*(lambda rank=rank: says("of the first round", store, rank) for rank in range(3)))
    for ranks in ((1, 2), (0, 1), (0,)):  # those that are started before the others fail
        with pytest.raises(WorkerError):
            at_once(*(lambda rank=rank: says("of a round that failed", store, rank, MOMENT) for rank in ranks))

    def late(rank: int) -> list[str]:
        time.sleep(1.2 if rank == 1 else 0)
        return says(f"word {rank}", store, rank)

    heard = at_once(*(lambda rank=rank: late(rank) for rank in range(3)))

    assert heard == [["word 0", "word 1", "word 2"]] * 3


def test_who_waits_in_vain_for_another_process_says_so(store):
    with pytest.raises(WorkerError, match=r"^rank 2 waited in vain for all processes to start: one of them hangs") as e:
        says("word", store, 2, MOMENT)

    assert e.value.rank == 2


@pytest.fixture
def round_of() -> Iterator[Callable[..., dict[str, str]]]:
    """Tells what torchrun tells a process of a round on nodes of one process each."""

    def environment(port: int, *, rank: int, world_size: int, restarts: int) -> dict[str, str]:
        place = {"RANK": rank, "WORLD_SIZE": world_size, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
        meeting_point = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": True}
        counted = {"TORCHELASTIC_RUN_ID": "run", "TORCHELASTIC_RESTART_COUNT": restarts}
        return {name: str(value) for name, value in (place | meeting_point | counted).items()}

    rounds._place_in_round.cache_clear()
    yield environment
    rounds._place_in_round.cache_clear()


def test_a_round_is_known_to_be_a_further_one_by_the_processes_before_or_by_what_torchrun_counts(
    store, round_of, monkeypatch
):
    def is_anew(*, restarts: int) -> bool:
        for name, value in round_of(store.port, rank=0, world_size=1, restarts=restarts).items():
            monkeypatch.setenv(name, value)
        return was_restarted(MOMENT)

    assert not was_restarted(MOMENT)  # by torchrun neither
    assert not is_anew(restarts=0)
    assert not is_anew(restarts=0)  # the same process asks for another training
    assert is_anew(restarts=1)
    monkeypatch.setattr(rounds, "_THIS_PROCESS", "another process")
    assert is_anew(restarts=0)  # a node has come or gone


def test_processes_are_a_group_and_know_that_they_were_started_anew_though_their_nodes_count_otherwise(store, round_of):
    processes = [
        Command("anew", module="launched", environment=round_of(store.port, rank=rank, world_size=2, restarts=restarts))
        for rank, restarts in enumerate((0, 1))
    ]

    told = [process.communicate(timeout=120)[0].strip() for process in processes]

    assert told == [f"True {(0, 2, False, 15.0)}"] * 2


def test_who_waits_for_other_processes_leaves_when_asked_to(store, round_of):
    script = """
import signal
from datetime import timedelta
from megacore.parallel import was_restarted
from megacore.signals import Leave
signal.signal(signal.SIGTERM, Leave())
print("waiting", flush=True)
was_restarted(timedelta(minutes=10))
"""
    place = round_of(store.port, rank=1, world_size=2, restarts=0)
    waiting = Command(script, module="-c", environment=place)
    assert waiting.stdout is not None and waiting.stdout.readline() == "waiting\n"
    while not store.check(["megacore/start/knock of rank 1"]):
        time.sleep(0.05)
    time.sleep(1)

    waiting.send_signal(signal.SIGTERM)

    _, errors = waiting.communicate(timeout=20)
    assert (waiting.returncode, errors) == (128 + signal.SIGTERM, "")
