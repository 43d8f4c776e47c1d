"""What ``train`` and ``evaluate`` share: a run file, what overrides it, and the nodes that the work is spread over."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from megacore.cli.options import Command, parallel_size_option

if TYPE_CHECKING:
    from megacore.parallel import Nodes
    from megacore.training import RunConfig

run_file_argument = click.argument("run_file", metavar="RUN.toml", type=click.Path(path_type=Path))
"""What the command does, key by key."""

_OPTIONS = (
    click.option(
        "--set", "overrides", multiple=True, metavar="SECTION.KEY=VALUE", help="Override a key of the run file."
    ),
    parallel_size_option("--tp", "Tensor-parallel size; the same as --set parallel.tensor_parallel=N.", default=None),
    parallel_size_option(
        "--pp", "Pipeline-parallel size; the same as --set parallel.pipeline_parallel=N.", default=None
    ),
    parallel_size_option(
        "--nproc-per-node",
        "Processes to start on each node; the same as --set parallel.nproc_per_node=N.",
        default=None,
    ),
    parallel_size_option(
        "--nodes", "Nodes that share the work; the command is started on each, with the same options."
    ),
    click.option("--node-rank", type=click.IntRange(min=0), help="Which of the nodes this one is, from 0."),
    click.option("--addr", metavar="HOST", help="Address of node 0, under which all nodes reach it."),
    click.option(
        "--port",
        type=click.IntRange(1, 65535),
        default=29500,
        show_default=True,
        help="Port at which node 0 listens for the others.",
    ),
)


def run_options(command: Command) -> Command:
    """The options that :func:`read_run` takes."""
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
    """The run that the options ask for, and the nodes that it is spread over.

    Raises:
        click.UsageError: when options for several nodes are missing.
        ConfigError: when the run file or an override is malformed.
    """
    if nodes > 1 and (node_rank is None or addr is None):
        raise click.UsageError(
            f"with --nodes {nodes}, say with --node-rank which of them this is (0 to {nodes - 1}) and with --addr the "
            "address of node 0"
        )
    from megacore.parallel import Nodes
    from megacore.training import read_run_config

    place = Nodes(nodes, node_rank or 0, addr or "localhost", port)
    sizes = {"tensor_parallel": tp, "pipeline_parallel": pp, "nproc_per_node": nproc_per_node}
    given = [f"parallel.{key}={size}" for key, size in sizes.items() if size is not None]
    return read_run_config(run_file, (*overrides, *given)), place
