"""Rotary position embedding (Su et al., 2021, arXiv:2104.09864) and its scaling to longer contexts.

Pairs are laid out in halves: component ``i`` of a head is rotated with component ``i + head_dim / 2``. Frequencies are
computed in float32 for any dtype of the model, as in the published models.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from megacore.config import DynamicNtkScaling, FrequencyBandScaling, LinearScaling, ModelConfig, YarnScaling


def rotary_table(
    config: ModelConfig, sequence_length: int, *, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return the cosine and sine of every position's angles, each ``[sequence, head_dim]``, in ``dtype``."""
    return segmented_rotary_table(config, [sequence_length], device=device, dtype=dtype)


def segmented_rotary_table(
    config: ModelConfig, lengths: Sequence[int], *, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return the concatenated tables of sequences of these ``lengths``, each ``[sum of lengths, head_dim]``."""
    tables = {length: _angles(config, length) for length in set(lengths)}
    angles = torch.cat([tables[length][0] for length in lengths])
    [amplitude] = {amplitude for _, amplitude in tables.values()}
    return (angles.cos() * amplitude).to(device, dtype), (angles.sin() * amplitude).to(device, dtype)


def _angles(config: ModelConfig, sequence_length: int) -> tuple[Tensor, float]:
    """Return the angles, ``[sequence, head_dim]``, and the factor on their cosine and sine."""
    frequencies, amplitude = inverse_frequencies(config, sequence_length)
    positions = torch.arange(sequence_length, dtype=torch.float32)
    return torch.outer(positions, frequencies).repeat(1, 2), amplitude


def apply_rotary(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate ``heads``, ``[batch, sequence, heads, head_dim]``, by the angles of their positions."""
    first, second = heads.chunk(2, dim=-1)
    rotated = torch.cat((-second, first), dim=-1)
    return heads * cos.unsqueeze(-2) + rotated * sin.unsqueeze(-2)


def inverse_frequencies(config: ModelConfig, sequence_length: int) -> tuple[Tensor, float]:
    """Return the angle per position of each pair, ``[head_dim / 2]``, and the factor on cosine and sine.

    Only dynamic NTK scaling depends on ``sequence_length``.
    """
    scaling, theta, dim = config.rope_scaling, config.rope_theta, config.head_dim
    if scaling is None:
        return _frequencies(theta, dim), 1.0
    if isinstance(scaling, LinearScaling):
        return _frequencies(theta, dim) / scaling.factor, 1.0
    if isinstance(scaling, DynamicNtkScaling):
        context = config.max_position_embeddings
        stretch = scaling.factor * max(sequence_length, context) / context - (scaling.factor - 1)
        return _frequencies(theta * stretch ** (dim / (dim - 2)), dim), 1.0
    if isinstance(scaling, FrequencyBandScaling):
        return _by_frequency_band(_frequencies(theta, dim), scaling), 1.0
    assert isinstance(scaling, YarnScaling), f"no rotary frequencies for {scaling}"
    return _yarn(theta, dim, scaling), _yarn_amplitude(scaling)


def _frequencies(theta: float, dim: int) -> Tensor:
    return 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)


def _by_frequency_band(frequencies: Tensor, scaling: FrequencyBandScaling) -> Tensor:
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)  # within the original context
    weight = ((turns - low) / (high - low)).clamp(0.0, 1.0)  # 0: slower than `low` turns, 1: faster than `high`
    return (1 - weight) * frequencies / scaling.factor + weight * frequencies


def _yarn(theta: float, dim: int, scaling: YarnScaling) -> Tensor:
    def pair_with(turns: float) -> float:
        """Return the (fractional) pair that makes ``turns`` full turns within the original context."""
        context = scaling.original_max_position_embeddings
        return dim * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first, last = pair_with(scaling.beta_fast), pair_with(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)
    if first == last:
        last += 0.001  # a step instead of a ramp, without dividing by zero
    interpolated = ((torch.arange(dim // 2, dtype=torch.float32) - first) / (last - first)).clamp(0.0, 1.0)
    frequencies = _frequencies(theta, dim)
    return frequencies / scaling.factor * interpolated + frequencies * (1 - interpolated)


def _yarn_amplitude(scaling: YarnScaling) -> float:
    def mscale(weight: float) -> float:
        return 1.0 if scaling.factor <= 1 else 0.1 * weight * math.log(scaling.factor) + 1.0

    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        return mscale(scaling.mscale) / mscale(scaling.mscale_all_dim)
    return mscale(1.0)
