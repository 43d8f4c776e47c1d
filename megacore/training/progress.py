"""How far a run has come."""

from __future__ import annotations

from dataclasses import dataclass

from megacore.checkpoint.training_record import TrainingRecord
from megacore.training.config.optimizer import OptimizerSection


@dataclass(kw_only=True)
class Progress:
    """What the place in the data and every schedule of a run follow from, at any layout of its processes.

    Attributes:
        iteration: steps done, those that were skipped included.
        num_samples: samples seen; the next step begins with the sample of this number.
        evaluated_after: the iteration of the last evaluation that was completed.
        warmup_iters: of the run up to here; ``None`` where it begins, or is told to warm up otherwise from here on.
    """

    iteration: int = 0
    num_samples: int = 0
    evaluated_after: int = 0
    warmup_iters: int | None = None

    @classmethod
    def of(cls, record: TrainingRecord, optimizer: OptimizerSection) -> Progress:
        """Of the run that saved ``record``, which ``optimizer`` is to go on with."""
        is_as_before = record.state["settings"].get("optimizer.warmup_fraction") == optimizer.warmup_fraction
        return cls(
            iteration=record.iteration,
            num_samples=record.num_samples,
            evaluated_after=record.state["evaluated_after"],
            warmup_iters=record.state.get("warmup_iters") if is_as_before else None,
        )
