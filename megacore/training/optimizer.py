"""The optimizer over a model's parameters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from megacore.parallel import ParameterSpec, local_tensor
from megacore.training.config import OptimizerSection


class Optimizer(Protocol):
    """The part of ``torch.optim.Optimizer`` that a training run needs."""

    param_groups: list[dict[str, Any]]

    def step(self) -> Any: ...

    def zero_grad(self) -> None: ...


def build_optimizer(
    parameters: Iterable[tuple[str, nn.Parameter]],
    specs: Mapping[str, ParameterSpec],
    settings: OptimizerSection,
    *,
    kernel: str = "auto",
) -> Optimizer:
    """Build the optimizer, with weight decay on matrices only: shrinking a norm's weight or a bias regularizes nothing.

    Parameters that need no gradient are left out. ``wd_mult`` of a parameter group multiplies its weight decay; see
    :func:`set_rates`. ``kernel`` is a name of :data:`megacore.model.kernels.KERNELS`.
    """
    matrices: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    for name, parameter in parameters:
        if not parameter.requires_grad:
            continue
        is_matrix = specs[name].row_dims < len(specs[name].shape)
        (matrices if is_matrix else vectors).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": group, "weight_decay": wd_mult * settings.weight_decay, "wd_mult": wd_mult}
        for group, wd_mult in ((matrices, 1.0), (vectors, 0.0))
        if group or not (matrices or vectors)  # a pipeline stage may have nothing to train
    ]
    if settings.kind == "sgd":
        return torch.optim.SGD(groups, lr=settings.lr, momentum=settings.sgd_momentum)
    constants: dict[str, Any] = {"lr": settings.lr, "betas": (settings.beta1, settings.beta2), "eps": settings.eps}
    if kernel == "apex":
        return ApexAdamW(groups, **constants)
    return torch.optim.AdamW(groups, **constants, fused=True)


def set_rates(optimizer: Optimizer, *, lr: float, weight_decay: float) -> None:
    """Set the learning rate and the weight decay of the next step."""
    for group in optimizer.param_groups:
        group["lr"] = lr
        group["weight_decay"] = group["wd_mult"] * weight_decay


class ApexAdamW:
    """AdamW in NVIDIA apex's FusedAdam.

    FusedAdam takes plain tensors only, so it works on this process's part of each parameter, and so does its state.
    """

    def __init__(self, groups: list[dict[str, Any]], **constants: Any) -> None:
        from apex.optimizers import FusedAdam

        parameters = [parameter for group in groups for parameter in group["params"]]
        self._parts = {parameter: nn.Parameter(local_tensor(parameter)) for parameter in parameters}
        part_groups = [
            {**group, "params": [self._parts[parameter] for parameter in group["params"]]} for group in groups
        ]
        self._fused = FusedAdam(part_groups, adam_w_mode=True, **constants)
        self.param_groups: list[dict[str, Any]] = self._fused.param_groups

    def step(self) -> None:
        """Update the parameters from their gradients."""
        for parameter, part in self._parts.items():
            # Sharded parameters may have moved.
            part.data = local_tensor(parameter)
            part.grad = None if parameter.grad is None else local_tensor(parameter.grad)
        self._fused.step()

    def state_of(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """Return the moments of this process's part of ``parameter``, and the number of steps taken."""
        state = self._fused.state.get(self._parts[parameter], {})
        if not state:
            return {}
        [steps] = [group["step"] for group in self.param_groups if self._is_in(group, parameter)]
        return {**state, "step": torch.tensor(float(steps))}

    def set_state(self, parameter: nn.Parameter, state: dict[str, Tensor]) -> None:
        """Restore a :meth:`state_of` ``parameter``."""
        parts = {kind: local_tensor(value) for kind, value in state.items()}
        for group in self.param_groups:  # apex counts the steps of a group
            if self._is_in(group, parameter):
                group["step"] = int(parts.pop("step"))
        self._fused.state[self._parts[parameter]] = parts

    def _is_in(self, group: dict[str, Any], parameter: nn.Parameter) -> bool:
        return any(part is self._parts[parameter] for part in group["params"])

    def zero_grad(self) -> None:
        """Drop the gradients."""
        for parameter, part in self._parts.items():
            parameter.grad = part.grad = None
