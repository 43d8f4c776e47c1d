"""What the tests of launching run in other processes; in a module of its own, so that those can import it."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from megacore.errors import DataError
from megacore.parallel import ParallelContext, ParallelSizes, on_ranks


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


def killed_on(parallel: ParallelContext, rank: int) -> None:
    dist.barrier()
    if parallel.tp_rank == rank:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def sleep_between_two_files(parallel: ParallelContext, prefix: str) -> None:
    """Write a file, sleep for long, and write another one when interrupted cleanly."""
    Path(f"{prefix}-{parallel.tp_rank}-begun").touch()
    try:
        time.sleep(60)
    finally:
        Path(f"{prefix}-{parallel.tp_rank}-cleaned-up").touch()


if __name__ == "__main__":  # `python -m launched PREFIX`: two ranks that sleep
    on_ranks(sleep_between_two_files, sys.argv[1], sizes=ParallelSizes(tp=2))
