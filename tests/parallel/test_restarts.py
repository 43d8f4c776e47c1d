"""Processes that torchrun restarts, with a store that holds what those before them have written."""

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
from megacore.parallel.launch import restarts
from megacore.parallel.launch.restarts import exchange
from warm_commands import Command

MOMENT = timedelta(seconds=1)


@pytest.fixture
def store() -> TCPStore:
    return TCPStore("localhost", 0, None, True, wait_for_workers=False)


def send(word: str, store: TCPStore, rank: int, timeout: timedelta = timedelta(seconds=30)) -> list[str]:
    """Return what one of three processes receives that sends ``word``."""
    own = TCPStore("localhost", store.port, None, False)
    return exchange(word, own, rank, 3, timeout=timeout)


def at_once(*calls: Callable[[], list[str]]) -> list[list[str]]:
    with ThreadPoolExecutor(len(calls)) as processes:
        return [future.result() for future in [processes.submit(call) for call in calls]]


def test_all_processes_of_a_round_receive_the_words_of_all(store):
    received = at_once(*(lambda rank=rank: send(f"word {rank}", store, rank) for rank in range(3)))

    assert received == [["word 0", "word 1", "word 2"]] * 3


def test_a_round_receives_no_words_of_an_earlier_one_that_was_complete_or_not(store):
    at_once(*(lambda rank=rank: send("of the first round", store, rank) for rank in range(3)))
    for ranks in ((1, 2), (0, 1), (0,)):  # those that are started before the others fail
        with pytest.raises(WorkerError):
            at_once(*(lambda rank=rank: send("of a round that failed", store, rank, MOMENT) for rank in ranks))

    def late(rank: int) -> list[str]:
        time.sleep(1.2 if rank == 1 else 0)
        return send(f"word {rank}", store, rank)

    received = at_once(*(lambda rank=rank: late(rank) for rank in range(3)))

    assert received == [["word 0", "word 1", "word 2"]] * 3


def test_a_process_that_times_out_waiting_for_another_is_named(store):
    with pytest.raises(
        WorkerError, match=r"^rank 2 timed out waiting for all processes to start: one of them hangs"
    ) as e:
        send("word", store, 2, MOMENT)

    assert e.value.rank == 2


@pytest.fixture
def round_of() -> Iterator[Callable[..., dict[str, str]]]:
    """Return the variables that torchrun sets for a process of a round on nodes of one process each."""

    def environment(port: int, *, rank: int, world_size: int, restarts: int) -> dict[str, str]:
        place = {"RANK": rank, "WORLD_SIZE": world_size, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
        meeting_point = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": True}
        counted = {"TORCHELASTIC_RUN_ID": "run", "TORCHELASTIC_RESTART_COUNT": restarts}
        return {name: str(value) for name, value in (place | meeting_point | counted).items()}

    restarts._joined.clear()
    yield environment
    restarts._joined.clear()


def test_a_first_round_that_torchrun_counts_as_a_restart_is_one(store, round_of, monkeypatch):
    for name, value in round_of(store.port, rank=0, world_size=1, restarts=1).items():
        monkeypatch.setenv(name, value)

    assert was_restarted(MOMENT)


def test_a_restart_is_known_by_the_processes_before_or_by_the_count_of_torchrun(store, round_of, monkeypatch):
    def is_restart(*, count: int, in_same_process: bool = False) -> bool:
        for name, value in round_of(store.port, rank=0, world_size=1, restarts=count).items():
            monkeypatch.setenv(name, value)
        if not in_same_process:
            restarts._joined.clear()
        return was_restarted(MOMENT)

    assert not was_restarted(MOMENT)  # not started by torchrun
    assert not is_restart(count=0)
    assert not is_restart(count=0, in_same_process=True)  # it asks for another training
    assert is_restart(count=0)  # a node has joined or left


def test_processes_form_a_group_and_know_of_the_restart_though_their_nodes_count_differently(store, round_of):
    processes = [
        Command("anew", module="launched", environment=round_of(store.port, rank=rank, world_size=2, restarts=restarts))
        for rank, restarts in enumerate((0, 1))
    ]

    told = [process.communicate(timeout=120)[0].strip() for process in processes]

    assert told == [f"True {(0, 2, False, 15.0)}"] * 2


def test_a_process_that_waits_for_others_exits_on_a_signal(store, round_of):
    script = """
from datetime import timedelta
import megacore.cli
from megacore.parallel import was_restarted
def wait():
    print("waiting", flush=True)
    was_restarted(timedelta(minutes=10))
megacore.cli.cli = wait
megacore.cli.main()
"""
    place = round_of(store.port, rank=1, world_size=2, restarts=0)
    waiting = Command(script, module="-c", environment=place)
    assert waiting.stdout is not None and waiting.stdout.readline() == "waiting\n"
    while not store.check(["megacore/run/join/1"]):
        time.sleep(0.05)
    time.sleep(1)

    waiting.send_signal(signal.SIGTERM)

    _, errors = waiting.communicate(timeout=20)
    assert (waiting.returncode, errors) == (128 + signal.SIGTERM, "")
