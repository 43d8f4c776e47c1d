"""The parallel runtime: processes on a mesh, parameters cut over them, and layers that compute on the parts.

Start with ``context`` (the place of a process) and ``sizes``, then ``tensor``, ``pipeline`` and ``data_parallel`` for
the kinds of parallelism, and ``launch`` for how the processes start.
"""

from megacore.parallel.context import ParallelContext, any_rank, broadcast_object
from megacore.parallel.data_parallel import GradientBuckets, gather_parameter, local_boxes, shard
from megacore.parallel.gradients import local_gradients, local_square_norm, scale_gradients
from megacore.parallel.launch.failures import is_lost_connection, set_failed_rank
from megacore.parallel.launch.launcher import is_first_process, launched_environment, run_on_ranks
from megacore.parallel.launch.nodes import ONE_NODE, Nodes
from megacore.parallel.launch.process_group import exit_process, local_device, process_group
from megacore.parallel.launch.restarts import was_restarted
from megacore.parallel.pipeline.forward_only import run_forward
from megacore.parallel.pipeline.schedule import SCHEDULES, Pipeline, check_schedule, local_stages, stage_owners
from megacore.parallel.pipeline.stages import Stage, balanced_stages, stages_from_counts
from megacore.parallel.sizes import ParallelSizes
from megacore.parallel.tensor.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    VocabParallelHead,
    vocab_parallel_logits,
)
from megacore.parallel.tensor.loss import linear_cross_entropy, token_scores
from megacore.parallel.tensor.module import (
    ParallelModule,
    ReplicatedModule,
    clear_cast_cache,
    local_tensor,
    materialize,
    parameter_specs,
)
from megacore.parallel.tensor.sharding import (
    Box,
    ParameterSpec,
    Rows,
    check_tensor_parallel,
    chunk_bounds,
    describe_imbalance,
    join_parts,
)
from megacore.signals import StopRequest, stop_requests

__all__ = [
    "ONE_NODE",
    "SCHEDULES",
    "Box",
    "ColumnParallelLinear",
    "GradientBuckets",
    "Nodes",
    "ParallelContext",
    "ParallelModule",
    "ParallelSizes",
    "ParameterSpec",
    "Pipeline",
    "ReplicatedModule",
    "RowParallelLinear",
    "Rows",
    "Stage",
    "StopRequest",
    "VocabParallelEmbedding",
    "VocabParallelHead",
    "any_rank",
    "balanced_stages",
    "broadcast_object",
    "check_schedule",
    "check_tensor_parallel",
    "chunk_bounds",
    "clear_cast_cache",
    "describe_imbalance",
    "exit_process",
    "gather_parameter",
    "is_first_process",
    "is_lost_connection",
    "join_parts",
    "launched_environment",
    "linear_cross_entropy",
    "local_boxes",
    "local_device",
    "local_gradients",
    "local_square_norm",
    "local_stages",
    "local_tensor",
    "materialize",
    "parameter_specs",
    "process_group",
    "run_forward",
    "run_on_ranks",
    "scale_gradients",
    "set_failed_rank",
    "shard",
    "stage_owners",
    "stages_from_counts",
    "stop_requests",
    "token_scores",
    "vocab_parallel_logits",
    "was_restarted",
]
