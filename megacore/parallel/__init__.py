"""The parallel runtime: processes on a mesh, parameters cut over them, and layers that compute on the parts.

Start with ``context`` (the place of a process) and ``sizes``, then ``tensor``, ``pipeline`` and ``data_parallel`` for
the kinds of parallelism, and ``launch`` for how the processes start.
"""

from megacore.parallel.context import (
    ParallelContext as ParallelContext,
    any_rank as any_rank,
    broadcast_object as broadcast_object,
)
from megacore.parallel.data_parallel import (
    GradientBuckets as GradientBuckets,
    gather_parameter as gather_parameter,
    local_boxes as local_boxes,
    shard as shard,
)
from megacore.parallel.gradients import (
    local_gradients as local_gradients,
    local_square_norm as local_square_norm,
    scale_gradients as scale_gradients,
)
from megacore.parallel.launch.failures import (
    is_lost_connection as is_lost_connection,
    set_failed_rank as set_failed_rank,
)
from megacore.parallel.launch.launcher import (
    is_first_process as is_first_process,
    launched_environment as launched_environment,
    run_on_ranks as run_on_ranks,
)
from megacore.parallel.launch.nodes import ONE_NODE as ONE_NODE, Nodes as Nodes
from megacore.parallel.launch.process_group import (
    exit_process as exit_process,
    local_device as local_device,
    process_group as process_group,
)
from megacore.parallel.launch.restarts import was_restarted as was_restarted
from megacore.parallel.pipeline.forward_only import run_forward as run_forward
from megacore.parallel.pipeline.schedule import (
    SCHEDULES as SCHEDULES,
    Pipeline as Pipeline,
    check_schedule as check_schedule,
    local_stages as local_stages,
    stage_owners as stage_owners,
)
from megacore.parallel.pipeline.stages import (
    Stage as Stage,
    balanced_stages as balanced_stages,
    stages_from_counts as stages_from_counts,
)
from megacore.parallel.sizes import ParallelSizes as ParallelSizes
from megacore.parallel.tensor.layers import (
    ColumnParallelLinear as ColumnParallelLinear,
    RowParallelLinear as RowParallelLinear,
    VocabParallelEmbedding as VocabParallelEmbedding,
    VocabParallelHead as VocabParallelHead,
    vocab_parallel_logits as vocab_parallel_logits,
)
from megacore.parallel.tensor.loss import linear_cross_entropy as linear_cross_entropy, token_scores as token_scores
from megacore.parallel.tensor.module import (
    ParallelModule as ParallelModule,
    ReplicatedModule as ReplicatedModule,
    clear_cast_cache as clear_cast_cache,
    local_tensor as local_tensor,
    materialize as materialize,
    parameter_specs as parameter_specs,
)
from megacore.parallel.tensor.sharding import (
    Box as Box,
    ParameterSpec as ParameterSpec,
    Rows as Rows,
    check_tensor_parallel as check_tensor_parallel,
    chunk_bounds as chunk_bounds,
    describe_imbalance as describe_imbalance,
    join_parts as join_parts,
)
from megacore.signals import StopRequest as StopRequest, stop_requests as stop_requests
