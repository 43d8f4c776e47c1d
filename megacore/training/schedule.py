"""The learning rate and the weight decay of each iteration."""

from __future__ import annotations

import math

from megacore.training.config.run_config import OptimizerSection
from megacore.training.span import Spans


def learning_rate(iteration: int, *, optimizer: OptimizerSection, spans: Spans) -> float:
    """The learning rate of ``iteration``, counted from 1.

    Rises linearly to ``lr``, reached right after ``warmup_iters``, and falls towards ``min_lr``, which iteration
    ``lr_decay_iters + 1`` would have: along a line, half a cosine (Loshchilov and Hutter, 2017, arXiv:1608.03983), or
    not until the last ``lr_wsd_decay_iters`` of them (Hu et al., 2024, arXiv:2404.06395). So no iteration is spent at
    0, neither the first nor the last. The inverse square root is of the iteration, and takes no notice of
    ``lr_decay_iters`` (Vaswani et al., 2017, arXiv:1706.03762).
    """
    warmup, end, style = spans.warmup_iters, spans.lr_decay_iters, optimizer.lr_decay_style
    if iteration <= warmup:
        return optimizer.lr * iteration / (warmup + 1)
    if style == "constant":
        return optimizer.lr
    if style == "inverse-square-root":
        return max(optimizer.min_lr, optimizer.lr * math.sqrt((warmup + 1) / iteration))
    start = warmup if optimizer.lr_wsd_decay_iters is None else end - optimizer.lr_wsd_decay_iters
    progress = min(1.0, max(0.0, (iteration - start - 1) / (end - start)))
    share = (1 + math.cos(math.pi * progress)) / 2 if style == "cosine" else 1 - progress
    return optimizer.min_lr + (optimizer.lr - optimizer.min_lr) * share


def weight_decay(iteration: int, *, optimizer: OptimizerSection, spans: Spans) -> float:
    """The weight decay of ``iteration``, counted from 1: from the start's to the end's, which the one after the last
    iteration of the run would have."""
    if optimizer.weight_decay_incr_style == "constant":
        return optimizer.weight_decay
    start, end = (
        optimizer.weight_decay if value is None else value
        for value in (optimizer.start_weight_decay, optimizer.end_weight_decay)
    )
    progress = min(1.0, (iteration - 1) / spans.train_iters)
    share = progress if optimizer.weight_decay_incr_style == "linear" else (1 - math.cos(math.pi * progress)) / 2
    return start + (end - start) * share
