"""How the processes of a run share its work."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megacore.errors import LayoutError
from megacore.parallel import ONE_NODE, Nodes, ParallelSizes, Stage, launched_environment
from megacore.training.config.run_config import RunConfig


def parallel_sizes(run: RunConfig, nodes: Nodes = ONE_NODE) -> ParallelSizes:
    """How the processes of the run are laid out: those that torchrun or srun started, or those that it starts itself.

    Raises:
        LayoutError: when tensor and pipeline parallelism do not fit their number.
    """
    section, num_gpus = run.parallel, torch.cuda.device_count()
    model_size = section.tensor_parallel * section.pipeline_parallel
    if num_gpus and (section.nproc_per_node or 0) > num_gpus:
        raise LayoutError(f"parallel.nproc_per_node is {section.nproc_per_node}, and this node has {num_gpus} GPUs")
    if launched := launched_environment(nodes):
        world, here = int(launched["WORLD_SIZE"]), int(launched["LOCAL_WORLD_SIZE"])
        if section.nproc_per_node not in (None, here):
            raise LayoutError(
                f"parallel.nproc_per_node is {section.nproc_per_node}, and {here} processes were started on this node: "
                "leave it out where megacore does not start them itself"
            )
        if here > num_gpus > 1:  # one GPU may be all that srun shows each of several processes
            raise LayoutError(f"{here} processes were started on this node, which has {num_gpus} GPUs")
    elif on_each_node := section.nproc_per_node or num_gpus:
        world = on_each_node * nodes.count
    elif model_size % nodes.count == 0:
        world = model_size
    else:
        raise LayoutError(
            f"tp {section.tensor_parallel} × pp {section.pipeline_parallel} takes {model_size} "
            f"{'process' if model_size == 1 else 'processes'}, which {nodes.count} nodes cannot share equally: say how "
            "many each of them starts, with --nproc-per-node or parallel.nproc_per_node"
        )
    return ParallelSizes.of_world(
        world,
        tp=section.tensor_parallel,
        pp=section.pipeline_parallel,
        dp_shard={"replicated": 1, "sharded": None, "hybrid": section.shard_size}[section.data_parallel],
        sequence_parallel=section.sequence_parallel,
    )


def describe_layout(run: RunConfig, sizes: ParallelSizes, stages: Sequence[Stage]) -> str:
    """How the work is spread, in a line."""
    told = f"{sizes.world} processes: {sizes}"
    if sizes.dp > 1:
        told += f", {run.parallel.data_parallel}"
    if len(stages) > 1:
        layers = " + ".join(str(len(stage.layers)) for stage in stages)
        told += f"; {run.parallel.pipeline_schedule} on stages of {layers} layers"
    return told
