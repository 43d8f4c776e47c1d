"""The norm of the gradient over all processes, and clipping to it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from megacore.parallel.context import ParallelContext
from megacore.parallel.tensor.module import local_tensor
from megacore.parallel.tensor.sharding import ParameterSpec


def local_gradients(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    """Return this process's part of each gradient, as plain tensors that share its memory."""
    return [local_tensor(parameter.grad) for parameter in parameters if parameter.grad is not None]


def local_square_norm(
    parameters: Mapping[str, nn.Parameter], specs: Mapping[str, ParameterSpec], parallel: ParallelContext
) -> Tensor:
    """Return this process's contribution to the squared norm of the gradient, ``[]``, in float64.

    Entries that several processes hold are counted by the first of them only.
    """
    counted = [
        own
        for name, parameter in parameters.items()
        for gradient in local_gradients([parameter])
        if (own := _own_part(gradient, specs[name], parallel)) is not None
    ]
    if parallel.dp_replicate_rank > 0 or not counted:
        return torch.zeros((), dtype=torch.float64, device=parallel.device)
    return nn.utils.get_total_norm(counted).double().square()


def scale_gradients(parameters: Iterable[nn.Parameter], factor: float) -> None:
    """Multiply all gradients in place."""
    if factor != 1.0:
        for gradient in local_gradients(parameters):
            gradient.mul_(factor)


def _own_part(gradient: Tensor, spec: ParameterSpec, parallel: ParallelContext) -> Tensor | None:
    """Return the part of ``gradient`` that no lower tensor-parallel rank holds; ``None`` if there is none."""
    if spec.shard_dim is None:
        return gradient if parallel.tp_rank == 0 else None
    share = spec.ranks_per_unit(parallel.tp_size)
    if share == 1 or parallel.tp_rank % share == 0:
        return gradient
    dim = spec.shard_dim + 1
    return gradient.narrow(dim, 0, gradient.shape[dim] - spec.num_shared)
