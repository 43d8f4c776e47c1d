"""What tests of whole models run on each rank; in a module of its own, so that the ranks can import it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from megacore.checkpoint import Checkpoint
from megacore.model import load_model
from megacore.parallel import ParallelContext, parameter_specs
from megacore.testing.numerics import gather_tensor
from megacore.verification.comparison import gather_logits


def logits_and_gradients(
    parallel: ParallelContext, ckpt: Path, tokens: Tensor, dtype: torch.dtype
) -> tuple[Tensor, dict[str, Tensor]]:
    """The logits of ``ckpt`` and the gradients of its summed loss, all whole, on ``[batch, sequence + 1]`` tokens."""
    model = load_model(Checkpoint(ckpt), parallel, dtype=dtype)
    with torch.no_grad():
        logits = model(tokens[:, :-1])
    model(tokens[:, :-1], targets=tokens[:, 1:], token_weights=torch.ones(tokens[:, 1:].shape, dtype=dtype)).backward()
    specs = parameter_specs(model)
    gradients = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        gradients[name] = gather_tensor(parameter.grad, specs[name], parallel)
    return gather_logits(logits, model.config.vocab_size, parallel), gradients
