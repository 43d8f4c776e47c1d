"""How much work a step is: its tokens, and the floating-point operations that the model takes for them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megacore.config import ModelConfig
from megacore.parallel import ParallelContext, ParameterSpec
from megacore.training.batches import Batch
from megacore.training.config.run_config import RunConfig


@dataclass(frozen=True)
class ModelFlops:
    """What the forward and the backward pass of a model take, in floating-point operations.

    Those of Chowdhery et al., 2022, arXiv:2204.02311, appendix B: of each token six for each weight of a matrix that it
    is multiplied with, and of each pair of tokens twelve for each number of a head, in each layer. The head over the
    vocabulary is counted, the embedding, which is looked up, is not. A multiplication and an addition are two; the
    causal half of attention is counted as the whole; what is computed again in the backward pass is not counted,
    nor are norms, biases, rotary angles and the optimizer.

    Attributes:
        per_token: of the matrices.
        per_pair: of attention, for each pair of tokens of a segment, each token's with itself among them.
    """

    per_token: float
    per_pair: float

    @classmethod
    def of(cls, config: ModelConfig, specs: Mapping[str, ParameterSpec]) -> ModelFlops:
        """Of the model with the parameters ``specs``, whatever its layers are made of."""
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
    """What all processes do in a step.

    Attributes:
        num_tokens: that are computed, padding among them.
        flops: that the model takes for them.
    """

    num_tokens: int
    flops: float


def work_of_step(batch: Batch, model: ModelFlops, run: RunConfig, parallel: ParallelContext) -> Work:
    """The work of the global batch of which ``batch`` is this process's part. For all ranks."""
    own = own_work(batch, model, micro_batch_size=run.training.micro_batch_size)
    if parallel.dp_size == 1:
        return own
    data = run.data
    if not (data.variable_seq_lengths or data.packing or data.resets_at_documents):
        return Work(own.num_tokens * parallel.dp_size, own.flops * parallel.dp_size)
    total = torch.tensor([own.num_tokens, own.flops], dtype=torch.float64, device=parallel.device)
    for axis in ("dp_replicate", "dp_shard"):
        if getattr(parallel.sizes, axis) > 1:
            dist.all_reduce(total, group=parallel.group(axis))
    num_tokens, flops = total.tolist()
    return Work(int(num_tokens), flops)


def own_work(batch: Batch, model: ModelFlops, *, micro_batch_size: int) -> Work:
    """The work of ``batch`` alone, whose micro-batches may be shorter than it is, and its samples cut into segments."""
    num_samples, whole = len(batch.tokens), batch.tokens.shape[1] - 1
    num_tokens = num_pairs = 0
    for number, first in enumerate(range(0, num_samples, micro_batch_size)):
        length = batch.micro_batch_lengths[number] if batch.micro_batch_lengths else whole
        rows = min(micro_batch_size, num_samples - first)
        num_tokens += rows * length
        if batch.segments is None:
            num_pairs += rows * length**2
        else:
            num_pairs += _pairs(batch.segments[first : first + rows, :length])
    return Work(num_tokens, num_tokens * model.per_token + num_pairs * model.per_pair)


def _pairs(segments: Tensor) -> int:
    """How many pairs of tokens are of the same segment, which has one number in a row of ``segments``."""
    begins = torch.ones_like(segments, dtype=torch.bool)
    begins[:, 1:] = segments[:, 1:] != segments[:, :-1]
    lengths = torch.cat([begins.flatten().nonzero().squeeze(-1), torch.tensor([segments.numel()])]).diff()
    return int((lengths**2).sum())
