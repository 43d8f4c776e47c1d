"""The learning rate of each iteration."""

from __future__ import annotations

import math

from megacore.training.run_config import OptimizerSection


def learning_rate(iteration: int, *, optimizer: OptimizerSection, train_iters: int) -> float:
    """The learning rate of ``iteration``, counted from 1.

    Rises linearly to ``lr``, reached right after ``warmup_iters``, and falls along half a cosine towards ``min_lr``,
    which iteration ``train_iters + 1`` would have (Loshchilov and Hutter, 2017, arXiv:1608.03983). So no iteration is
    spent at 0, neither the first nor the last.
    """
    if iteration <= optimizer.warmup_iters:
        return optimizer.lr * iteration / (optimizer.warmup_iters + 1)
    progress = (iteration - optimizer.warmup_iters - 1) / (train_iters - optimizer.warmup_iters)
    return optimizer.min_lr + (optimizer.lr - optimizer.min_lr) * (1 + math.cos(math.pi * progress)) / 2
