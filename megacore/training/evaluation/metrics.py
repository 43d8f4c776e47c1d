"""Metrics: small functions of how probable a model finds the tokens of some samples."""

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
    """How a model does on the targets of some samples; all ``[samples, sequence]``, padding included.

    Attributes:
        losses: negative log-likelihood, in nats, float64.
        is_top: whether the model finds no other token more probable.
        loss_mask: what each target counts for in the loss, float64; 0 for one not to be learned.
        is_assistant: whether it is of what the assistant says; of text, none is.
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
        sums: of some of the samples, what is summed over all, and what the sum is divided by.
        finish: of the ratio, the metric.
        is_of_conversations: whether it says nothing of text.
    """

    sums: Callable[[TokenScores], Sums]
    finish: Callable[[float], float] = float
    is_of_conversations: bool = False


def loss(scores: TokenScores) -> Sums:
    """The mean loss of a token, each counted as the loss mask says."""
    return (scores.losses * scores.loss_mask).sum(), scores.loss_mask.sum()


def accuracy(scores: TokenScores) -> Sums:
    """How many of the tokens to learn the model finds most probable."""
    is_learned = scores.loss_mask > 0
    return (scores.is_top & is_learned).sum(), is_learned.sum()


def instruct_accuracy(scores: TokenScores) -> Sums:
    """How many of the assistant's tokens the model finds most probable."""
    return (scores.is_top & scores.is_assistant).sum(), scores.is_assistant.sum()


def count_loss_mask(scores: TokenScores) -> Sums:
    """Tokens to learn, a sample."""
    return (scores.loss_mask > 0).sum(), float(len(scores.loss_mask))


def count_instruct_mask(scores: TokenScores) -> Sums:
    """The assistant's tokens, a sample."""
    return scores.is_assistant.sum(), float(len(scores.is_assistant))


def _exponential(mean_loss: float) -> float:
    return math.inf if mean_loss >= 700 else math.exp(mean_loss)  # of NaN it is NaN


LOSS = Metric(loss)

METRICS = {
    "perplexity": Metric(loss, finish=_exponential),
    "accuracy": Metric(accuracy),
    "instruct_accuracy": Metric(instruct_accuracy, is_of_conversations=True),
    "count_loss_mask": Metric(count_loss_mask),
    "count_instruct_mask": Metric(count_instruct_mask, is_of_conversations=True),
}
"""The metrics that there are, by name. Others are named as ``package.module:function`` in the run file."""


def metrics_of(names: Iterable[str], *, conversations: bool) -> dict[str, Metric]:
    """The metrics of these names, with those that have functions elsewhere under the functions' names.

    Raises:
        ConfigError: for a name that there is not, one that says nothing of the data, or one that is there twice.
    """
    fitting = {name for name, metric in METRICS.items() if conversations or not metric.is_of_conversations}
    found: dict[str, Metric] = {}
    for given in names:
        for name in [name for name in METRICS if name in fitting] if given == "all" else [given]:
            if name in METRICS and name not in fitting:
                raise ConfigError(
                    f'evaluation.metrics: {name} is of conversations, and data.kind is "text": choose from '
                    f"{', '.join(sorted(fitting))}"
                )
            metric = METRICS[name] if name in METRICS else _imported(name)
            name = name.rpartition(":")[2]
            if name in found or name == "loss":
                raise ConfigError(f"evaluation.metrics: {name} is there twice (the loss is told in any case)")
            found[name] = metric
    return found


def _imported(name: str) -> Metric:
    module, colon, attribute = name.partition(":")
    if not colon:
        raise ConfigError(
            f"evaluation.metrics: there is no metric {name}; there are {', '.join(METRICS)}, and functions of your own "
            "as package.module:function"
        )
    try:
        function: Any = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"evaluation.metrics: {name} cannot be imported: {error}") from error
    if isinstance(function, Metric):
        return function
    if not callable(function):
        raise ConfigError(f"evaluation.metrics: {name} is no function, but {function!r}")
    return Metric(function)
