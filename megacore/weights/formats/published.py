"""The interface of a published checkpoint format. Each module beside this one implements it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from megacore.checkpoint.manifest import TOKENIZER_FILES
from megacore.checkpoint.matrix import LazyMatrix
from megacore.checkpoint.safetensors_file import MAX_FILE_BYTES, OutputTensor
from megacore.errors import ConfigError
from megacore.hookspecs import ModelFamily

Shape = tuple[int, ...]


class PublishedCheckpoint(ABC):
    """A published checkpoint, opened for reading. Its tensors are matrices or vectors.

    Attributes:
        directory: Directory of the checkpoint.
        config_file: File that describes the model, for messages.
        config: Parsed content of that file, the argument of the family's ``config_from_source``.
    """

    directory: Path
    config_file: Path
    config: dict[str, Any]

    @abstractmethod
    def check_family(self, family: ModelFamily) -> None:
        """Raise :class:`ConfigError` if the checkpoint names another family."""

    @abstractmethod
    def shapes(self, expected: Mapping[str, Shape]) -> dict[str, Shape]:
        """Return the full shape of every tensor in the checkpoint, by name.

        A format that does not record the axis of its cuts infers it from ``expected``, the shapes that the model needs.
        """

    @abstractmethod
    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of tensor ``name``."""

    @abstractmethod
    def matrix(self, name: str, shape: Shape) -> LazyMatrix:
        """Return tensor ``name`` of full shape ``shape`` as a matrix; a vector is a matrix of one column."""

    @abstractmethod
    def origin(self) -> dict[str, Any]:
        """Return the checkpoint's own metadata as JSON values, which an export to the same format writes again."""

    def drop_vocabulary_padding(self, true_vocab_size: int) -> None:
        """Drop the rows of the vocabulary from ``true_vocab_size`` on, in a format that pads it.

        Raises :class:`ConfigError` if the format stores no padding, or the checkpoint has fewer rows.
        """
        raise ConfigError("this format does not pad the vocabulary: leave out --true-vocab-size")

    def notes(self) -> list[str]:
        """Return notes for the user: assumptions about the checkpoint and omissions from it."""
        return []

    def tokenizer_files(self) -> dict[str, Path]:
        """Return the tokenizer's own files, by name."""
        return {name: self.directory / name for name in TOKENIZER_FILES if (self.directory / name).is_file()}


@dataclass(frozen=True, kw_only=True)
class Publication:
    """A model to write in a published format.

    Attributes:
        tensors: All tensors, under their published names.
        config: Content of the format's configuration file about the architecture.
        origin: Metadata of the converted checkpoint (:meth:`PublishedCheckpoint.origin`); empty if of another format.
        tokenizer_files: The tokenizer's own files, by name.
        tp: Number of ranks to cut each tensor over, in a format that has ranks.
        pp: Number of stages to cut the layers over, in a format that has stages.
        max_file_bytes: Largest size of a weight file, unless a single tensor is larger, in a format that allows it.
        report: Called with each note on the output, one sentence at a time.
    """

    tensors: Sequence[OutputTensor]
    config: dict[str, Any]
    origin: dict[str, Any]
    tokenizer_files: Mapping[str, Path]
    tp: int = 1
    pp: int = 1
    max_file_bytes: int = MAX_FILE_BYTES
    report: Callable[[str], None] = lambda note: None

    @property
    def num_bytes(self) -> int:
        return sum(tensor.num_bytes for tensor in self.tensors)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the largest tensor, which stands for that of the model."""
        return max(self.tensors, key=lambda tensor: tensor.num_bytes).dtype


class CheckpointFormat(ABC):
    """A published format, which can be recognised, read and written.

    Attributes:
        name: The value of ``--source`` and ``--format``, and of ``source`` in a plugin's hooks.
        marker_file: The name of the file by which a directory in this format is recognised.
    """

    name: ClassVar[str]
    marker_file: ClassVar[str]

    @abstractmethod
    def weight_files(self, directory: Path) -> Iterable[Path]:
        """Return the weight files of the checkpoint in ``directory``, found by their names and not opened."""

    @abstractmethod
    def open(self, directory: Path) -> PublishedCheckpoint:
        """Open the checkpoint in ``directory``.

        Raises:
            CheckpointError: if it, its configuration or one of its files is missing.
            CorruptCheckpointError: if a file is damaged.
        """

    @abstractmethod
    def write(self, directory: Path, publication: Publication, *, advance: Callable[[int], None]) -> None:
        """Write ``publication`` into ``directory``, which is empty; it becomes visible as a whole afterwards."""
