"""What processes tell each other, beside tensors."""

from __future__ import annotations

from typing import TypeVar

import torch
import torch.distributed as dist

from megacore.parallel.context import ParallelContext

Told = TypeVar("Told")


def broadcast_object(value: Told, parallel: ParallelContext, *, axis: str | None = None) -> Told:
    """``value`` as the first process along ``axis`` of the mesh, or of all, has it, on each of them. It is pickled."""
    if parallel.mesh is None:
        return value
    group = None if axis is None else parallel.group(axis)
    told = [value]
    dist.broadcast_object_list(told, group=group, group_src=0, device=parallel.device)
    return told[0]


def any_rank(is_so: bool, parallel: ParallelContext) -> bool:
    """Whether something is so on at least one process. For all of them, which return the same."""
    if parallel.mesh is None:
        return is_so
    of_any = torch.tensor(is_so, dtype=torch.int32, device=parallel.device)
    dist.all_reduce(of_any, op=dist.ReduceOp.MAX)
    return bool(of_any)
