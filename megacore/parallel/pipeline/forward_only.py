"""The forward-only pass of micro-batches through the pipeline stages, for any pipeline schedule."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megacore.parallel.context import ParallelContext

Place = tuple[int, int]
"""A stage, and a micro-batch on it."""


def forward_plan(owners: Sequence[int], num_micro_batches: int) -> list[dict[int, Place]]:
    """Return what each process computes at each step: the micro-batch on its stages that has come furthest.

    Args:
        owners: The process of each stage.
        num_micro_batches: Number of micro-batches, which pass all stages.
    """
    num_done, num_ready = [0] * len(owners), [num_micro_batches] + [0] * len(owners)
    plan = []
    while num_done[-1] < num_micro_batches:
        step: dict[int, Place] = {}
        for stage in reversed(range(len(owners))):
            if owners[stage] not in step and num_done[stage] < num_ready[stage]:
                step[owners[stage]] = (stage, num_done[stage])
        for stage, _ in step.values():
            num_done[stage] += 1
            num_ready[stage + 1] += 1
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
    """Send all micro-batches through all stages. A collective of the processes along ``pp``.

    Args:
        stages: The stages of this process, by number: each is called with the output of the stage before (``None``
            at the first) and the number of the micro-batch.
        owners: The process along ``pp`` of each stage of the model.
        num_micro_batches: Number of micro-batches.
        hidden_shape: Shape of the hidden states between stages.
        hidden_dtype: Their dtype.
        parallel: The mesh with the axis ``pp``.

    Returns:
        The outputs of the last stage, one for each micro-batch, on its process; an empty list elsewhere.
    """
    rank, group = parallel.pp_rank, parallel.group("pp")
    arrived: dict[Place, Tensor] = {}
    outputs: list[Tensor] = []
    for step in forward_plan(owners, num_micro_batches):
        messages = []
        # The same order on all processes, so that two of them never wait for each other.
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
