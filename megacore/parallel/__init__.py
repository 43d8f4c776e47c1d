"""The parallel runtime: where a process stands, how parameters are cut, and the layers that compute on the parts."""

from megacore.parallel.context import ParallelContext, local_device, process_group
from megacore.parallel.cuts import (
    ParameterSpec,
    Rows,
    check_tensor_parallel,
    chunk_bounds,
    describe_imbalance,
)
from megacore.parallel.launch import end_process, is_first_process, on_ranks
from megacore.parallel.layers import (
    ColumnParallelLinear,
    ReplicatedModule,
    RowParallelLinear,
    VocabParallelEmbedding,
    VocabParallelHead,
    vocab_parallel_logits,
)
from megacore.parallel.loss import vocab_parallel_cross_entropy
from megacore.parallel.module import ParallelModule, materialize, parameter_specs

__all__ = [
    "ColumnParallelLinear",
    "ParallelContext",
    "ParallelModule",
    "ParameterSpec",
    "ReplicatedModule",
    "RowParallelLinear",
    "Rows",
    "VocabParallelEmbedding",
    "VocabParallelHead",
    "check_tensor_parallel",
    "chunk_bounds",
    "describe_imbalance",
    "end_process",
    "is_first_process",
    "local_device",
    "materialize",
    "on_ranks",
    "parameter_specs",
    "process_group",
    "vocab_parallel_cross_entropy",
    "vocab_parallel_logits",
]
