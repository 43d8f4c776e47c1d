"""What a published checkpoint format has to offer to be read and written. Each format is one module beside this one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
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
    """A published checkpoint, opened for reading. Its tensors are two-dimensional, or vectors.

    Attributes:
        directory: where it lies.
        config_file: the file that describes the model, for messages.
        config: what that file says, as the family's ``config_from_source`` is given it.
    """

    directory: Path
    config_file: Path
    config: dict[str, Any]

    @abstractmethod
    def check_family(self, family: ModelFamily) -> None:
        """Raise :class:`ConfigError` when the checkpoint says that it is of another family."""

    @abstractmethod
    def shapes(self, expected: Mapping[str, Shape]) -> dict[str, Shape]:
        """The whole shape of every tensor in the checkpoint, by name.

        ``expected`` are the shapes that the model needs, by which a format that cuts its tensors without saying how
        tells along which axis they were cut.
        """

    @abstractmethod
    def dtype(self, name: str) -> torch.dtype:
        """The dtype of tensor ``name``."""

    @abstractmethod
    def matrix(self, name: str, shape: Shape) -> LazyMatrix:
        """Tensor ``name``, whose whole shape is ``shape``, as a matrix; a vector is a matrix of one column."""

    @abstractmethod
    def origin(self) -> dict[str, Any]:
        """What an export needs besides the weights, to give back what the checkpoint said of itself: JSON values."""

    def drop_vocabulary_padding(self, true_vocab_size: int) -> None:
        """Take the rows of the vocabulary from ``true_vocab_size`` on for padding, in a format that pads it.

        Raises:
            ConfigError: when the format stores no padding, or the checkpoint has fewer rows.
        """
        raise ConfigError("this format does not pad the vocabulary: leave out --true-vocab-size")

    def notes(self) -> list[str]:
        """What a person who converts the checkpoint should know: what is assumed of it, and what is left behind."""
        return []

    def tokenizer_files(self) -> dict[str, Path]:
        """The tokenizer's own files, by name."""
        return {name: self.directory / name for name in TOKENIZER_FILES if (self.directory / name).is_file()}


@dataclass(frozen=True, kw_only=True)
class Publication:
    """A model that is to be written in a published format.

    Attributes:
        tensors: all of them, under their published names.
        config: what the format's configuration file is to say of the architecture.
        origin: what the checkpoint that was converted said of itself, in this format; empty if it was of another.
        tokenizer_files: the tokenizer's own files, by name.
        tp: ranks to cut each tensor over, in a format that has them.
        pp: stages to cut the layers over, in a format that has them.
        max_file_bytes: no weight file is larger, unless a single tensor is, in a format that lets files be split.
        report: is told what a person should know of the output, a sentence at a time.
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
        """Of the largest tensor: what the model as a whole is said to be in."""
        return max(self.tensors, key=lambda tensor: tensor.num_bytes).dtype

    def refuse_cuts(self, format: str) -> None:
        """For a format that is never cut. Raises :class:`ConfigError` when a cut was asked for."""
        if (self.tp, self.pp) != (1, 1):
            raise ConfigError(f"the format {format} is not cut over ranks: leave out --tp and --pp")


class CheckpointFormat(ABC):
    """How a format is recognised, read and written.

    Attributes:
        name: what ``--source`` and ``--format`` are given, and a plugin's hooks as ``source``.
    """

    name: ClassVar[str]

    @abstractmethod
    def recognises(self, directory: Path) -> bool:
        """Whether ``directory`` looks like a checkpoint of this format, from the names of its files."""

    @abstractmethod
    def open(self, directory: Path) -> PublishedCheckpoint:
        """Open the checkpoint in ``directory``.

        Raises:
            CheckpointError: when it, its configuration or one of its files is missing.
            CorruptCheckpointError: when a file is damaged.
        """

    @abstractmethod
    def write(self, directory: Path, publication: Publication, *, advance: Callable[[int], None]) -> None:
        """Write ``publication`` into ``directory``, which is empty and becomes visible as a whole afterwards."""
