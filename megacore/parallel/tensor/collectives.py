"""Differentiable collectives over the tensor-parallel group. In a single process each is the identity.

The backward pass of each is its conjugate (Shoeybi et al., 2019, arXiv:1909.08053; Korthikanti et al., 2022,
arXiv:2205.05198):

    ==================  ===================  ====================
    function            forward              backward
    ==================  ===================  ====================
    sum_gradients       identity             all-reduce
    sum_shared_...      identity             all-reduce of some
    all_reduce          all-reduce           identity
    gather_sequence     all-gather, axis 1   reduce-scatter
    scatter_sequence    reduce-scatter       all-gather
    ==================  ===================  ====================

Activations are ``[batch, sequence, ...]``; a rank's slice of the sequence is the ``tp_rank``-th of ``tp_size`` equal
ones.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megacore.parallel.context import ParallelContext
from megacore.parallel.tensor.sharding import ParameterSpec

SEQUENCE = 1
"""The sequence axis of activations."""


def sum_gradients(x: Tensor, parallel: ParallelContext) -> Tensor:
    """Pass ``x``, which is equal on all ranks, into a computation that differs between them."""
    return x if parallel.tp_mesh is None else _SumGradients.apply(x, parallel.tp_group)


def sum_shared_gradients(local: Tensor, spec: ParameterSpec, parallel: ParallelContext) -> Tensor:
    """Pass a parameter of which several ranks hold some entries into a computation that differs between them.

    ``local`` is ``[..., 1, local_entries, ...]``, the last ``spec.num_shared`` entries those that the ranks of the unit
    share. Their gradients are summed over these ranks, so that the replicas stay equal.
    """
    assert spec.shard_dim is not None
    group = parallel.tp_subgroup(spec.ranks_per_unit(parallel.tp_size))
    return _SumSharedGradients.apply(local, spec.shard_dim + 1, spec.num_shared, group)


def all_reduce(x: Tensor, parallel: ParallelContext) -> Tensor:
    """Sum the ranks' ``x``."""
    return x if parallel.tp_mesh is None else _AllReduce.apply(x, parallel.tp_group)


def gather_sequence(x: Tensor, parallel: ParallelContext) -> Tensor:
    """Join the ranks' slices of the sequence: ``[batch, sequence / tp, ...]`` to ``[batch, sequence, ...]``."""
    return x if parallel.tp_mesh is None else _GatherSequence.apply(x, parallel.tp_group)


def scatter_sequence(x: Tensor, parallel: ParallelContext) -> Tensor:
    """Sum the ranks' ``x`` and keep this rank's slice of the sequence."""
    return x if parallel.tp_mesh is None else _ScatterSequence.apply(x, parallel.tp_group)


def _all_reduced(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    # A gradient of autograd may be shared with another node of the graph: never reduce it in place.
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


def gathered_sequence(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return the joined slices of all ranks of ``group``, without a graph."""
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(group.size())]
    dist.all_gather(parts, x.contiguous(), group=group)
    return torch.cat(parts, dim=SEQUENCE)


def _reduce_scattered(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    parts = split_sequence(x, group)
    total = torch.empty_like(parts[0])
    dist.reduce_scatter(total, parts, group=group)
    return total


def split_sequence(x: Tensor, group: dist.ProcessGroup) -> list[Tensor]:
    """Return the slice of each rank of ``group``, contiguous."""
    return [part.contiguous() for part in x.chunk(group.size(), dim=SEQUENCE)]


class _SumGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _all_reduced(gradient, ctx.group), None


class _SumSharedGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: Tensor, dim: int, num_shared: int, group: dist.ProcessGroup) -> Tensor:
        ctx.dim, ctx.num_shared, ctx.group = dim, num_shared, group
        return local.view_as(local)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        own, shared = gradient.split([gradient.shape[ctx.dim] - ctx.num_shared, ctx.num_shared], dim=ctx.dim)
        return torch.cat([own, _all_reduced(shared, ctx.group)], dim=ctx.dim), None, None, None


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        return _all_reduced(x, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _GatherSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return gathered_sequence(x, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _reduce_scattered(gradient, ctx.group), None


class _ScatterSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _reduce_scattered(x, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gathered_sequence(gradient, ctx.group), None
