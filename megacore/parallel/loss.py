"""Cross-entropy over logits whose vocabulary is cut over the tensor-parallel ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from megacore.parallel.context import ParallelContext
from megacore.parallel.cuts import chunk_bounds


def vocab_parallel_cross_entropy(
    logits: Tensor, targets: Tensor, *, vocab_size: int, parallel: ParallelContext
) -> Tensor:
    """The negative log-likelihood of each target, ``[batch, sequence]``, equal on all ranks.

    The full logits never exist: the ranks exchange one maximum, one sum and one target logit a token.

    Args:
        logits: this rank's ``[batch, sequence, local_vocab]``.
        targets: token ids, ``[batch, sequence]``.
        vocab_size: of the whole model.
        parallel: whose tensor-parallel group the vocabulary is cut over.
    """
    logits = logits.float() if logits.dtype.itemsize < 4 else logits
    if parallel.tp_mesh is None:
        return F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="none").view_as(targets)
    first, _ = chunk_bounds(vocab_size, parallel.tp_size, parallel.tp_rank)
    return _VocabParallelCrossEntropy.apply(logits, targets, first, parallel.tp_group)


class _VocabParallelCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, first: int, group: dist.ProcessGroup) -> Tensor:
        maximum = logits.max(dim=-1).values
        dist.all_reduce(maximum, op=dist.ReduceOp.MAX, group=group)
        exponentials = (logits - maximum.unsqueeze(-1)).exp_()
        local_targets = targets - first
        elsewhere = (local_targets < 0) | (local_targets >= logits.shape[-1])
        local_targets = local_targets.masked_fill(elsewhere, 0).unsqueeze(-1)
        target_logits = logits.gather(-1, local_targets).squeeze(-1).masked_fill(elsewhere, 0.0)
        sums = torch.stack([exponentials.sum(dim=-1), target_logits])
        dist.all_reduce(sums, group=group)
        normalizer, target_logits = sums.unbind()
        ctx.save_for_backward(exponentials.div_(normalizer.unsqueeze(-1)), local_targets, elsewhere)
        return normalizer.log() + maximum - target_logits

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        softmax, local_targets, elsewhere = ctx.saved_tensors
        result = softmax * gradient.unsqueeze(-1)
        result.scatter_add_(-1, local_targets, -gradient.masked_fill(elsewhere, 0.0).unsqueeze(-1))
        return result, None, None, None
