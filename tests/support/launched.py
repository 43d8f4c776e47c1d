"""What the tests of launching run in other processes; in a module of its own, so that those can import it."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from megacore.errors import DataError
from megacore.parallel import Nodes, ParallelContext, ParallelSizes, is_first_process, run_on_ranks, was_restarted


class OfAPluginError(DataError):
    """A plugin's own kind of error."""


def place_and_sum(parallel: ParallelContext, number: int) -> tuple[int, int, bool, float]:
    """This rank, the size, whether the sequence is cut, and ``number`` times each rank + 1, summed over the ranks."""
    total = torch.tensor(float(number * (parallel.tp_rank + 1)))
    if parallel.mesh is not None:
        dist.all_reduce(total)
    return parallel.tp_rank, parallel.tp_size, parallel.sequence_parallel, total.item()


def refuse_on(parallel: ParallelContext, rank: int, kind: type[DataError]) -> None:
    """A user's mistake that shows on one rank only, while the others wait for it."""
    if parallel.tp_rank == rank:
        raise kind("line 7: not a number.\nWrite one")
    dist.barrier()


def programming_error_on(parallel: ParallelContext, rank: int) -> None:
    if parallel.tp_rank == rank:
        raise ZeroDivisionError("one over nothing")
    dist.barrier()


def exiting_on(parallel: ParallelContext, rank: int, signal_number: int | None) -> None:
    """Leave on one rank, by a signal or by itself, while the others wait for it."""
    dist.barrier()
    if parallel.tp_rank == rank:
        if signal_number is None:
            sys.exit(255)
        os.kill(os.getpid(), signal_number)
    dist.barrier()


def killed_on(parallel: ParallelContext, rank: int) -> None:
    dist.barrier()
    if parallel.tp_rank == rank:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def hang_on(parallel: ParallelContext, rank: int) -> None:
    """One rank does not come to where the others wait for it."""
    if parallel.rank == rank:
        time.sleep(60)
    dist.barrier()


def seconds_in_vain(parallel: ParallelContext) -> float:
    """How long the first tensor-parallel rank of each group waits for the second, where the timeout is one second."""
    own = ParallelContext.of_world(parallel.sizes, device=parallel.device, timeout=timedelta(seconds=1))
    dist.barrier()
    started = time.monotonic()
    if own.tp_rank > 0:
        time.sleep(5)
    else:
        with contextlib.suppress(RuntimeError):
            dist.barrier(own.tp_group)
    return time.monotonic() - started


def sleep_between_two_files(parallel: ParallelContext, prefix: str) -> None:
    """Write a file, sleep for long, and write another one when interrupted cleanly."""
    Path(f"{prefix}-{parallel.tp_rank}-begun").touch()
    try:
        time.sleep(60)
    finally:
        Path(f"{prefix}-{parallel.tp_rank}-cleaned-up").touch()


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["sleep", prefix]:
            run_on_ranks(sleep_between_two_files, prefix, sizes=ParallelSizes(tp=2))
        case ["sleep", prefix, node, port]:  # on one of two nodes
            run_on_ranks(
                sleep_between_two_files, prefix, sizes=ParallelSizes(tp=2), nodes=Nodes(2, int(node), port=int(port))
            )
        case ["sum"]:
            print(run_on_ranks(place_and_sum, 5, sizes=ParallelSizes(tp=2)))
            if is_first_process():
                print("speaks")
        case ["anew"]:
            print(was_restarted(timedelta(seconds=30)), run_on_ranks(place_and_sum, 5, sizes=ParallelSizes(tp=2)))
        case ["kill", rank, node, port]:
            run_on_ranks(killed_on, int(rank), sizes=ParallelSizes(tp=4), nodes=Nodes(2, int(node), port=int(port)))
