"""Data parallelism: gradients summed over replicas, or parameters sharded over processes by torch's FSDP2."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from megacore.parallel.context import ParallelContext
from megacore.parallel.tensor.module import local_tensor, parameter_specs
from megacore.parallel.tensor.sharding import Box, ParameterSpec, chunk_bounds

BUCKET_BYTES = 25 * 2**20
"""Minimum size of a buffer of gradients; without its last parameter it is smaller."""


class GradientBuckets:
    """The gradients of replicated parameters, in contiguous buffers that are summed over the replicas one at a time.

    The sum of a buffer starts as soon as the last of its gradients is complete, while the backward pass computes
    others. The gradients are views of the buffers, so that nothing is copied: :meth:`zero` sets them to zero, and they
    are never ``None``.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], group: dist.ProcessGroup) -> None:
        self.group = group
        self._buckets: list[_Bucket] = []
        # Backward reaches the last parameters first.
        for parameters_of_bucket in _in_buckets(reversed(list(parameters))):
            bucket = _Bucket(parameters_of_bucket)
            self._buckets.append(bucket)
            for parameter in parameters_of_bucket:
                parameter.register_post_accumulate_grad_hook(lambda _, bucket=bucket: self._count(bucket))
        self._num_backwards: int | None = None

    def zero(self) -> None:
        """Set all gradients to zero."""
        for bucket in self._buckets:
            bucket.buffer.zero_()

    def expect(self, num_backwards: int | None) -> None:
        """Set how often each gradient will be added to before it is complete.

        ``None`` is for a backward pass that calls no hooks when it has added to a gradient: the sums then start at
        :meth:`finish`.
        """
        self._num_backwards = num_backwards
        for bucket in self._buckets:
            bucket.num_added = 0

    def finish(self) -> None:
        """Wait until all gradients are summed."""
        for bucket in self._buckets:
            if bucket.work is None:
                self._launch(bucket)
        for bucket in self._buckets:
            assert bucket.work is not None
            bucket.work.wait()
            bucket.work = None

    def _count(self, bucket: _Bucket) -> None:
        bucket.num_added += 1
        if self._num_backwards is not None and bucket.num_added == self._num_backwards * bucket.num_parameters:
            self._launch(bucket)

    def _launch(self, bucket: _Bucket) -> None:
        bucket.work = dist.all_reduce(bucket.buffer, group=self.group, async_op=True)


class _Bucket:
    def __init__(self, parameters: list[nn.Parameter]) -> None:
        locals_ = [local_tensor(parameter) for parameter in parameters]
        self.num_parameters = len(parameters)
        self.num_added = 0
        self.work: dist.Work | None = None
        self.buffer = locals_[0].new_zeros(sum(local.numel() for local in locals_))
        for parameter, view in zip(parameters, self.buffer.split([x.numel() for x in locals_]), strict=True):
            parameter.grad = _view_like_parameter(view, parameter)


def _in_buckets(parameters: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Group consecutive parameters of one dtype into buckets of at least :data:`BUCKET_BYTES`."""
    buckets: list[list[nn.Parameter]] = []
    num_bytes = BUCKET_BYTES
    for parameter in parameters:
        if num_bytes >= BUCKET_BYTES or buckets[-1][0].dtype != parameter.dtype:
            buckets.append([])
            num_bytes = 0
        buckets[-1].append(parameter)
        num_bytes += local_tensor(parameter).nbytes
    return buckets


def _view_like_parameter(flat: Tensor, parameter: nn.Parameter) -> Tensor:
    """View ``flat`` in the shape of ``parameter``, as a DTensor if that is one."""
    local = flat.view(local_tensor(parameter).shape)
    if not isinstance(parameter, DTensor):
        return local
    return DTensor.from_local(
        local,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def shard(
    module: nn.Module, parallel: ParallelContext, *, compute_dtype: torch.dtype | None, reshard_after_forward: bool
) -> None:
    """Shard the parameters of ``module`` over the axis ``dp_shard``, and sum their gradients over data parallelism.

    The parameters of a module are gathered together for its forward and backward pass, in ``compute_dtype`` if that is
    not ``None``;
    gradients are summed in the dtype of the parameters. Parameters of submodules that are sharded already are left to
    these: so the layers come first, and the whole model last. See ``torch.distributed.fsdp.fully_shard``.

    Args:
        module: The module, whose parameters have their values.
        parallel: The mesh to shard over.
        compute_dtype: The dtype of the gathered parameters.
        reshard_after_forward: True to free the gathered parameters until the backward pass needs them.
    """
    assert parallel.mesh is not None
    axes = ("dp_replicate", "dp_shard") if parallel.sizes.dp_replicate > 1 else ("dp_shard",)
    parameters = dict(module.named_parameters())
    dims = {
        parameters[name]: sharded_dim(spec, tuple(local_tensor(parameters[name]).shape), parallel)
        for name, spec in parameter_specs(module).items()
    }
    [param_dtype] = {parameter.dtype for parameter in dims}
    fully_shard(
        module,
        mesh=parallel.mesh[axes],
        mp_policy=MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=param_dtype, cast_forward_inputs=False),
        reshard_after_forward=reshard_after_forward,
        shard_placement_fn=lambda parameter: Shard(dims[parameter]),
    )
    assert isinstance(module, FSDPModule)
    # The loss is the sum of the shares of all processes, not a mean.
    module.set_gradient_divide_factor(1.0)
    module.set_force_sum_reduction_for_comms(True)


def sharded_dim(spec: ParameterSpec, local_shape: tuple[int, ...], parallel: ParallelContext) -> int:
    """Return the axis along which a parameter is sharded: the first if possible, else the longest divisible one.

    The axis that tensor parallelism cuts and the one with replicas are avoided if another one is possible.
    """
    avoided: set[int] = set()
    if parallel.tp_size > 1 and spec.shard_dim is not None:
        avoided = (
            {spec.shard_dim} if spec.ranks_per_unit(parallel.tp_size) == 1 else {spec.shard_dim, spec.shard_dim + 1}
        )
    even = [dim for dim, size in enumerate(local_shape) if dim not in avoided and size % parallel.sizes.dp_shard == 0]
    return 0 if not even or 0 in even else max(even, key=lambda dim: local_shape[dim])


def local_boxes(parameter: Tensor, spec: ParameterSpec, parallel: ParallelContext) -> list[Box]:
    """Return the boxes of the whole parameter that make up this process's part; none if its shard is empty."""
    boxes = spec.boxes(parallel.tp_size, parallel.tp_rank)
    dim = _shard_dim(parameter, parallel)
    if dim is not None:
        size = spec.local_shape(parallel.tp_size, parallel.tp_rank)[dim]
        start, stop = chunk_bounds(size, parallel.sizes.dp_shard, parallel.dp_shard_rank)
        boxes = [box.narrow(dim, start, stop) for box in boxes]
    return [box for box in boxes if not box.is_empty]


def _shard_dim(parameter: Tensor, parallel: ParallelContext) -> int | None:
    """Return the axis along which a parameter is sharded over data parallelism; ``None`` if it is not."""
    if parallel.sizes.dp_shard == 1 or not isinstance(parameter, DTensor):
        return None
    names = parameter.device_mesh.mesh_dim_names
    assert names is not None
    placement = parameter.placements[names.index("dp_shard")]
    assert isinstance(placement, Shard | _StridedShard)  # the latter if tensor parallelism cuts the same axis
    return placement.dim


def gather_parameter(parameter: Tensor, parallel: ParallelContext) -> Tensor:
    """Gather the tensor-parallel part of a parameter on the first of the processes that shard it.

    A collective of the processes along ``dp_shard``; the others get an empty tensor.
    """
    local = local_tensor(parameter)
    dim = _shard_dim(parameter, parallel)
    if dim is None:
        return local
    group, rank, size = parallel.group("dp_shard"), parallel.dp_shard_rank, parallel.sizes.dp_shard
    lengths = [torch.zeros(1, dtype=torch.int64, device=local.device) for _ in range(size)]
    dist.all_gather(lengths, torch.tensor([local.shape[dim]], device=local.device), group=group)
    longest = max(int(length) for length in lengths)
    padded = local.new_zeros((*local.shape[:dim], longest, *local.shape[dim + 1 :]))
    padded.narrow(dim, 0, local.shape[dim]).copy_(local)
    parts = [torch.empty_like(padded) for _ in range(size)] if rank == 0 else None
    dist.gather(padded, parts, group=group, group_dst=0)
    if parts is None:
        return local.new_empty(0)
    return torch.cat([part.narrow(dim, 0, int(length)) for part, length in zip(parts, lengths, strict=True)], dim=dim)
