"""Published checkpoints of random weights, in which every parameter has an effect."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from megacore.hookspecs import ReferenceModel


def randomize(module: nn.Module, *, seed: int = 0) -> None:
    """Set every parameter of ``module`` to random values that make logits of order 1.

    Biases are not zero and the weights of norms are not one, unlike freshly initialised ones, which would agree with a
    model that leaves them out.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(noise / (parameter.numel() / parameter.shape[0]) ** 0.5)
            elif name.endswith("bias"):
                parameter.copy_(0.3 * noise)
            else:
                parameter.copy_(1 + 0.3 * noise)


def save_random(reference: ReferenceModel, directory: Path) -> None:
    """Randomize the transformers model that ``reference`` wraps, and save it with its own method into ``directory``.

    Raises:
        NotImplementedError: when ``reference`` does not wrap a transformers model.
    """
    model: Any = getattr(reference, "model", None)
    if not hasattr(model, "save_pretrained"):
        raise NotImplementedError(
            "load_reference returns no object whose .model is a transformers model: override publish() in your "
            "subclass of ModelFamilyTests, so that it writes a checkpoint of random weights"
        )
    randomize(model)
    model.save_pretrained(directory)
