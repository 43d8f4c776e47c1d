"""What follows each step of a run: telling of it, saving, evaluating, ending."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from megacore.data import Split
from megacore.errors import MegacoreError, TrainingError
from megacore.parallel import StopRequest
from megacore.training.checkpointing.manager import RunCheckpoints
from megacore.training.evaluation.evaluator import Evaluation, Evaluator
from megacore.training.exits import Exits
from megacore.training.loggers.dispatch import RunLog
from megacore.training.progress import Progress
from megacore.training.span import Spans
from megacore.training.step_guard import StepGuard
from megacore.training.step_metrics import Step
from megacore.training.stepping import who_stopped


class Evaluations:
    """The evaluations of a run, each when it is due."""

    def __init__(
        self,
        evaluator: Evaluator,
        spans: Spans,
        stop: StopRequest,
        log: RunLog,
        on_evaluation: Callable[[Evaluation], None] | None,
    ) -> None:
        self._evaluator, self._spans, self._stop = evaluator, spans, stop
        self._log, self._on_evaluation = log, on_evaluation

    def make(self, progress: Progress) -> bool:
        """Evaluate what is due and was not yet evaluated, and note it in ``progress``. For all ranks.

        Returns whether that is complete; else one of them was asked to stop.
        """
        if progress.evaluated_after == progress.iteration:
            return True
        evaluated = [self._evaluate(split, progress.iteration) for split in self._due(progress.iteration)]
        if not all(evaluated):
            return False
        if evaluated:
            progress.evaluated_after = progress.iteration
        return True

    def _due(self, iteration: int) -> list[Split]:
        run = self._evaluator.run
        is_last = iteration == self._spans.train_iters
        splits: list[Split] = []
        if is_last or iteration % run.evaluation.interval == 0:
            splits.append("valid")
        if is_last:
            splits.append("test")
        return [split for split in splits if split in run.data.splits]

    def _evaluate(self, split: Split, iteration: int) -> bool:
        evaluation = self._evaluator.evaluate(
            split, iteration=iteration, wants_stop=lambda: self._stop.signal is not None
        )
        if evaluation is None:
            return False
        self._log.evaluation(evaluation)
        if self._on_evaluation is not None and self._evaluator.engine.parallel.rank == 0:
            self._on_evaluation(evaluation)
        return True


@dataclass
class AfterStep:
    """What follows each step, on all ranks alike.

    Attributes:
        progress: of the run, up to the step.
        guard: has judged the step.
        saved: the checkpoints of the run.
        stop: asked for by a signal.
        exits: that the run file asks for.
        evaluations: of the run.
        log: is told of the step.
        on_step: likewise, on the first rank; ``None`` on others.
    """

    progress: Progress
    guard: StepGuard
    saved: RunCheckpoints
    stop: StopRequest
    exits: Exits
    evaluations: Evaluations
    log: RunLog
    on_step: Callable[[Step], None] | None

    def __call__(self, step: Step) -> Step:
        """Do what is due after ``step``; return it with what came of that.

        If the run is to stop here, that says the step, and the state is saved.

        Raises:
            TrainingError: when too many steps in a row were skipped. The state is saved.
        """
        is_last = step.iteration == step.train_iters
        stopped_by = None if is_last else step.stopped_by or self.exits.reason(self.progress)
        if self.saved.is_due(step.iteration) and not is_last and stopped_by is None:
            self.saved.save(self.progress, waits=False)
        step = replace(step, stopped_by=stopped_by, notes=(*step.notes, *self.saved.notes()))
        self.log.step(step)
        if self.on_step is not None:
            self.on_step(step)
        if self.guard.is_over:
            told = (
                f"iteration {step.iteration}: the loss is {step.loss} and the norm of the gradient {step.grad_norm}; "
                f"so {self.guard.num_in_a_row} steps in a row were skipped. A lower optimizer.lr may help; so may an "
                "earlier checkpoint (--load), if the step before had done the harm. The weights as they were before "
                "the skipped steps"
            )
            try:
                kept = self.saved.save(self.progress, waits=True)
            except MegacoreError as error:
                raise TrainingError(f"{told} could not be saved: {error}") from error
            raise TrainingError(f"{told} are in {kept}")
        if stopped_by is not None:  # who stops a run may not wait for long
            self.saved.save(self.progress, waits=True)
        is_complete = self.evaluations.make(self.progress)
        if stopped_by is None and not is_complete:
            step = replace(step, stopped_by=who_stopped(self.stop))
            self.saved.save(self.progress, waits=True)
        return step
