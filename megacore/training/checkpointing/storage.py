"""The storage of torch.distributed.checkpoint: safetensors files, with a description in JSON.

torch's own storage keeps its metadata in a pickle, which can run anything when it is read; see docs/decisions.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from megacore.atomic_output import output_errors, require_space, staged_directory
from megacore.checkpoint import Checkpoint
from megacore.checkpoint.manifest import WeightFile
from megacore.checkpoint.matrix import StoredMatrix
from megacore.checkpoint.safetensors_file import (
    DTYPE_NAMES,
    STORED_DTYPES,
    OutputTensor,
    split_by_size,
    write_safetensors,
)
from megacore.checkpoint.training_record import Chunk, StoredTensor, chunk_key
from megacore.errors import OutputError
from megacore.parallel import Box, ParallelContext


@dataclass(frozen=True)
class PlacedTensor:
    """The boxes of a tensor that this process holds, as torch.distributed.checkpoint reads and writes them.

    A process holds boxes of the whole tensor, however tensor parallelism and sharding cut it; several processes may
    hold the same one. torch plans from them which process writes which box, and which parts of which box it reads. The
    methods with underscores are the protocol of ``torch.distributed._checkpointable``.

    Attributes:
        shape: The shape of the whole tensor.
        boxes: The boxes that this process holds.
        part: The values that this process holds.
    """

    shape: tuple[int, ...]
    boxes: Sequence[Box]
    part: Tensor

    @classmethod
    def whole(cls, tensor: Tensor) -> PlacedTensor:
        """Return the whole ``tensor``, held by this process alone."""
        zeros = (0,) * tensor.dim()
        return cls(tuple(tensor.shape), [Box(zeros, tuple(tensor.shape), zeros)], tensor)

    def __create_write_items__(self, fqn: str, object: Any) -> list[WriteItem]:
        return [
            WriteItem(
                MetadataIndex(fqn, chunk.offsets),
                WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk, TensorProperties(dtype=self.part.dtype), torch.Size(self.shape)),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(torch.Size(box.offsets), torch.Size(box.sizes)) for box in self.boxes]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        [box] = [box for box in self.boxes if torch.Size(box.offsets) == index.offset]
        shard = self.part
        for dim, (offset, size) in enumerate(zip(box.part_offsets, box.sizes, strict=True)):
            shard = shard.narrow(dim, offset, size)
        return shard


class PlacedSavePlanner(DefaultSavePlanner):
    """torch's planner for tensors that are all :class:`PlacedTensor`; of equal boxes one is written."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def lookup_object(self, index: MetadataIndex) -> Any:
        return self.state_dict[index.fqn].__get_tensor_shard__(index)


class PlacedLoadPlanner(DefaultLoadPlanner):
    """torch's planner to read into existing :class:`PlacedTensor` objects."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        self.state_dict, self.metadata, self.is_coordinator = state_dict, metadata, is_coordinator

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        placed: PlacedTensor = self.state_dict[index.fqn]
        return placed.__get_tensor_shard__(index)


Finish = Callable[[Path, dict[str, WeightFile], dict[str, StoredTensor]], None]
"""A function that completes a checkpoint in its staging directory, given the written files and their tensors."""


class SafetensorsWriter(StorageWriter):
    """Writes a checkpoint into a directory that becomes visible when every process has written its part.

    Args:
        out: The final path; it must not exist.
        parallel: The place of this process.
        finish: Called on rank 0 when all tensors are written.
        published: Called on rank 0 when the checkpoint is visible.
        is_alone: True if training waits for the writer.
    """

    def __init__(
        self, out: Path, parallel: ParallelContext, *, finish: Finish, published: Callable[[], None], is_alone: bool
    ) -> None:
        self.out = out
        self.parallel = parallel
        self._finish = finish
        self._published = published
        self._is_alone = is_alone
        self._staged: AbstractContextManager[Path] | None = None
        self._staging = out.with_name(f".{out.name}.incomplete")

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        assert checkpoint_id is None, "a writer has one output"

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        num_bytes = sum(_num_bytes(item) for plan in plans for item in plan.items)
        self._staged = staged_directory(self.out)
        self._staging = self._staged.__enter__()
        require_space(self._staging, num_bytes, self.out)
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        if not self._staging.is_dir():
            raise OutputError(
                f"rank {self.parallel.rank} does not see {self._staging}, which rank 0 has created: checkpoints must "
                "lie on a file system that all nodes share"
            )
        tensors = [_output_tensor(item, planner) for item in plan.items]
        results = []
        items = iter(plan.items)
        for number, group in enumerate(split_by_size(tensors)):
            if not group:
                continue
            name = f"rank-{self.parallel.rank:05d}-{number:03d}.safetensors"
            with output_errors(self.out):
                record = write_safetensors(self._staging / name, group, limit_threads=self._is_alone)
            file = WeightFile(self.parallel.tp_rank, self.parallel.pp_rank, (), record)
            for tensor, item in zip(group, items, strict=False):  # further items are in the next file
                results.append(WriteResult(item.index, tensor.num_bytes, (name, file)))
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        written = [result for rank_results in results for result in rank_results]
        file_of = {result.index: result.storage_data[0] for result in written}
        tensors = {
            name: StoredTensor(
                tuple(tensor.size),
                DTYPE_NAMES[tensor.properties.dtype],
                tuple(
                    Chunk(file_of[MetadataIndex(name, chunk.offsets)], tuple(chunk.offsets), tuple(chunk.sizes))
                    for chunk in tensor.chunks
                ),
            )
            for name, tensor in metadata.state_dict_metadata.items()
            if isinstance(tensor, TensorStorageMetadata)
        }
        with output_errors(self.out):
            self._finish(self._staging, dict(result.storage_data for result in written), tensors)
        assert self._staged is not None
        staged, self._staged = self._staged, None
        staged.__exit__(None, None, None)
        self._published()

    def abandon(self, error: BaseException) -> None:
        """Remove the incomplete checkpoint after ``error``."""
        if self._staged is not None:
            staged, self._staged = self._staged, None
            try:
                staged.__exit__(type(error), error, error.__traceback__)
            except BaseException as raised:
                if raised is not error and raised.__cause__ is not error:
                    raise

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return False


def _num_bytes(item: WriteItem) -> int:
    """Return the size of a box; ``item.tensor_storage_size()`` is that of the whole tensor."""
    assert item.tensor_data is not None and item.tensor_data.properties.dtype is not None
    return math.prod(item.tensor_data.chunk.sizes) * item.tensor_data.properties.dtype.itemsize


def _output_tensor(item: WriteItem, planner: SavePlanner) -> OutputTensor:
    assert item.tensor_data is not None and item.index.offset is not None
    data = planner.resolve_data(item)
    assert isinstance(data, Tensor)
    shard = data.detach()

    @lru_cache(maxsize=1)
    def flat() -> Tensor:
        return shard.contiguous().view(-1, 1)

    matrix = StoredMatrix(shard.numel(), 1, shard.dtype, flat)
    return OutputTensor(chunk_key(item.index.fqn, item.index.offset), tuple(shard.shape), shard.dtype, matrix)


class SafetensorsReader(StorageReader):
    """Reads the tensors of a training checkpoint."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        assert checkpoint.manifest.training is not None
        self._checkpoint = checkpoint
        self._tensors = checkpoint.manifest.training.tensors
        self._chunks: dict[MetadataIndex, Chunk] = {}

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        assert checkpoint_id is None, "a reader has one checkpoint"

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return Metadata(
            {
                name: TensorStorageMetadata(
                    TensorProperties(dtype=STORED_DTYPES[tensor.dtype]),
                    torch.Size(tensor.shape),
                    [ChunkStorageMetadata(torch.Size(part.offsets), torch.Size(part.sizes)) for part in tensor.chunks],
                )
                for name, tensor in self._tensors.items()
            }
        )

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        self._chunks = {
            MetadataIndex(name, chunk.offsets): chunk
            for name, tensor in self._tensors.items()
            for chunk in tensor.chunks
        }

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        for item in plan.items:
            target = planner.resolve_tensor(item)
            target.detach().copy_(self._stored(item))
            planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _stored(self, item: ReadItem) -> Tensor:
        index = item.storage_index
        stored = self._checkpoint.chunk(index.fqn, self._chunks[index])
        for dim, (offset, size) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
            stored = stored.narrow(dim, offset, size)
        return stored

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return False
