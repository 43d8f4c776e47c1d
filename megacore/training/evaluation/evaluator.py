"""How well a model does on samples that it is not trained on."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megacore.checkpoint import Checkpoint
from megacore.data import MixedSamples, Split
from megacore.parallel import any_rank
from megacore.training.batches import Batch, batch_of, open_samples
from megacore.training.config.run_config import RunConfig
from megacore.training.engine import Engine
from megacore.training.evaluation.metrics import LOSS, TokenScores, metrics_of
from megacore.training.prefetch import prefetched


@dataclass(frozen=True)
class Evaluation:
    """What came of one evaluation.

    Attributes:
        iteration: of the training steps, how many were done before.
        split: `"valid"` or `"test"`.
        values: by name, ``loss`` first, in nats a token; then the metrics of the run file, in their order.
    """

    iteration: int
    split: Split
    values: Mapping[str, float]


@dataclass(frozen=True)
class _Scored:
    """A process's part of a global batch, the first ``num_samples`` of which count, and which tokens are the
    assistant's."""

    batch: Batch
    is_assistant: Tensor
    num_samples: int


class Evaluator:
    """Evaluates a model between steps of its training, always on the same samples of each split.

    These are the first in the order of the run's seed, each once. Losses and metrics are of all their tokens together,
    so that they do not depend on batches or layout.

    Args:
        engine: has the model.
        checkpoint: that the run starts from.
    """

    def __init__(self, engine: Engine, checkpoint: Checkpoint) -> None:
        self.engine, self.run, self.checkpoint = engine, engine.run, checkpoint
        conversations = self.run.data.kind == "instruction"
        metrics = metrics_of(self.run.evaluation.metrics, conversations=conversations)
        self._metrics = {"loss": LOSS} | metrics
        self._opened: dict[Split, tuple[MixedSamples, MixedSamples | None]] = {}

    def evaluate(
        self, split: Split, *, iteration: int, wants_stop: Callable[[], bool] = lambda: False
    ) -> Evaluation | None:
        """Evaluate the model as it is after ``iteration`` steps. For all processes, which return the same.

        ``wants_stop`` is asked between batches; where it says so on any process, nothing comes of the evaluation.

        Raises:
            DataError: when a token id is beyond the vocabulary.
        """
        parallel = self.engine.parallel
        sums = torch.zeros(len(self._metrics), 2, dtype=torch.float64, device=parallel.device)
        for scored in prefetched(self._batches(split), self.run.data.prefetch):
            if any_rank(wants_stop(), parallel):
                return None
            scores = self.engine.score(scored.batch)
            if scores is not None and parallel.tp_rank == 0 and scored.num_samples:  # the first of them counts
                sums += self._sums(scores[: scored.num_samples], scored)
        if parallel.mesh is not None:
            dist.all_reduce(sums)
        values = {
            name: metric.finish(total / count) if count else math.nan
            for (name, metric), (total, count) in zip(self._metrics.items(), sums.tolist(), strict=True)
        }
        return Evaluation(iteration, split, values)

    def _sums(self, scores: Tensor, scored: _Scored) -> Tensor:
        loss_mask = scored.batch.loss_mask[: scored.num_samples].to(scores.device, torch.float64)
        tokens = TokenScores(
            losses=scores[..., 0].double(),
            is_top=scores[..., 1] > 0,
            loss_mask=loss_mask,
            is_assistant=scored.is_assistant[: scored.num_samples].to(scores.device),
        )
        sums = [metric.sums(tokens) for metric in self._metrics.values()]
        return torch.tensor(sums, dtype=torch.float64, device=scores.device)

    def _batches(self, split: Split) -> Iterator[_Scored]:
        samples, of_assistant = self._samples(split)
        size, parallel = self.run.training.global_batch_size, self.engine.parallel
        num_samples = num_samples_of(self.run, samples)
        share = size // parallel.dp_size
        for first in range(parallel.dp_rank * share, -(-num_samples // size) * size, size):
            # The last batch is filled up with samples that do not count.
            numbers = [number % num_samples for number in range(first, first + share)]
            batch = batch_of(samples, numbers, self.run, self.checkpoint, split)
            is_assistant = batch.loss_mask > 0
            if of_assistant is not None:
                is_assistant = batch_of(of_assistant, numbers, self.run, self.checkpoint, split).loss_mask > 0
            elif self.run.data.kind == "text":
                is_assistant = torch.zeros_like(is_assistant)
            yield _Scored(batch, is_assistant, min(share, max(0, num_samples - first)))

    def _samples(self, split: Split) -> tuple[MixedSamples, MixedSamples | None]:
        """Those of the split, and the same ones with only the assistant's tokens to learn, where those differ."""
        if split not in self._opened:
            samples = open_samples(self.run, self.checkpoint, split)
            of_assistant = None
            if self.run.data.scalar_loss_mask:
                data = self.run.data.model_copy(update={"scalar_loss_mask": 0.0})
                of_assistant = open_samples(self.run.model_copy(update={"data": data}), self.checkpoint, split)
            self._opened[split] = (samples, of_assistant)
        return self._opened[split]


def num_samples_of(run: RunConfig, samples: MixedSamples) -> int:
    """How many of ``samples`` an evaluation looks at."""
    iters = run.evaluation.iters
    if iters == "all":
        return samples.samples_per_epoch
    return min(iters * run.training.global_batch_size, samples.samples_per_epoch)
