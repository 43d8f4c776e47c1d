"""What an optimizer keeps of a parameter, by name, whichever optimizer it is."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from megacore.training.optimizer import ApexAdamW, Optimizer


def state_of(optimizer: Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
    """Tensors in the shape of ``parameter`` and cut like it, and numbers; empty before the first step."""
    if isinstance(optimizer, ApexAdamW):
        return optimizer.state_of(parameter)
    assert isinstance(optimizer, torch.optim.Optimizer)
    # Not optimizer.state[parameter], which would make an entry.
    return {kind: value for kind, value in optimizer.state.get(parameter, {}).items() if value is not None}


def new_state(parameter: nn.Parameter, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Room for a state to be read into; ``shapes`` are those of the whole tensors, ``()`` of a number."""
    return {
        kind: torch.zeros_like(parameter, requires_grad=False)
        if shape
        else torch.zeros((), dtype=torch.float32, device=parameter.device)
        for kind, shape in shapes.items()
    }


def set_state(optimizer: Optimizer, parameter: nn.Parameter, state: dict[str, Tensor]) -> None:
    """Let the next step go on from ``state``."""
    if isinstance(optimizer, ApexAdamW):
        optimizer.set_state(parameter, state)
    else:
        assert isinstance(optimizer, torch.optim.Optimizer)
        optimizer.state[parameter] = state
