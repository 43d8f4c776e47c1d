"""The sections of the run file on how the model computes: precision, parallelism, recomputation, dropout, kernels."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from pydantic import Field

from megacore.parallel import SCHEDULES
from megacore.training.config.section import Section

_COMPUTE_DTYPES = {"fp32": torch.float32, "fp64": torch.float64, "bf16": torch.bfloat16, "fp16": torch.float16}


class ModelSection(Section):
    """The weights to start from, and the precision to compute in."""

    checkpoint: Path = Field(description="Native checkpoint to start from, split in any way.")
    dtype: Literal["fp32", "fp64", "bf16", "fp16"] = Field(
        "fp32",
        description='Precision of the computation: `"fp32"`, `"fp64"`, `"bf16"` or `"fp16"`. With 16 bit, the weights, '
        "the optimizer state and the gradients summed over micro-batches and replicas stay in 32 bit.",
    )
    rope_scaling_factor: float | None = Field(
        None,
        ge=1,
        description="Divide the positions of the rotary embedding by this factor, for a longer context (linear "
        "scaling). Default: the scaling of the checkpoint.",
    )
    rope_theta: float | None = Field(
        None, gt=0, description="Base of the rotary embedding. Default: that of the checkpoint."
    )
    max_position_embeddings: int | None = Field(
        None,
        gt=0,
        description="Context length recorded for the trained model. Default: that of the checkpoint, multiplied by "
        "rope_scaling_factor.",
    )

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of the forward and backward pass."""
        return _COMPUTE_DTYPES[self.dtype]

    @property
    def param_dtype(self) -> torch.dtype:
        """The dtype of weights, gradients and optimizer state: never narrower than float32."""
        return torch.float32 if self.compute_dtype.itemsize < 4 else self.compute_dtype


class ParallelSection(Section):
    """The distribution of the work over processes. What tensor × pipeline parallelism leaves is data-parallel."""

    tensor_parallel: int = Field(1, gt=0, description="Number of processes that share each layer.")
    sequence_parallel: bool = Field(
        False, description="Between the parallel layers, let each process hold a slice of the sequence."
    )
    pipeline_parallel: int = Field(1, gt=0, description="Number of processes that hold different layers.")
    pipeline_schedule: Literal["1F1B", "Interleaved1F1B", "InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV"] = (
        Field(
            "1F1B",
            description='torch\'s pipeline schedule: `"1F1B"`, `"Interleaved1F1B"`, `"InterleavedZeroBubble"`, '
            '`"ZBVZeroBubble"` or `"DualPipeV"`.',
        )
    )
    stages_per_rank: int | None = Field(
        None,
        gt=0,
        description="Number of pipeline stages per process. Default: 1 for 1F1B, 2 for the other schedules.",
    )
    layers_per_stage: tuple[int, ...] | None = Field(
        None,
        description="Number of layers of each stage. Default: balanced, the embedding and the head included.",
    )
    data_parallel: Literal["replicated", "sharded", "hybrid"] = Field(
        "replicated",
        description='`"replicated"`: each data-parallel process holds all parameters; `"sharded"`: each holds a shard; '
        '`"hybrid"`: shard_size processes share one copy.',
    )
    shard_size: int | None = Field(None, gt=0, description="`hybrid` only: number of processes that share one copy.")
    nproc_per_node: int | None = Field(
        None,
        gt=0,
        description="Number of processes to start on each node. Default: one per GPU or, without GPUs, as many as "
        "tensor × pipeline parallelism needs.",
    )
    timeout: int = Field(
        1800, gt=0, description="Seconds that a process waits for another one before the run is aborted."
    )

    @property
    def num_stages_per_rank(self) -> int:
        """The number of pipeline stages of each process, its default resolved."""
        return self.stages_per_rank or (1 if self.pipeline_parallel == 1 or self.pipeline_schedule == "1F1B" else 2)

    @property
    def num_stages(self) -> int:
        """The number of pipeline stages of the whole model."""
        return self.pipeline_parallel * self.num_stages_per_rank

    @property
    def splits_backward(self) -> bool:
        """True if the schedule computes the gradients of parameters apart from those of activations."""
        return self.pipeline_parallel > 1 and SCHEDULES[self.pipeline_schedule].splits_backward


class LossScaleSection(Section):
    """The dynamic loss scale, which keeps gradients in fp16 from vanishing (Micikevicius et al., 2017,
    arXiv:1710.03740)."""

    initial: float = Field(65536.0, gt=0, description="Loss scale of the first step.")
    minimum: float = Field(1.0, gt=0, description="Lower bound of the loss scale.")
    window: int = Field(1000, gt=0, description="Number of steps without an overflow after which the scale doubles.")
    hysteresis: int = Field(2, gt=0, description="Number of overflows within a window that halve the scale.")


class RecomputeSection(Section):
    """Activation recomputation: computing activations again in the backward pass instead of keeping them."""

    granularity: Literal["none", "selective", "full"] = Field(
        "none",
        description='`"none"`; `"selective"`: recompute what lies between the projections of attention; `"full"`: '
        "recompute the whole layer from its input.",
    )
    num_layers: int = Field(
        1, gt=0, description="`full` only: number of consecutive layers recomputed from one stored input."
    )


class DropoutSection(Section):
    """Dropout. Masks depend on the seed and the sample, not on the layout of the processes.

    The masks of attention are the exception: they depend on tensor_parallel and micro_batch_size too.
    """

    hidden: float = Field(
        0.0, ge=0, lt=1, description="Dropout of the outputs of attention and MLP, and of the embedding."
    )
    attention: float = Field(0.0, ge=0, lt=1, description="Dropout of the attention weights.")
    lima: bool = Field(
        False,
        description="Let `hidden` rise linearly from 0 at the first layer to its value at the last, with no dropout "
        "of the embedding.",
    )
    seed: int = Field(1234, ge=0, description="Seed for the dropout masks.")


class KernelsSection(Section):
    """The implementations to compute with. :data:`megacore.model.kernels.KERNELS` lists what each needs."""

    attention: Literal["auto", "math", "flash", "efficient", "flash-attn"] = Field(
        "auto",
        description='`"auto"`: torch chooses one of its own kernels at each call; `"math"`, `"flash"` or '
        '`"efficient"`: that one of torch\'s kernels; `"flash-attn"`: the package, on GPUs in 16 bit.',
    )
    norm: Literal["auto", "torch", "apex"] = Field(
        "auto", description='`"torch"` (the same as `"auto"`) or `"apex"`: NVIDIA\'s, on GPUs.'
    )
    optimizer: Literal["auto", "torch", "apex"] = Field(
        "auto", description='`"torch"` (the same as `"auto"`) or `"apex"`: NVIDIA\'s, on GPUs.'
    )
    compile: bool = Field(False, description="Compile each layer with torch. On a CPU this needs a C++ compiler.")

    @property
    def chosen(self) -> dict[str, str]:
        """The name of the chosen kernel for each operation."""
        return {"attention": self.attention, "norm": self.norm, "optimizer": self.optimizer}
