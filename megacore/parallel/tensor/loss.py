"""Cross-entropy of the head's logits, in chunks of tokens, with the vocabulary cut over tensor-parallel ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megacore.parallel.context import ParallelContext
from megacore.parallel.tensor.layers import enter_parallel_region
from megacore.parallel.tensor.sharding import chunk_bounds

CHUNK_BYTES = {"cpu": 2**24, "cuda": 2**28}
"""Bytes of logits, in 32 bit, that exist at once, by the type of device: a GPU needs larger chunks to be busy."""


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    token_weights: Tensor,
    *,
    vocab_size: int,
    parallel: ParallelContext,
) -> Tensor:
    """Return the weighted sum of the targets' negative log-likelihoods, ``[1]``, in nats, equal on all ranks.

    Logits exist for a few tokens at a time only, and each rank's part of the vocabulary on that rank only: the ranks
    exchange a maximum, a sum and the logit of the target per token. The gradients are computed in the forward pass,
    since the logits would otherwise be computed twice. So the result cannot be scaled, and the gradient that reaches
    it must be 1: scale ``token_weights`` instead.

    Args:
        hidden: Hidden states between parallel layers, ``[batch, sequence, hidden]``, in the compute dtype; under
            sequence parallelism this rank's slice of the sequence.
        weight: This rank's rows of the head, ``[local_vocab, hidden]``; the gradient has the same dtype.
        targets: Token ids, ``[batch, sequence]``, of the whole sequence.
        token_weights: Weights of the sum, shaped like ``targets``, in 32 or 64 bit: 1 / (number of tokens) for a mean,
            0 for a token without loss.
        vocab_size: Size of the whole vocabulary.
        parallel: The mesh with the tensor-parallel ranks.
    """
    hidden = enter_parallel_region(hidden, parallel)
    first, _ = chunk_bounds(vocab_size, parallel.tp_size, parallel.tp_rank)
    group = parallel.tp_group if parallel.tp_mesh is not None else None
    is_differentiated = [torch.is_grad_enabled() and tensor.requires_grad for tensor in (hidden, weight)]
    return _LinearCrossEntropy.apply(
        hidden.flatten(0, -2), weight, targets.flatten(), token_weights.flatten(), first, group, *is_differentiated
    )


def token_scores(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, vocab_size: int, parallel: ParallelContext
) -> Tensor:
    """Return for each target its negative log-likelihood, in nats, and 1 if it is the most probable token, else 0.

    The arguments are those of :func:`linear_cross_entropy`. There is no graph, and logits are never gathered. Among
    equally probable tokens the first one counts as the most probable, as with ``argmax``.

    Returns:
        ``[batch, sequence, 2]``, in 64 bit if ``hidden`` is, else in 32 bit, equal on all ranks.
    """
    with torch.no_grad():
        hidden = enter_parallel_region(hidden, parallel).flatten(0, -2)
        first, _ = chunk_bounds(vocab_size, parallel.tp_size, parallel.tp_rank)
        group = parallel.tp_group if parallel.tp_mesh is not None else None
        rows, ids = weight.to(hidden.dtype), targets.flatten()
        wide = torch.promote_types(hidden.dtype, torch.float32)
        scores = torch.empty((len(ids), 2), dtype=wide, device=hidden.device)
        chunk = max(1, CHUNK_BYTES[hidden.device.type] // (4 * rows.shape[0]))
        for start in range(0, len(ids), chunk):
            tokens = slice(start, start + chunk)
            logits = (hidden[tokens] @ rows.t()).to(wide)
            scores[tokens, 1] = (_argmax_over_vocab(logits, first, group) == ids[tokens]).to(wide)
            ones = torch.ones(len(logits), dtype=wide, device=hidden.device)
            scores[tokens, 0], _ = _chunk_losses(logits, ids[tokens] - first, ones, group, with_gradient=False)
        return scores.view(*targets.shape, 2)


def _argmax_over_vocab(logits: Tensor, first: int, group: dist.ProcessGroup | None) -> Tensor:
    """Return the token with the highest logit on any rank; ``logits`` is ``[tokens, local_vocab]``."""
    maxima, tops = logits.max(dim=-1)
    tops = tops + first
    if group is None:
        return tops
    # Token ids in 32 bit floats are exact up to 2^24.
    own = torch.stack([maxima, tops.to(maxima.dtype)])
    gathered = [torch.empty_like(own) for _ in range(group.size())]
    dist.all_gather(gathered, own, group=group)
    maxima, numbers = torch.stack(gathered, dim=1).unbind()
    # Among equal maxima that of the first rank, whose token ids are lower.
    return numbers.gather(0, maxima.argmax(dim=0, keepdim=True)).squeeze(0).long()


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        token_weights: Tensor,
        first: int,
        group: dist.ProcessGroup | None,
        with_hidden_gradient: bool,
        with_weight_gradient: bool,
    ) -> Tensor:
        rows = weight.to(hidden.dtype)
        hidden_gradient = torch.empty_like(hidden) if with_hidden_gradient else None
        weight_gradient = torch.zeros_like(weight) if with_weight_gradient else None
        with_gradient = with_hidden_gradient or with_weight_gradient
        total = torch.zeros(1, dtype=token_weights.dtype, device=hidden.device)
        chunk = max(1, CHUNK_BYTES[hidden.device.type] // (4 * rows.shape[0]))
        for start in range(0, hidden.shape[0], chunk):
            tokens = slice(start, start + chunk)
            losses, gradient = _chunk_losses(
                hidden[tokens] @ rows.t(), targets[tokens] - first, token_weights[tokens], group, with_gradient
            )
            total += losses.sum()
            if hidden_gradient is not None:
                torch.mm(gradient, rows, out=hidden_gradient[tokens])
            if weight_gradient is None:
                continue
            if weight_gradient.dtype == gradient.dtype:
                weight_gradient.addmm_(gradient.t(), hidden[tokens])
            else:  # the sum over chunks stays in the wider dtype
                weight_gradient += gradient.t() @ hidden[tokens]
        ctx.save_for_backward(hidden_gradient, weight_gradient)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        torch._assert_async(gradient == 1, "the loss was scaled: scale token_weights instead")
        hidden_gradient, weight_gradient = ctx.saved_tensors
        return hidden_gradient, weight_gradient, *[None] * 6


def _chunk_losses(
    logits: Tensor, local_targets: Tensor, token_weights: Tensor, group: dist.ProcessGroup | None, with_gradient: bool
) -> tuple[Tensor, Tensor]:
    """Return the weighted losses of a chunk of tokens, and the gradient of ``logits``, ``[tokens, local_vocab]``."""
    dtype = logits.dtype
    logits = logits.to(token_weights.dtype)
    elsewhere = (local_targets < 0) | (local_targets >= logits.shape[-1])
    local_targets = local_targets.masked_fill(elsewhere, 0).unsqueeze(-1)
    target_logits = logits.gather(-1, local_targets).squeeze(-1).masked_fill(elsewhere, 0.0)
    maxima = logits.amax(dim=-1)
    exponentials = logits.sub_(maxima.unsqueeze(-1)).exp_()
    maximum, normalizer, target_logits = _reduce_over_vocab(maxima, exponentials.sum(dim=-1), target_logits, group)
    losses = (normalizer.log() + maximum - target_logits) * token_weights
    if not with_gradient:
        return losses, exponentials
    exponentials.mul_(((maxima - maximum).exp() / normalizer * token_weights).unsqueeze(-1))
    exponentials.scatter_add_(-1, local_targets, -token_weights.masked_fill(elsewhere, 0.0).unsqueeze(-1))
    return losses, exponentials.to(dtype)


def _reduce_over_vocab(
    maxima: Tensor, sums: Tensor, target_logits: Tensor, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return over all ranks: the maximum, the sum of exponentials relative to it, and the logit of the target."""
    if group is None:
        return maxima, sums, target_logits
    own = torch.stack([maxima, sums, target_logits])
    gathered = [torch.empty_like(own) for _ in range(group.size())]
    dist.all_gather(gathered, own, group=group)
    maxima, sums, target_logits = torch.stack(gathered, dim=1).unbind()
    maximum = maxima.amax(dim=0)
    return maximum, (sums * (maxima - maximum).exp()).sum(dim=0), target_logits.sum(dim=0)
