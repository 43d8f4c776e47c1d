"""Where this process stands among the others: a value that is passed to whoever needs it, never looked up."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from megacore.errors import LayoutError


@dataclass(frozen=True)
class ParallelContext:
    """The tensor-parallel group of this process and its place in it.

    Attributes:
        device: where this process computes.
        tp_mesh: the one-dimensional mesh of the tensor-parallel ranks; ``None`` in a single process.
        sequence_parallel: between the parallel layers, each rank holds a slice of the sequence instead of all of it
            (Korthikanti et al., 2022, arXiv:2205.05198).
    """

    device: torch.device
    tp_mesh: DeviceMesh | None = None
    sequence_parallel: bool = False

    @classmethod
    def single(cls, device: torch.device | str = "cpu") -> ParallelContext:
        """One process that holds the whole model."""
        return cls(device=torch.device(device))

    @classmethod
    def of_world(cls, *, tp: int, device: torch.device, sequence_parallel: bool = False) -> ParallelContext:
        """The place of this process in an initialized process group of ``tp`` ranks.

        Raises:
            LayoutError: when the world has another size.
        """
        world = dist.get_world_size()
        if world != tp:
            raise LayoutError(
                f"{world} processes were started for tp {tp}. Start {tp}, or set the tensor-parallel size to {world}"
            )
        mesh = init_device_mesh(device.type, (tp,), mesh_dim_names=("tp",))
        return cls(device=device, tp_mesh=mesh if tp > 1 else None, sequence_parallel=sequence_parallel and tp > 1)

    @property
    def tp_size(self) -> int:
        return 1 if self.tp_mesh is None else self.tp_mesh.size()

    @property
    def tp_rank(self) -> int:
        return 0 if self.tp_mesh is None else self.tp_mesh.get_local_rank()

    @property
    def tp_group(self) -> dist.ProcessGroup:
        assert self.tp_mesh is not None, "a single process has no group"
        return self.tp_mesh.get_group()


def local_device() -> torch.device:
    """The device of this process: its own GPU where there are any, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Join the processes that torchrun started (NCCL on GPUs, gloo on CPUs), and leave them at the end."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()
