"""The work of a step in tokens and floating-point operations, and the measured peak that achieved rates refer to."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megacore.config import ModelConfig
from megacore.parallel import ParallelContext, ParameterSpec
from megacore.training.batches import Batch
from megacore.training.config import DataSection

_MEASURING_SECONDS = 0.5
"""Duration of the measurement of the peak, unless a single small product takes longer."""

_MATRIX_SIZES = (256, 512, 1024, 2048, 4096, 8192)
"""Sizes of the square matrices. The largest saturate any GPU, and take 400 MB in 16 bit."""


@dataclass(frozen=True)
class ModelFlops:
    """Floating-point operations of the forward and the backward pass of a model.

    Counted as by Chowdhery et al., 2022, arXiv:2204.02311, appendix B: six per token and weight of a matrix that it is
    multiplied with, and twelve per pair of tokens, number of a head and layer. The head over the vocabulary counts, the
    embedding, which is looked up, does not. A multiplication and an addition are two operations; causal attention
    counts as full attention; what is computed again in the backward pass does not count, nor do norms, biases, rotary
    angles and the optimizer.

    Attributes:
        per_token: Operations of the matrices per token.
        per_pair: Operations of attention per pair of tokens of a segment, each token's pair with itself included.
    """

    per_token: float
    per_pair: float

    @classmethod
    def from_specs(cls, config: ModelConfig, specs: Mapping[str, ParameterSpec]) -> ModelFlops:
        """Count the operations of a model with the parameters ``specs``, whatever its layers are made of."""
        num_weights = sum(
            math.prod(spec.shape)
            for name, spec in specs.items()
            if spec.row_dims < len(spec.shape) and not name.startswith("embedding.")
        )
        if config.tie_embeddings:
            num_weights += config.vocab_size * config.hidden_size
        attention = 12.0 * config.num_layers * config.num_attention_heads * config.head_dim
        return cls(per_token=6.0 * num_weights, per_pair=attention)


@dataclass(frozen=True)
class Work:
    """The work of all processes in a step.

    Attributes:
        num_tokens: Number of computed tokens, padding included.
        flops: Floating-point operations of the model for them.
    """

    num_tokens: int
    flops: float


def global_work(
    batch: Batch, model: ModelFlops, data: DataSection, parallel: ParallelContext, *, micro_batch_size: int
) -> Work:
    """Return the work of the global batch of which ``batch`` is this process's part. For all ranks."""
    own = local_work(batch, model, micro_batch_size=micro_batch_size)
    if parallel.dp_size == 1:
        return own
    if not (data.variable_seq_lengths or data.packing or data.resets_at_documents):
        return Work(own.num_tokens * parallel.dp_size, own.flops * parallel.dp_size)
    total = torch.tensor([own.num_tokens, own.flops], dtype=torch.float64, device=parallel.device)
    for axis in ("dp_replicate", "dp_shard"):
        if getattr(parallel.sizes, axis) > 1:
            dist.all_reduce(total, group=parallel.group(axis))
    num_tokens, flops = total.tolist()
    return Work(int(num_tokens), flops)


def local_work(batch: Batch, model: ModelFlops, *, micro_batch_size: int) -> Work:
    """Return the work of ``batch`` alone; its micro-batches may be shorter, and its samples cut into segments."""
    num_samples, whole = len(batch.tokens), batch.tokens.shape[1] - 1
    num_tokens = num_pairs = 0
    for number, first in enumerate(range(0, num_samples, micro_batch_size)):
        length = batch.micro_batch_lengths[number] if batch.micro_batch_lengths else whole
        rows = min(micro_batch_size, num_samples - first)
        num_tokens += rows * length
        if batch.segments is None:
            num_pairs += rows * length**2
        else:
            num_pairs += _num_pairs(batch.segments[first : first + rows, :length])
    return Work(num_tokens, num_tokens * model.per_token + num_pairs * model.per_pair)


def _num_pairs(segments: Tensor) -> int:
    """Return the number of pairs of tokens of the same segment; a segment has one number in a row of ``segments``."""
    begins = torch.ones_like(segments, dtype=torch.bool)
    begins[:, 1:] = segments[:, 1:] != segments[:, :-1]
    lengths = torch.cat([begins.flatten().nonzero().squeeze(-1), torch.tensor([segments.numel()])]).diff()
    return int((lengths**2).sum())


def measure_peak_flops(parallel: ParallelContext, dtype: torch.dtype) -> float:
    """Measure the floating-point operations per second that all processes reach together. For all ranks.

    Each multiplies square matrices of growing size, and its best rate counts. A data sheet promises more than any
    program reaches, and does not know processes that share a CPU.

    Args:
        parallel: The place of this process.
        dtype: The dtype that the run computes in.
    """
    if parallel.mesh is not None:
        dist.barrier()  # so that processes on one CPU measure their share of it while all work
    local = _local_peak_flops(parallel.device, dtype)
    if parallel.mesh is None:
        return local
    total = torch.tensor(local, dtype=torch.float64, device=parallel.device)
    dist.all_reduce(total)
    return total.item()


@torch.no_grad()
def _local_peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    deadline = time.perf_counter() + _MEASURING_SECONDS
    generator = torch.Generator(device).manual_seed(0)  # leaves the run's own random numbers alone
    best = 0.0
    for size in _MATRIX_SIZES:
        left, right = (torch.rand(size, size, generator=generator, device=device).to(dtype) for _ in range(2))
        shortest = math.inf  # the first product of a size may load a kernel
        while True:
            shortest = min(shortest, _time_product(left, right))
            best = max(best, 2 * size**3 / shortest)
            remaining = deadline - time.perf_counter()
            if remaining <= 0:
                return best
            if size < _MATRIX_SIZES[-1] and 2 * 8 * shortest < remaining:  # the next size takes eight times as long
                break
    return best


def _time_product(left: Tensor, right: Tensor) -> float:
    if left.device.type == "cuda":
        torch.cuda.synchronize(left.device)
    started = time.perf_counter()
    left @ right
    if left.device.type == "cuda":
        torch.cuda.synchronize(left.device)
    return time.perf_counter() - started
