"""``megacore evaluate``: the metrics of a model on the validation and test data of a run file."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from megacore.cli.console import format_evaluation
from megacore.cli.notes import print_note
from megacore.cli.run_options import read_run, run_file_argument, run_options

if TYPE_CHECKING:
    from megacore.training import Evaluation


@click.command()
@run_file_argument
@click.option(
    "--load",
    metavar="CKPT",
    type=click.Path(path_type=Path),
    help="Native or training checkpoint to evaluate, or directory of training checkpoints, to use the newest.  "
    "[default: model.checkpoint]",
)
@run_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per split.")
def evaluate(run_file: Path, load: Path | None, as_json: bool, **options: Any) -> None:
    """Evaluate a model on the data of RUN.toml.

    The metrics are those of the run file, on its validation and its test data. Nothing is trained.

    The command starts the processes that the run needs. Under torchrun or srun it joins the existing processes.

    \b
    megacore evaluate run.toml --load trained --set 'evaluation.iters="all"'
    """
    run, nodes = read_run(run_file, **options)
    from megacore.training import evaluate

    evaluate(run, load=load, nodes=nodes, on_note=print_note, on_evaluation=_print_json if as_json else _print_line)


def _print_line(evaluation: Evaluation) -> None:
    click.echo(format_evaluation(evaluation))


def _print_json(evaluation: Evaluation) -> None:
    values = {name: value if math.isfinite(value) else None for name, value in evaluation.values.items()}
    click.echo(json.dumps(dataclasses.asdict(evaluation) | {"values": values}))
