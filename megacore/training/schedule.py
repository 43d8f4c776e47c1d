"""The learning rate of each iteration."""

from __future__ import annotations

import math

from megacore.training.run_config import OptimizerSection


def learning_rate(iteration: int, *, optimizer: OptimizerSection, train_iters: int) -> float:
    """The learning rate of ``iteration``, counted from 1.

    Rises linearly to ``lr``, reached at ``warmup_iters``, and falls along half a cosine to ``min_lr``, reached at
    ``train_iters`` (Loshchilov and Hutter, 2017, arXiv:1608.03983).
    """
    if iteration <= optimizer.warmup_iters:
        return optimizer.lr * iteration / optimizer.warmup_iters
    progress = (iteration - optimizer.warmup_iters) / (train_iters - optimizer.warmup_iters)
    return optimizer.min_lr + (optimizer.lr - optimizer.min_lr) * (1 + math.cos(math.pi * progress)) / 2
