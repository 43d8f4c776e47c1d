"""What tests of whole models run on each rank; in a module of its own, so that the ranks can import it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from megacore.checkpoint import Checkpoint
from megacore.model import load_model
from megacore.parallel import ParallelContext, vocab_parallel_cross_entropy
from megacore.verification.comparison import whole_logits


def logits_and_gradients(
    parallel: ParallelContext, ckpt: Path, tokens: Tensor, dtype: torch.dtype
) -> tuple[Tensor, dict[str, Tensor]]:
    """The logits of ``ckpt`` and the gradients of its summed loss, all whole, on ``[batch, sequence + 1]`` tokens."""
    model = load_model(Checkpoint(ckpt), parallel, dtype=dtype)
    vocab_size = model.config.vocab_size
    logits = model(tokens[:, :-1])
    losses = vocab_parallel_cross_entropy(logits, tokens[:, 1:], vocab_size=vocab_size, parallel=parallel)
    losses.sum().backward()
    gradients = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        grad = parameter.grad
        gradients[name] = grad.full_tensor() if isinstance(grad, DTensor) else grad
    return whole_logits(logits.detach(), vocab_size, parallel), gradients
