"""Attention with linear biases (Press, Smith and Lewis, 2022, arXiv:2108.12409) instead of position embeddings."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def alibi_slopes(num_heads: int) -> Tensor:
    """Return the slope of each head, ``[num_heads]``: a geometric sequence if ``num_heads`` is a power of two."""
    power_of_two = 2 ** math.floor(math.log2(num_heads))
    ratio = 2.0 ** (-8.0 / power_of_two)
    slopes = [ratio**power for power in range(1, power_of_two + 1)]
    between = 2.0 ** (-4.0 / power_of_two)
    slopes += [between**power for power in range(1, 2 * (num_heads - power_of_two) + 1, 2)]
    return torch.tensor(slopes, dtype=torch.float32)


def alibi_biases(
    slopes: Tensor, sequence_length: int, scale: float, *, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Return the biases on the scores of each key, ``[heads, sequence]``, times ``scale``.

    Softmax is invariant to a shift, so the bias is the slope times the key's position instead of its distance. It is
    rounded to bfloat16, as in the training of the published models.
    """
    positions = torch.arange(sequence_length, device=device)
    return (slopes.to(device, torch.bfloat16).unsqueeze(-1) * positions).to(dtype) * scale


def alibi_mask(
    slopes: Tensor, sequence_length: int, scale: float, *, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Return the causal mask with biases times ``scale`` to add to the scores, ``[heads, sequence, sequence]``."""
    biases = alibi_biases(slopes, sequence_length, scale, device=device, dtype=dtype)
    positions = torch.arange(sequence_length, device=device)
    future = positions > positions.unsqueeze(-1)
    return biases.unsqueeze(1).masked_fill(future, -math.inf)
