"""The options of ``train`` and ``evaluate``: a run file, overrides of its keys, and the nodes of the run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from megacore.cli.options import Command, parallel_size_option

if TYPE_CHECKING:
    from megacore.parallel import Nodes
    from megacore.training import RunConfig

run_file_argument = click.argument("run_file", metavar="RUN.toml", type=click.Path(path_type=Path))

_OPTIONS = (
    click.option(
        "--set",
        "overrides",
        multiple=True,
        metavar="SECTION.KEY=VALUE",
        help="Override a key of the run file. Repeatable.",
    ),
    parallel_size_option("--tp", "Tensor-parallel size. Short for --set parallel.tensor_parallel=N.", default=None),
    parallel_size_option("--pp", "Pipeline-parallel size. Short for --set parallel.pipeline_parallel=N.", default=None),
    parallel_size_option(
        "--nproc-per-node",
        "Processes to start on each node. Short for --set parallel.nproc_per_node=N.",
        default=None,
    ),
    parallel_size_option("--nodes", "Number of nodes. Start the command on each of them with the same options."),
    click.option("--node-rank", type=click.IntRange(min=0), help="Rank of this node, from 0."),
    click.option("--addr", metavar="HOST", help="Address of node 0, reachable from all nodes."),
    click.option(
        "--port",
        type=click.IntRange(1, 65535),
        default=29500,
        show_default=True,
        help="Port on which node 0 listens.",
    ),
)


def run_options(command: Command) -> Command:
    """Add the options that :func:`read_run` takes to ``command``."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def read_run(
    run_file: Path,
    *,
    overrides: tuple[str, ...],
    tp: int | None,
    pp: int | None,
    nproc_per_node: int | None,
    nodes: int,
    node_rank: int | None,
    addr: str | None,
    port: int,
) -> tuple[RunConfig, Nodes]:
    """Return the run file with all overrides applied, and the nodes of the run.

    Raises:
        click.UsageError: An option that several nodes require is missing.
        ConfigError: The run file or an override is malformed.
    """
    if nodes > 1 and (node_rank is None or addr is None):
        raise click.UsageError(
            f"--nodes {nodes} requires --node-rank, the rank of this node (0 to {nodes - 1}), and --addr, the address "
            "of node 0"
        )
    from megacore.parallel import Nodes
    from megacore.training import read_run_config

    sizes = {"tensor_parallel": tp, "pipeline_parallel": pp, "nproc_per_node": nproc_per_node}
    size_overrides = [f"parallel.{key}={size}" for key, size in sizes.items() if size is not None]
    run = read_run_config(run_file, (*overrides, *size_overrides))
    return run, Nodes(nodes, node_rank or 0, addr or "localhost", port)
