"""The place of this process on the mesh of all processes, and what those share beside tensors.

The context is a value that is passed to all code that needs it, never looked up.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout

from megacore.parallel.sizes import ParallelSizes

T = TypeVar("T")

AXES = ("pp", "dp_replicate", "dp_shard", "tp")
"""The axes of the mesh; adjacent ranks differ in the last."""


@dataclass(frozen=True)
class ParallelContext:
    """The place of this process on the mesh of all processes.

    Attributes:
        device: The device of this process.
        sizes: The sizes of the axes.
        mesh: All processes, with the axes :data:`AXES`; ``None`` for a process on its own.
        timeout: Time limit of a collective that waits for a process; ``None`` for torch's own.
    """

    device: torch.device
    sizes: ParallelSizes = field(default_factory=ParallelSizes)
    mesh: DeviceMesh | None = None
    timeout: timedelta | None = None
    _subgroups: dict[int, dist.ProcessGroup] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def single(cls, device: torch.device | str = "cpu") -> ParallelContext:
        """Return the context of one process that holds the whole model."""
        return cls(device=torch.device(device))

    @classmethod
    def of_world(
        cls, sizes: ParallelSizes, *, device: torch.device, timeout: timedelta | None = None
    ) -> ParallelContext:
        """Return the place of this process in the initialized process group.

        Raises:
            LayoutError: When ``sizes`` take another number of processes than the group has.
        """
        sizes.check_world(dist.get_world_size())
        if sizes.world == 1:
            return cls(device=device)
        shape = tuple(getattr(sizes, axis) for axis in AXES)
        mesh = init_device_mesh(device.type, shape, mesh_dim_names=AXES)
        if timeout is not None:
            for axis in AXES:
                _set_pg_timeout(timeout, mesh.get_group(axis))  # torch 2.13 gives a subgroup its own default
        return cls(device=device, sizes=sizes, mesh=mesh, timeout=timeout)

    @property
    def rank(self) -> int:
        """Return the rank among all processes."""
        return 0 if self.mesh is None else self.mesh.get_rank()

    @property
    def tp_size(self) -> int:
        return self.sizes.tp

    @property
    def tp_rank(self) -> int:
        return self._coordinate("tp")

    @property
    def tp_mesh(self) -> DeviceMesh | None:
        """Return the one-dimensional mesh of the tensor-parallel ranks; ``None`` if each layer is in one process."""
        return None if self.mesh is None or self.tp_size == 1 else self.mesh["tp"]

    @property
    def tp_group(self) -> dist.ProcessGroup:
        return self.group("tp")

    @property
    def sequence_parallel(self) -> bool:
        return self.sizes.sequence_parallel and self.tp_size > 1

    @property
    def pp_size(self) -> int:
        return self.sizes.pp

    @property
    def pp_rank(self) -> int:
        return self._coordinate("pp")

    @property
    def dp_size(self) -> int:
        return self.sizes.dp

    @property
    def dp_rank(self) -> int:
        """Return the number of the part of a global batch that this process sees."""
        return self._coordinate("dp_replicate") * self.sizes.dp_shard + self._coordinate("dp_shard")

    @property
    def dp_replicate_rank(self) -> int:
        return self._coordinate("dp_replicate")

    @property
    def dp_shard_rank(self) -> int:
        return self._coordinate("dp_shard")

    def group(self, axis: str) -> dist.ProcessGroup:
        """Return the group of the processes that differ from this one along ``axis`` only."""
        assert self.mesh is not None, "a single process has no group"
        return self.mesh.get_group(axis)

    def tp_subgroup(self, size: int) -> dist.ProcessGroup:
        """Return the group of ``size`` consecutive tensor-parallel ranks with this one; all of them must ask for it."""
        if size == self.tp_size:
            return self.tp_group
        if size not in self._subgroups:
            first = self.tp_rank // size * size
            ranks = dist.get_process_group_ranks(self.tp_group)[first : first + size]
            self._subgroups[size] = self.new_group(ranks)
        return self._subgroups[size]

    def new_group(self, ranks: list[int]) -> dist.ProcessGroup:
        """Create a group of these ``ranks`` of all processes; those, and no others, must ask for it."""
        return dist.new_group(ranks, timeout=self.timeout, use_local_synchronization=True)

    def _coordinate(self, axis: str) -> int:
        return 0 if self.mesh is None else self.mesh.get_local_rank(axis)


def broadcast_object(value: T, parallel: ParallelContext, *, axis: str | None = None) -> T:
    """Return the ``value`` of the first process, among all or along ``axis`` of the mesh, on each. It is pickled."""
    if parallel.mesh is None:
        return value
    group = None if axis is None else parallel.group(axis)
    objects = [value]
    dist.broadcast_object_list(objects, group=group, group_src=0, device=parallel.device)
    return objects[0]


def any_rank(condition: bool, parallel: ParallelContext) -> bool:
    """Return whether ``condition`` holds on at least one process. A collective of all processes."""
    if parallel.mesh is None:
        return condition
    reduced = torch.tensor(condition, dtype=torch.int32, device=parallel.device)
    dist.all_reduce(reduced, op=dist.ReduceOp.MAX)
    return bool(reduced)
