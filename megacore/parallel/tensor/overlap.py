"""The column-parallel linear function, with collectives that overlap the computation of its backward pass.

From Korthikanti et al., 2022, arXiv:2205.05198, section 4.2.2.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from megacore.parallel.context import ParallelContext
from megacore.parallel.tensor.collectives import SEQUENCE, gathered_sequence, split_sequence


def overlapping_linear(hidden: Tensor, weight: Tensor, bias: Tensor | None, parallel: ParallelContext) -> Tensor:
    """Apply :func:`~torch.nn.functional.linear` in a parallel region that ``hidden`` enters.

    It is a single node of autograd's graph, so that the input's gradient is summed over the ranks while the
    weight's is computed, and that under sequence parallelism only this rank's slice of the input is kept, which is
    gathered again while the input's gradient is computed. A backward pass that asks for the two gradients one after the
    other would compute both twice.

    Args:
        hidden: Hidden states between parallel layers, ``[batch, sequence, in_features]``.
        weight: This rank's part of the weight, ``[local_out_features, in_features]``.
        bias: This rank's part of the bias, ``[local_out_features]``.
        parallel: The mesh with the tensor-parallel ranks.
    """
    if parallel.tp_mesh is None:
        return F.linear(hidden, weight, bias)
    return _OverlappingLinear.apply(hidden, weight, bias, parallel.tp_group, parallel.sequence_parallel)


class _OverlappingLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, group: dist.ProcessGroup, is_slice: bool
    ) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        ctx.group, ctx.is_slice = group, is_slice
        return F.linear(gathered_sequence(hidden, group) if is_slice else hidden, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        if ctx.is_slice and needs_weight:
            parts = [torch.empty_like(hidden, memory_format=torch.contiguous_format) for _ in range(ctx.group.size())]
            gathering = dist.all_gather(parts, hidden.contiguous(), group=ctx.group, async_op=True)
        if needs_hidden:
            hidden_gradient = gradient @ weight
        if ctx.is_slice and needs_weight:
            gathering.wait()
            hidden = torch.cat(parts, dim=SEQUENCE)
        if needs_hidden and ctx.is_slice:
            slices = split_sequence(hidden_gradient, ctx.group)
            hidden_gradient = torch.empty_like(slices[0])
            summing = dist.reduce_scatter(hidden_gradient, slices, group=ctx.group, async_op=True)
        elif needs_hidden:
            summing = dist.all_reduce(hidden_gradient, group=ctx.group, async_op=True)
        rows = gradient.flatten(0, -2)
        weight_gradient = rows.t() @ hidden.flatten(0, -2) if needs_weight else None
        bias_gradient = rows.sum(dim=0) if needs_bias else None
        if not needs_hidden:
            return None, weight_gradient, bias_gradient, None, None
        summing.wait()
        return hidden_gradient, weight_gradient, bias_gradient, None, None
