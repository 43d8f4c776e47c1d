"""Metrics: small functions of the scores that a model gives to the tokens of some samples."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from megacore.errors import ConfigError


@dataclass(frozen=True)
class TokenScores:
    """The scores of the targets of some samples; all ``[samples, sequence]``, padding included.

    Attributes:
        losses: Negative log-likelihood in nats, float64.
        is_top: True if the model finds no other token more probable.
        loss_mask: Loss weight of each target, float64; 0 for a target that is not learned.
        is_assistant: True for the tokens of the assistant; False throughout for text.
    """

    losses: Tensor
    is_top: Tensor
    loss_mask: Tensor
    is_assistant: Tensor


Sums = tuple[Tensor | float, Tensor | float]


@dataclass(frozen=True)
class Metric:
    """A ratio of two sums over all samples of an evaluation.

    Attributes:
        sums: Function that returns the numerator and the denominator for some of the samples.
        finish: Function that turns the ratio into the metric.
        needs_conversations: True if it is undefined for text.
    """

    sums: Callable[[TokenScores], Sums]
    finish: Callable[[float], float] = float
    needs_conversations: bool = False


def loss(scores: TokenScores) -> Sums:
    """Compute the mean loss per token, weighted by the loss mask."""
    return (scores.losses * scores.loss_mask).sum(), scores.loss_mask.sum()


def accuracy(scores: TokenScores) -> Sums:
    """Compute the fraction of learned tokens that the model finds most probable."""
    is_learned = scores.loss_mask > 0
    return (scores.is_top & is_learned).sum(), is_learned.sum()


def instruct_accuracy(scores: TokenScores) -> Sums:
    """Compute the fraction of the assistant's tokens that the model finds most probable."""
    return (scores.is_top & scores.is_assistant).sum(), scores.is_assistant.sum()


def count_loss_mask(scores: TokenScores) -> Sums:
    """Count the learned tokens per sample."""
    return (scores.loss_mask > 0).sum(), float(len(scores.loss_mask))


def count_instruct_mask(scores: TokenScores) -> Sums:
    """Count the assistant's tokens per sample."""
    return scores.is_assistant.sum(), float(len(scores.is_assistant))


def _exponential(mean_loss: float) -> float:
    return math.inf if mean_loss >= 700 else math.exp(mean_loss)  # NaN stays NaN


LOSS = Metric(loss)

METRICS = {
    "perplexity": Metric(loss, finish=_exponential),
    "accuracy": Metric(accuracy),
    "instruct_accuracy": Metric(instruct_accuracy, needs_conversations=True),
    "count_loss_mask": Metric(count_loss_mask),
    "count_instruct_mask": Metric(count_instruct_mask, needs_conversations=True),
}
"""The built-in metrics by name. The run file names others as ``package.module:function``."""


def resolve_metrics(names: Iterable[str], *, conversations: bool) -> dict[str, Metric]:
    """Return the metrics with these ``names``; an imported one is listed under the name of its function.

    Raises:
        ConfigError: for an unknown name, one that is undefined for the data, or one given twice.
    """
    usable = {name for name, metric in METRICS.items() if conversations or not metric.needs_conversations}
    found: dict[str, Metric] = {}
    for given in names:
        for name in [name for name in METRICS if name in usable] if given == "all" else [given]:
            if name in METRICS and name not in usable:
                raise ConfigError(
                    f'evaluation.metrics: {name} needs conversations, and data.kind is "text": choose from '
                    f"{', '.join(sorted(usable))}"
                )
            metric = METRICS[name] if name in METRICS else _imported(name)
            name = name.rpartition(":")[2]
            if name in found or name == "loss":
                raise ConfigError(f"evaluation.metrics: {name} is given twice (the loss is always reported)")
            found[name] = metric
    return found


def _imported(name: str) -> Metric:
    module, colon, attribute = name.partition(":")
    if not colon:
        raise ConfigError(
            f"evaluation.metrics: there is no metric {name}; available are {', '.join(METRICS)}, and functions of your "
            "own as package.module:function"
        )
    try:
        function: Any = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"evaluation.metrics: {name} cannot be imported: {error}") from error
    if isinstance(function, Metric):
        return function
    if not callable(function):
        raise ConfigError(f"evaluation.metrics: {name} is not a function but {function!r}")
    return Metric(function)
