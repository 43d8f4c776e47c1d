"""Evaluation of a model on samples that it is not trained on."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megacore.data import InstructionSamples, Split
from megacore.parallel import any_rank
from megacore.training.batches import Batch, make_batch, num_evaluation_samples, prefetched
from megacore.training.engine import Engine
from megacore.training.evaluation.metrics import LOSS, TokenScores, resolve_metrics
from megacore.training.resolved import ResolvedRun
from megacore.training.step_metrics import Evaluation


@dataclass(frozen=True)
class _EvaluationBatch:
    """A process's part of a global batch.

    Attributes:
        batch: The samples.
        is_assistant: True for the tokens of the assistant.
        num_samples: Number of samples that count, the first ones; the others fill the batch up.
    """

    batch: Batch
    is_assistant: Tensor
    num_samples: int


class Evaluator:
    """Evaluates a model between steps of its training, always on the same samples of each split.

    They are the first samples in the order of the run's seed, each used once. Losses and metrics are computed over all
    their tokens together, so that they do not depend on batches or layout.

    Args:
        resolved: The run.
        engine: The engine with the model.
    """

    def __init__(self, resolved: ResolvedRun, engine: Engine) -> None:
        self.engine, self.run, self.checkpoint, self.samples = (
            engine,
            resolved.run,
            resolved.checkpoint,
            resolved.samples,
        )
        conversations = self.run.data.kind == "instruction"
        self._metrics = {"loss": LOSS} | resolve_metrics(self.run.evaluation.metrics, conversations=conversations)

    def evaluate(
        self, split: Split, *, iteration: int, wants_stop: Callable[[], bool] = lambda: False
    ) -> Evaluation | None:
        """Evaluate the model as it is after ``iteration`` steps. For all ranks, which return the same.

        ``wants_stop`` is called between batches; if it is true on any rank, the evaluation is dropped and the result is
        ``None``.

        Raises:
            DataError: when a token id is beyond the vocabulary.
        """
        parallel = self.engine.parallel
        sums = torch.zeros(len(self._metrics), 2, dtype=torch.float64, device=parallel.device)
        for part in prefetched(self._batches(split), self.run.data.prefetch):
            if any_rank(wants_stop(), parallel):
                return None
            scores = self.engine.score(part.batch)
            # Tensor-parallel ranks have the same scores; the first one counts.
            if scores is not None and parallel.tp_rank == 0 and part.num_samples:
                sums += self._sums(scores[: part.num_samples], part)
        if parallel.mesh is not None:
            dist.all_reduce(sums)
        values = {
            name: metric.finish(total / count) if count else math.nan
            for (name, metric), (total, count) in zip(self._metrics.items(), sums.tolist(), strict=True)
        }
        return Evaluation(iteration, split, values)

    def _sums(self, scores: Tensor, part: _EvaluationBatch) -> Tensor:
        loss_mask = part.batch.loss_mask[: part.num_samples].to(scores.device, torch.float64)
        tokens = TokenScores(
            losses=scores[..., 0].double(),
            is_top=scores[..., 1] > 0,
            loss_mask=loss_mask,
            is_assistant=part.is_assistant[: part.num_samples].to(scores.device),
        )
        sums = [metric.sums(tokens) for metric in self._metrics.values()]
        return torch.tensor(sums, dtype=torch.float64, device=scores.device)

    def _batches(self, split: Split) -> Iterator[_EvaluationBatch]:
        samples = self.samples[split]
        # The same samples, with a loss on the assistant's tokens only.
        assistant_samples = samples
        if self.run.data.scalar_loss_mask:
            sources = [
                source.with_scalar_loss_mask(0.0)
                for source in samples.sources
                if isinstance(source, InstructionSamples)
            ]
            assistant_samples = samples.with_sources(sources)
        size, parallel = self.run.training.global_batch_size, self.engine.parallel
        num_samples = num_evaluation_samples(self.run, samples)
        share = size // parallel.dp_size
        for first in range(parallel.dp_rank * share, -(-num_samples // size) * size, size):
            # The last batch is filled up with samples that do not count.
            numbers = [number % num_samples for number in range(first, first + share)]
            batch = make_batch(samples, numbers, self.run, self.checkpoint, split)
            is_assistant = batch.loss_mask > 0
            if assistant_samples is not samples:
                is_assistant = make_batch(assistant_samples, numbers, self.run, self.checkpoint, split).loss_mask > 0
            elif self.run.data.kind == "text":
                is_assistant = torch.zeros_like(is_assistant)
            yield _EvaluationBatch(batch, is_assistant, min(share, max(0, num_samples - first)))
