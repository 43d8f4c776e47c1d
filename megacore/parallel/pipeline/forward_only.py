"""Pipeline stages run forward only, whatever schedule they are trained by."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megacore.parallel.context import ParallelContext

Place = tuple[int, int]
"""A stage and a micro-batch."""


def forward_plan(owners: Sequence[int], num_micro_batches: int) -> list[dict[int, Place]]:
    """What each process computes at each step: of the micro-batches that have come to its stages, the furthest.

    Args:
        owners: of each stage, the process that has it.
        num_micro_batches: that go through all stages.
    """
    num_done, num_there = [0] * len(owners), [num_micro_batches] + [0] * len(owners)
    plan = []
    while num_done[-1] < num_micro_batches:
        step: dict[int, Place] = {}
        for stage in reversed(range(len(owners))):
            if owners[stage] not in step and num_done[stage] < num_there[stage]:
                step[owners[stage]] = (stage, num_done[stage])
        for stage, _ in step.values():
            num_done[stage] += 1
            num_there[stage + 1] += 1
        plan.append(step)
    return plan


def run_forward(
    stages: Mapping[int, Callable[[Tensor | None, int], Tensor]],
    owners: Sequence[int],
    num_micro_batches: int,
    *,
    hidden_shape: tuple[int, ...],
    hidden_dtype: torch.dtype,
    parallel: ParallelContext,
) -> list[Tensor]:
    """Send all micro-batches through all stages. For all processes of the axis ``pp``.

    Args:
        stages: those of this process, by number: each is called with what the stage before returned, ``None`` at the
            first, and the number of the micro-batch.
        owners: of each stage of the model, the process that has it, along ``pp``.
        num_micro_batches: that go through all stages.
        hidden_shape: of what goes from stage to stage.
        hidden_dtype: likewise.
        parallel: whose axis ``pp`` the stages are on.

    Returns:
        What the last stage returned for each micro-batch, on the process that has it; elsewhere nothing.
    """
    rank, group = parallel.pp_rank, parallel.group("pp")
    arrived: dict[Place, Tensor] = {}
    outputs: list[Tensor] = []
    for step in forward_plan(owners, num_micro_batches):
        messages = []
        # In one order on all processes, so that what is sent and what is received are never waited for crosswise.
        for sender, (stage, micro_batch) in sorted(step.items()):
            receiver = owners[stage + 1] if stage + 1 < len(owners) else None
            if sender == rank:
                output = stages[stage](arrived.pop((stage, micro_batch), None), micro_batch)
                if receiver is None:
                    outputs.append(output)
                elif receiver == rank:
                    arrived[stage + 1, micro_batch] = output
                else:
                    messages.append(dist.P2POp(dist.isend, output.contiguous(), group=group, group_peer=receiver))
            elif receiver == rank:
                buffer = torch.empty(hidden_shape, dtype=hidden_dtype, device=parallel.device)
                arrived[stage + 1, micro_batch] = buffer
                messages.append(dist.P2POp(dist.irecv, buffer, group=group, group_peer=sender))
        for work in dist.batch_isend_irecv(messages) if messages else []:
            work.wait()
    return outputs
