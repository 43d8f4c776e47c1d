"""What every run does before it starts its processes: open the checkpoint, refuse what cannot be run, tell of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from megacore.checkpoint import Checkpoint
from megacore.errors import ConfigError
from megacore.model import model_specs, read_config
from megacore.parallel import Nodes, ParallelSizes, check_tensor_parallel, is_first_process
from megacore.plugins import get_family
from megacore.training.config.run_config import RunConfig
from megacore.training.layout import describe_layout, parallel_sizes
from megacore.training.plan import check_run, pipeline_stages
from megacore.training.start import open_start
from megacore.training.starting_point import offering_the_one_before


def open_for_run(run: RunConfig, path: Path, nodes: Nodes) -> tuple[Checkpoint, ParallelSizes, list[str]]:
    """Open the checkpoint in ``path``; return it, how the run's processes are laid out, and what to tell of that.

    Raises:
        MegacoreError: in one of its kinds, when the checkpoint cannot be read, or the run cannot work with it.
    """
    if path == run.model.checkpoint and not path.is_dir():
        raise ConfigError(
            f"model.checkpoint: {path} is not a directory (paths in a run file are relative to the directory that the "
            "command is started in)"
        )
    with offering_the_one_before(path):
        checkpoint = open_start(run, path)
    family = get_family(checkpoint.manifest.family)
    config = read_config(family, checkpoint)
    specs = model_specs(config, family.build_layer)
    check_tensor_parallel(specs, run.parallel.tensor_parallel)
    sizes = parallel_sizes(run, nodes)
    check_run(run, config, specs, dp_size=sizes.dp)
    notes = [describe_layout(run, sizes, pipeline_stages(run, config, specs))] if sizes.world > 1 else []
    return checkpoint, sizes, notes


def tell_at_start(notes: Iterable[str], nodes: Nodes, on_note: Callable[[str], None] | None) -> None:
    """Tell ``notes`` on the first process, and on each of several nodes where it meets the others."""
    if on_note is None:
        return
    if is_first_process(nodes):
        for note in notes:
            on_note(note)
    if nodes.count > 1:
        on_note(f"node {nodes.rank} of {nodes.count} meets the others at {nodes.address}:{nodes.port}")
