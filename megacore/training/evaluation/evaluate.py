"""The ``evaluate`` command: evaluating a model without training it."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

from megacore.checkpoint import Checkpoint
from megacore.parallel import ONE_NODE, Nodes, ParallelContext, run_on_ranks
from megacore.training.config import RunConfig, read_run_config
from megacore.training.engine import Engine
from megacore.training.evaluation.evaluator import Evaluator
from megacore.training.preflight import log_startup_notes, require_agreement
from megacore.training.resolved import ResolvedRun, resolve_evaluation
from megacore.training.starting_point import suggesting_earlier_checkpoint
from megacore.training.step_metrics import Evaluation


def evaluate(
    run: RunConfig | Path | str,
    *,
    load: Path | str | None = None,
    nodes: Nodes = ONE_NODE,
    on_note: Callable[[str], None] | None = None,
    on_evaluation: Callable[[Evaluation], None] | None = None,
) -> list[Evaluation]:
    """Evaluate a model on the validation and test data of ``run``, as the run itself does; nothing is written.

    A script that evaluates on several processes must guard the call with ``if __name__ == "__main__":``, since each
    imports it.

    Args:
        run: A run file, or the result of :func:`~megacore.training.read_run_config`.
        load: The native or training checkpoint to evaluate, or a directory of training checkpoints, for the newest;
            by default ``model.checkpoint``.
        nodes: The nodes that the work is spread over. This is called on each of them, and reads the same files.
        on_note: Called with each note for the user at the start.
        on_evaluation: Called after each evaluation; a function of a module, since another process calls it.

    Returns:
        One evaluation for each split with data, ``"valid"`` first.

    Raises:
        ConfigError: when the run file names no data to evaluate on.
        MegacoreError: in one of its kinds, when the checkpoint or the data cannot be used.
    """
    if not isinstance(run, RunConfig):
        run = read_run_config(Path(run))
    resolved = resolve_evaluation(run, load=None if load is None else Path(load), nodes=nodes)
    log_startup_notes(resolved.notes, nodes, on_note)
    evaluations: list[Evaluation] = run_on_ranks(
        evaluate_on_rank,
        resolved,
        on_evaluation,
        sizes=resolved.sizes,
        nodes=nodes,
        timeout=timedelta(seconds=run.parallel.timeout),
        settings=resolved.shared_settings,
        on_note=on_note,
    )
    return evaluations


def evaluate_on_rank(
    parallel: ParallelContext, resolved: ResolvedRun, on_evaluation: Callable[[Evaluation], None] | None = None
) -> list[Evaluation]:
    """Evaluate the model on this rank; the result is the same on all."""
    splits = [split for split in resolved.run.data.splits if split != "train"]
    require_agreement(resolved.checkpoint, resolved.run.data.files(splits), resolved.dataset_digests, parallel)
    with suggesting_earlier_checkpoint(resolved.start.path):
        engine = Engine(resolved, parallel, trains=False)
    evaluator = Evaluator(resolved, engine)
    evaluations = []
    for split in splits:
        evaluation = evaluator.evaluate(split, iteration=_trained_iterations(resolved.checkpoint))
        assert evaluation is not None  # no signal interrupts it
        evaluations.append(evaluation)
        if on_evaluation is not None and parallel.rank == 0:
            on_evaluation(evaluation)
    return evaluations


def _trained_iterations(checkpoint: Checkpoint) -> int:
    """Return the number of training steps behind ``checkpoint``; 0 if no run saved it."""
    manifest = checkpoint.manifest
    if manifest.training is not None:
        return manifest.training.iteration
    return next((int(entry["iterations"]) for entry in reversed(manifest.history) if "iterations" in entry), 0)
