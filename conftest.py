"""How the tests run on few cores: with one thread a process, and with processes that start in milliseconds."""

from __future__ import annotations

import multiprocessing.context
import multiprocessing.forkserver
import os
from collections.abc import Iterator

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are tiny: a second thread waits more than it works
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # else each process that compiles starts two more

_CONTEXTS = multiprocessing.context._concrete_contexts


@pytest.fixture(scope="session", autouse=True)
def warm_ranks() -> Iterator[None]:
    """Let ``run_on_ranks`` fork its ranks from a process that has imported torch, where it would start Python anew."""
    from megacore.testing.ranks import warm_processes

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(_CONTEXTS, "spawn", warm_processes())
        multiprocessing.forkserver.ensure_running()  # before a test changes where temporary files go, or blocks signals
        yield


@pytest.fixture
def cold_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ``run_on_ranks`` start Python anew for each rank, as it does outside of tests."""
    monkeypatch.setitem(_CONTEXTS, "spawn", multiprocessing.context.SpawnContext())
