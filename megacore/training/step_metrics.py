"""The records that a run reports: :class:`Step`, :class:`Evaluation`, and :class:`TrainResult` at its end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megacore.data import Split


@dataclass(frozen=True, slots=True)
class Step:
    """The record of one step.

    Attributes:
        iteration: Number of the step, counted from 1.
        train_iters: Number of steps of the whole run.
        loss: Mean over the predicted tokens of the global batch, in nats, before the step.
        lr: Learning rate of the step.
        grad_norm: Norm of the gradient over all parameters, before clipping.
        tokens_per_second: Tokens computed by all processes per second.
        loss_scale: Loss scale of the next step; ``None`` unless the run computes in fp16.
        num_skipped: Number of steps up to this one that were not taken, because loss or gradient were not finite or
            spiked; the iterations in ``training.skip_iters`` do not count.
        batch_size: Number of samples in the global batch.
        is_taken: True if the weights changed; False for a skipped step and in ``training.skip_iters``.
        num_tokens: Number of tokens computed by all processes, padding included.
        seconds: Duration of the step.
        flops_per_second: Floating-point operations of the model per second; see
            :class:`~megacore.training.flops.ModelFlops`.
        peak_flops_per_second: Measured peak of all ranks together; ``None`` if it was not measured.
        stopped_by: The signal, or the key of the run file, that ends the run early with this step.
        notes: Further events that a user should know.
    """

    iteration: int
    train_iters: int
    loss: float
    lr: float
    grad_norm: float
    tokens_per_second: float
    loss_scale: float | None = None
    num_skipped: int = 0
    batch_size: int = 1
    is_taken: bool = True
    num_tokens: int = 0
    seconds: float = 0.0
    flops_per_second: float = 0.0
    peak_flops_per_second: float | None = None
    stopped_by: str | None = None
    notes: tuple[str, ...] = ()

    def is_logged(self, log_interval: int) -> bool:
        """Return whether loggers receive it: every ``log_interval``-th step, the first, and the last of the run."""
        return (
            self.iteration in (1, self.train_iters) or self.iteration % log_interval == 0 or self.stopped_by is not None
        )


@dataclass(frozen=True)
class Evaluation:
    """The result of one evaluation.

    Attributes:
        iteration: Number of training steps before it.
        split: `"valid"` or `"test"`.
        values: Values by name: ``loss`` first, in nats per token, then the metrics in the order of the run file.
    """

    iteration: int
    split: Split
    values: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """The outcome of a training run, or of the part of it that one call of ``train`` made.

    Attributes:
        last_step: The last step of this call; ``None`` if there was none left.
        num_steps: Number of steps of this call.
        num_taken: Number of these steps that changed the weights; the others were skipped.
        num_tokens: Number of tokens computed in these steps.
        seconds: Duration of these steps.
        stopped_by: The signal, or the key of the run file, that ended the run early; ``None`` if it is complete.
        output: The native checkpoint of the trained model; ``None`` if the run was stopped early.
        training_checkpoint: The newest training checkpoint of the run; ``None`` if none was saved.
    """

    last_step: Step | None
    num_steps: int
    num_taken: int
    num_tokens: int
    seconds: float
    stopped_by: str | None
    output: Path | None
    training_checkpoint: Path | None

    @property
    def num_skipped(self) -> int:
        """Number of steps of this call that did not change the weights."""
        return self.num_steps - self.num_taken
