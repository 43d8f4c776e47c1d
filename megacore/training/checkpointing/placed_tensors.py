"""What a process holds of the tensors of a training checkpoint, as torch.distributed.checkpoint is told of it.

Of each tensor a process holds boxes of the whole one, however tensor parallelism and sharding cut it; several processes
may hold the same. torch plans from that who writes which box, and who reads which parts of which box.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from megacore.parallel import Box


@dataclass(frozen=True)
class PlacedTensor:
    """The boxes of a tensor that this process holds.

    The methods with underscores are the protocol of ``torch.distributed._checkpointable``.

    Attributes:
        shape: of the whole tensor.
        boxes: of it.
        part: what this process holds.
    """

    shape: tuple[int, ...]
    boxes: Sequence[Box]
    part: Tensor

    @classmethod
    def whole(cls, tensor: Tensor) -> PlacedTensor:
        """A tensor that this process holds whole."""
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


class SavePlanner(DefaultSavePlanner):
    """torch's, for tensors by name that are all :class:`PlacedTensor`; of equal boxes one is written."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def lookup_object(self, index: MetadataIndex) -> Any:
        return self.state_dict[index.fqn].__get_tensor_shard__(index)


class LoadPlanner(DefaultLoadPlanner):
    """As :class:`SavePlanner`, to read into the tensors that are there."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        self.state_dict, self.metadata, self.is_coordinator = state_dict, metadata, is_coordinator

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self.state_dict[index.fqn].__get_tensor_shard__(index)
