"""``megacore train``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from megacore.cli.console import Console
from megacore.cli.notes import print_note, printing
from megacore.cli.options import parallel_size_option

if TYPE_CHECKING:
    from megacore.training.starting_point import Resume


class _HowToResume(click.Choice[str]):
    """``--resume`` alone, or with ``auto``; a run file that follows it would be taken for what it says."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if value not in self.choices:
            self.fail(f"it is followed by auto or nothing: megacore train {value} --resume, perhaps?", param, ctx)
        return super().convert(value, param, ctx)


@click.command()
@click.argument("run_file", metavar="RUN.toml", type=click.Path(path_type=Path))
@click.option(
    "--resume",
    is_flag=False,
    flag_value="yes",
    type=_HowToResume(["yes", "auto"]),
    help="Go on from the newest training checkpoint of the run; with auto, if there is one.",
)
@click.option(
    "--load",
    metavar="CKPT",
    type=click.Path(path_type=Path),
    help="Native checkpoint to start from, instead of model.checkpoint; or training checkpoint, or directory of them, "
    "to go on from.",
)
@click.option("--set", "overrides", multiple=True, metavar="SECTION.KEY=VALUE", help="Override a key of the run file.")
@parallel_size_option("--tp", "Tensor-parallel size; the same as --set parallel.tensor_parallel=N.", default=None)
@parallel_size_option("--pp", "Pipeline-parallel size; the same as --set parallel.pipeline_parallel=N.", default=None)
@parallel_size_option(
    "--nproc-per-node", "Processes to start on each node; the same as --set parallel.nproc_per_node=N.", default=None
)
@parallel_size_option("--nodes", "Nodes to train on; the command is started on each, with the same options.")
@click.option("--node-rank", type=click.IntRange(min=0), help="Which of the nodes this one is, from 0.")
@click.option("--addr", metavar="HOST", help="Address of node 0, under which all nodes reach it.")
@click.option(
    "--port",
    type=click.IntRange(1, 65535),
    default=29500,
    show_default=True,
    help="Port at which node 0 listens for the others.",
)
@click.option("--plain", is_flag=True, help="Print a line a step on a terminal too, instead of the panel.")
def train(
    run_file: Path,
    resume: Literal["yes", "auto"] | None,
    load: Path | None,
    overrides: tuple[str, ...],
    tp: int | None,
    pp: int | None,
    nproc_per_node: int | None,
    nodes: int,
    node_rank: int | None,
    addr: str | None,
    port: int,
    plain: bool,
) -> None:
    """Train as RUN.toml says, on as many processes as it needs, and save a checkpoint.

    Under torchrun or srun it joins the processes that are there.

    \b
    megacore train run.toml --tp 2 --set optimizer.lr=1e-4
    megacore train run.toml --tp 4 --nodes 2 --node-rank 0 --addr node1     # on node1
    megacore train run.toml --tp 4 --nodes 2 --node-rank 1 --addr node1     # on node2
    """
    if nodes > 1 and (node_rank is None or addr is None):
        raise click.UsageError(
            f"with --nodes {nodes}, say with --node-rank which of them this is (0 to {nodes - 1}) and with --addr the "
            "address of node 0"
        )
    from megacore.parallel import Nodes, is_first_process
    from megacore.training import read_run_config, train

    place = Nodes(nodes, node_rank or 0, addr or "localhost", port)
    sizes = {"tensor_parallel": tp, "pipeline_parallel": pp, "nproc_per_node": nproc_per_node}
    given = [f"parallel.{key}={size}" for key, size in sizes.items() if size is not None]
    run = read_run_config(run_file, (*overrides, *given))
    going_on: Resume = "auto" if resume == "auto" else resume is not None
    console = Console(log_interval=run.logging.log_interval, plain=plain)
    steps = train(
        run,
        resume=going_on,
        load=load,
        nodes=place,
        on_note=print_note,
        on_step=console,
        on_evaluation=console.evaluation,
    )
    if not is_first_process(place):
        return
    told = f"Saved {run.output.checkpoint}."
    if steps and steps[-1].stopped_by:
        last = steps[-1]
        told = f"Stopped by {last.stopped_by} after iteration {last.iteration}; --resume goes on from there."
    with printing():
        click.echo(told)
