"""What is told of each optimizer step of a run."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Step:
    """One optimizer step.

    Attributes:
        iteration: from 1.
        train_iters: of the whole run.
        loss: mean over the tokens of the global batch, in nats, before the step.
        lr: that the step was taken with.
        grad_norm: before clipping.
        tokens_per_second: that were computed, padding among them, all ranks together, in the whole step, which begins
            with waiting for its batch.
        loss_scale: in fp16, the factor on the loss of the next step.
        num_skipped: steps up to this one that were not taken, since loss or gradient were not finite, or a spike;
            those of ``training.skip_iters`` do not count.
        batch_size: samples of the global batch.
        is_taken: whether the weights changed; not in ``training.skip_iters``, nor where the step was skipped.
        num_tokens: that were computed.
        seconds: that the step took.
        flops_per_second: that the model takes for these tokens; see :class:`~megacore.training.flops.ModelFlops`.
        peak_flops_per_second: that all ranks were measured to reach together; ``None`` where that was not done.
        stopped_by: the signal, or the key of the run file, for which the run ends with this step before its end.
        notes: what happened beside the step that a person should know.
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
        """Whether it is told to who is told of every ``log_interval``-th, the first, the last and where a run stops."""
        return (
            self.iteration in (1, self.train_iters) or self.iteration % log_interval == 0 or self.stopped_by is not None
        )
