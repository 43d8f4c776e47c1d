"""``megacore train``: the training of a model, as a run file describes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import click

from megacore.cli.console import Console
from megacore.cli.notes import print_note, printing
from megacore.cli.run_options import read_run, run_file_argument, run_options


class _ResumeType(click.Choice[str]):
    """The value of ``--resume``, with a hint for a run file that was taken for it."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if value not in self.choices:
            self.fail(f"the only value is auto. Did you mean: megacore train {value} --resume", param, ctx)
        return super().convert(value, param, ctx)


@click.command()
@run_file_argument
@click.option(
    "--resume",
    is_flag=False,
    flag_value="yes",
    type=_ResumeType(["yes", "auto"]),
    help="Resume from the newest training checkpoint of the run; with auto, only if there is one.",
)
@click.option(
    "--load",
    metavar="CKPT",
    type=click.Path(path_type=Path),
    help="Native checkpoint to start from instead of model.checkpoint; or training checkpoint, or directory of them, "
    "to resume from.",
)
@run_options
@click.option("--plain", is_flag=True, help="Print lines instead of the live panel on a terminal too.")
def train(
    run_file: Path,
    resume: Literal["yes", "auto"] | None,
    load: Path | None,
    plain: bool,
    **options: Any,
) -> None:
    """Train a model as RUN.toml describes.

    The trained model is saved as the native checkpoint output.checkpoint. The command starts the processes that the
    run needs; under torchrun or srun it joins the existing ones.

    \b
    megacore train run.toml --tp 2 --set optimizer.lr=1e-4
    megacore train run.toml --tp 4 --nodes 2 --node-rank 0 --addr node1     # on node1
    megacore train run.toml --tp 4 --nodes 2 --node-rank 1 --addr node1     # on node2
    """
    run, nodes = read_run(run_file, **options)
    from megacore.parallel import is_first_process
    from megacore.training import train

    console = Console(log_interval=run.logging.log_interval, plain=plain)
    result = train(
        run,
        resume="auto" if resume == "auto" else resume is not None,
        load=load,
        nodes=nodes,
        on_note=print_note,
        on_step=console,
        on_evaluation=console.evaluation,
    )
    if not is_first_process(nodes):
        return
    outcome = f"Saved {run.output.checkpoint}."
    if result.stopped_by is not None and result.last_step is not None:
        outcome = f"Stopped by {result.stopped_by} after iteration {result.last_step.iteration}; resume with --resume."
    with printing():
        click.echo(outcome)
