"""Evaluating a model by itself, without training it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path

from megacore.checkpoint import Checkpoint
from megacore.data import Split
from megacore.errors import ConfigError
from megacore.parallel import ONE_NODE, Nodes, ParallelContext, run_on_ranks
from megacore.training.agreement import require_agreement
from megacore.training.checkpointing.directory import CheckpointDirectory
from megacore.training.config.run_config import RunConfig, read_run_config
from megacore.training.engine import Engine
from megacore.training.evaluation.evaluator import Evaluation, Evaluator
from megacore.training.opening import open_for_run, tell_at_start
from megacore.training.preflight import check_and_describe_evaluation, settings_to_agree_on
from megacore.training.start import open_start
from megacore.training.starting_point import StartingPoint, offering_the_one_before


def evaluate(
    run: RunConfig | Path | str,
    *,
    load: Path | str | None = None,
    nodes: Nodes = ONE_NODE,
    on_note: Callable[[str], None] | None = None,
    on_evaluation: Callable[[Evaluation], None] | None = None,
) -> list[Evaluation]:
    """Evaluate a model on what ``run`` validates and tests on, as the run does; nothing is trained or written.

    A script that evaluates on several processes must guard the call with ``if __name__ == "__main__":``, since each
    imports it.

    Args:
        run: a run file, or what :func:`~megacore.training.config.run_config.read_run_config` made of one.
        load: the native or training checkpoint to evaluate, or a directory of training checkpoints, for the newest;
            by default ``model.checkpoint``.
        nodes: those that the work is spread over; this is called on each of them, and reads the same files.
        on_note: is told what a person should know at the start.
        on_evaluation: is told of each evaluation as it is done; a function of a module, since another process calls it.

    Returns:
        One evaluation of each split that there is something for, ``"valid"`` first.

    Raises:
        ConfigError: when the run file names nothing to evaluate on.
        MegacoreError: in one of its kinds, when the checkpoint or the data cannot be used.
    """
    if not isinstance(run, RunConfig):
        run = read_run_config(Path(run))
    splits = [split for split in run.data.splits if split != "train"]
    if not splits:
        raise ConfigError(
            "there is nothing to evaluate on: name it with data.valid_prefix or data.test_prefix, or give data.split"
        )
    path = run.model.checkpoint
    if load is not None:
        path = CheckpointDirectory(Path(load)).newest() or Path(load)
    checkpoint, sizes, layout_notes = open_for_run(run, path, nodes)
    tell_at_start([*layout_notes, *check_and_describe_evaluation(run, checkpoint, splits)], nodes, on_note)
    return run_on_ranks(
        _evaluate_on_rank,
        run,
        path,
        splits,
        on_evaluation,
        sizes=sizes,
        nodes=nodes,
        timeout=timedelta(seconds=run.parallel.timeout),
        settings=settings_to_agree_on(run, StartingPoint(path)),
        on_note=on_note,
    )


def _evaluate_on_rank(
    parallel: ParallelContext,
    run: RunConfig,
    path: Path,
    splits: Sequence[Split],
    on_evaluation: Callable[[Evaluation], None] | None,
) -> list[Evaluation]:
    checkpoint = open_start(run, path)
    require_agreement(checkpoint, run.data.files(splits), parallel)
    with offering_the_one_before(path):
        engine = Engine(run, checkpoint, parallel, trains=False)
    evaluator = Evaluator(engine, checkpoint)
    evaluations = []
    for split in splits:
        evaluation = evaluator.evaluate(split, iteration=_iterations_of(checkpoint))
        assert evaluation is not None  # nobody asks it to stop
        evaluations.append(evaluation)
        if on_evaluation is not None and parallel.rank == 0:
            on_evaluation(evaluation)
    return evaluations


def _iterations_of(checkpoint: Checkpoint) -> int:
    """How many steps the run has taken that saved ``checkpoint``; 0 where no run did."""
    manifest = checkpoint.manifest
    if manifest.training is not None:
        return manifest.training.iteration
    return next((int(entry["iterations"]) for entry in reversed(manifest.history) if "iterations" in entry), 0)
