"""The parallel runtime: where a process stands, how parameters are cut, and the layers that compute on the parts."""

from megacore.parallel.context import ParallelContext, local_device, process_group
from megacore.parallel.cuts import (
    Box,
    ParameterSpec,
    Rows,
    check_tensor_parallel,
    chunk_bounds,
    describe_imbalance,
    join_parts,
)
from megacore.parallel.data_parallel import GradientBuckets, gathered, own_boxes, shard
from megacore.parallel.failures import attribute, is_lost_connection
from megacore.parallel.forward import run_forward
from megacore.parallel.gradients import local_gradients, own_square_norm, scale_gradients
from megacore.parallel.launch import is_first_process, launched_environment, on_ranks
from megacore.parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    VocabParallelHead,
    vocab_parallel_logits,
)
from megacore.parallel.loss import linear_cross_entropy, token_scores
from megacore.parallel.module import (
    ParallelModule,
    ReplicatedModule,
    forget_casts,
    local_part,
    materialize,
    parameter_specs,
)
from megacore.parallel.nodes import ONE_NODE, Nodes
from megacore.parallel.pipeline import SCHEDULES, Pipeline, check_schedule, owners_of_stages, stages_on_rank
from megacore.parallel.rounds import is_started_anew
from megacore.parallel.sizes import ParallelSizes
from megacore.parallel.stages import Stage, balanced_stages, stages_of
from megacore.parallel.stopping import StopRequest, end_process, stop_requests
from megacore.parallel.telling import holds_on_any, told_by_first

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
    "attribute",
    "balanced_stages",
    "check_schedule",
    "check_tensor_parallel",
    "chunk_bounds",
    "describe_imbalance",
    "end_process",
    "forget_casts",
    "gathered",
    "holds_on_any",
    "is_first_process",
    "is_lost_connection",
    "is_started_anew",
    "join_parts",
    "launched_environment",
    "linear_cross_entropy",
    "local_device",
    "local_gradients",
    "local_part",
    "materialize",
    "on_ranks",
    "own_boxes",
    "own_square_norm",
    "owners_of_stages",
    "parameter_specs",
    "process_group",
    "run_forward",
    "scale_gradients",
    "shard",
    "stages_of",
    "stages_on_rank",
    "stop_requests",
    "token_scores",
    "told_by_first",
    "vocab_parallel_logits",
]
