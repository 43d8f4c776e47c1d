"""The optimizer over a model's parameters."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from megacore.parallel import parameter_specs
from megacore.training.run_config import OptimizerSection


def build_optimizer(model: nn.Module, settings: OptimizerSection) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only: a norm's weight or a bias is no direction to shrink."""
    specs = parameter_specs(model)
    parameters = dict(model.named_parameters())
    is_matrix = {name: specs[name].row_dims < len(specs[name].shape) for name in parameters}
    groups = [
        {"params": [p for name, p in parameters.items() if is_matrix[name]], "weight_decay": settings.weight_decay},
        {"params": [p for name, p in parameters.items() if not is_matrix[name]], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=settings.lr,
        betas=(settings.beta1, settings.beta2),
        eps=settings.eps,
        fused=True,
    )


def clip_gradients(model: nn.Module, max_norm: float) -> float:
    """Scale the gradients down to a norm, over all ranks, of ``max_norm`` (0: do not); return the norm they had."""
    norm: Tensor = nn.utils.clip_grad_norm_(model.parameters(), max_norm if max_norm > 0 else float("inf"))
    return (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()
