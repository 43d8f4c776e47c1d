"""How fast the processes of a run can multiply matrices, measured: what an achieved rate is a share of."""

from __future__ import annotations

import math
import time

import torch
import torch.distributed as dist

from megacore.parallel import ParallelContext

_SECONDS = 0.5
"""That the measurement may take, unless a single small product takes longer."""

_SIZES = (256, 512, 1024, 2048, 4096, 8192)
"""Of the square matrices. The largest fill any GPU there is, and take 400 MB in 16 bit."""


def measured_peak(parallel: ParallelContext, dtype: torch.dtype) -> float:
    """Floating-point operations a second that all processes reach together. For all ranks, which measure at once.

    Each multiplies square matrices of growing size, and its best rate counts. A data sheet says more than any program
    reaches, and nothing of processes that share a CPU.

    Args:
        parallel: the place of this process.
        dtype: that the run computes in.
    """
    if parallel.mesh is not None:
        dist.barrier()  # so that processes on one CPU measure what each of them has while all work
    own = _own_peak(parallel.device, dtype)
    if parallel.mesh is None:
        return own
    total = torch.tensor(own, dtype=torch.float64, device=parallel.device)
    dist.all_reduce(total)
    return total.item()


@torch.no_grad()
def _own_peak(device: torch.device, dtype: torch.dtype) -> float:
    until = time.perf_counter() + _SECONDS
    generator = torch.Generator(device).manual_seed(0)  # the run's own random numbers stay what they are
    best = 0.0
    for size in _SIZES:
        one, other = (torch.rand(size, size, generator=generator, device=device).to(dtype) for _ in range(2))
        shortest = math.inf  # the first of a size may load a kernel
        while True:
            shortest = min(shortest, _seconds_of_product(one, other))
            best = max(best, 2 * size**3 / shortest)
            left = until - time.perf_counter()
            if left <= 0:
                return best
            if size < _SIZES[-1] and 2 * 8 * shortest < left:  # one of the next size takes eight times as long
                break
    return best


def _seconds_of_product(one: torch.Tensor, other: torch.Tensor) -> float:
    if one.device.type == "cuda":
        torch.cuda.synchronize(one.device)
    started = time.perf_counter()
    one @ other
    if one.device.type == "cuda":
        torch.cuda.synchronize(one.device)
    return time.perf_counter() - started
