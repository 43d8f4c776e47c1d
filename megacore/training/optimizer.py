"""The optimizer over a model's parameters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from megacore.parallel import ParameterSpec
from megacore.training.run_config import OptimizerSection


def build_optimizer(
    parameters: Iterable[tuple[str, nn.Parameter]], specs: Mapping[str, ParameterSpec], settings: OptimizerSection
) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only: a norm's weight or a bias is no direction to shrink."""
    matrices: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    for name, parameter in parameters:
        is_matrix = specs[name].row_dims < len(specs[name].shape)
        (matrices if is_matrix else vectors).append(parameter)
    groups = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=settings.lr,
        betas=(settings.beta1, settings.beta2),
        eps=settings.eps,
        fused=True,
    )
