"""Instruction data on disk: the token ids of conversations in one indexed dataset, their roles in a second one.

``PREFIX-text`` and ``PREFIX-role`` have the format of Megatron-LLM's ``preprocess_instruct_data.py``: sequences of
equal lengths, one per conversation, with ids in the first and a :class:`Role` for each in the second, as uint16.
``PREFIX.json`` describes them if megacore wrote them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from megacore.atomic_output import StagedFiles, output_errors
from megacore.data.datasets.description import Description
from megacore.data.datasets.indexed import IndexedDataset, IndexedDatasetWriter
from megacore.errors import DataError


class Role(IntEnum):
    """The author of a token, as the format numbers them."""

    SYSTEM = 0
    PROMPTER = 1
    ASSISTANT = 2


@dataclass(frozen=True, kw_only=True)
class InstructionDescription(Description):
    """``PREFIX.json`` of instruction data, with its tokenizer and markup."""

    FORMAT = "megacore-instruction-dataset"
    VERSION = 1
    NUMBERS = ("vocab_size",)

    markup: str
    """``template``, a chat template, or ``megatron-llm``, the markup of that program."""
    template_sha256: str | None
    """Digest of the chat template's text."""
    num_conversations: int
    num_assistant_tokens: int


class InstructionDataset:
    """Conversations by number: ``dataset[i]`` is the token ids and the roles of conversation ``i``, both ``[length]``.

    Attributes:
        text, roles: The two datasets.
        lengths: Number of tokens of each conversation, int32, ``[conversations]``.

    Raises:
        DataError: A file is missing or damaged, or the two datasets do not belong together. Also raised when a
            conversation is read that has a role unknown to the format.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = Path(prefix)
        text, role = prefixes(prefix)
        if not Path(f"{text}.idx").is_file() and Path(f"{prefix}.idx").is_file():
            raise DataError(
                f"{prefix}: is a dataset of text, not of conversations; make those with megacore tokenize-chat, or set "
                'data.kind = "text"'
            )
        self.text, self.roles = IndexedDataset(text), IndexedDataset(role)
        if not np.array_equal(self.text.sizes, self.roles.sizes):
            raise DataError(
                f"{text} and {role} do not belong together: their sequences are not of the same lengths; make both anew"
            )
        self.lengths = self.text.sizes

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, number: int) -> tuple[NDArray[Any], NDArray[Any]]:
        roles = self.roles[number]
        # Otherwise any unknown role would be treated like the prompter's.
        if len(roles) and not min(Role) <= roles.min() <= roles.max() <= max(Role):
            unknown = next(role for role in roles.tolist() if role not in set(Role))
            names = ", ".join(f"{role.value} {role.name.lower()}" for role in Role)
            raise DataError(
                f"{self.roles.prefix}: conversation {number} has role {unknown}, and the format's are {names}: make "
                "the datasets anew, of single conversations (data.packing packs them)"
            )
        return self.text[number], roles


@dataclass
class InstructionWriter:
    """Appends conversations to instruction data; see :func:`writing_instruction_data`.

    Attributes:
        files: The staged files of the two datasets, to which others can be added.
        description: The description to write.
    """

    text: IndexedDatasetWriter
    roles: IndexedDatasetWriter
    files: StagedFiles
    description: InstructionDescription | None = None

    def add(self, ids: ArrayLike, roles: ArrayLike) -> None:
        """Append one conversation: its token ids and their roles, both ``[length]``."""
        ids, roles = np.asarray(ids), np.asarray(roles)
        assert ids.shape == roles.shape, "each token has a role"
        self.text.add_document(ids)
        self.roles.add_document(roles)


@contextmanager
def writing_instruction_data(prefix: str | Path, dtype: DTypeLike) -> Iterator[InstructionWriter]:
    """Yield a writer of instruction data; its ``description``, if set, becomes ``PREFIX.json``.

    A conversation is one document of each of the two datasets. An exception leaves nothing. The ``.idx`` of the ids
    appears last, and nothing reads the other files without it: a killed process leaves no usable half of the pair.

    Raises:
        OutputError: An output file exists, is being written by another process or cannot be written
            (:class:`DiskFullError` if there is no room).
    """
    text, role = prefixes(prefix)
    with StagedFiles(Path(prefix)) as files:
        description = Path(f"{prefix}.json")
        files.claim(Path(prefix), [".json"])
        # The index files get their names in this order.
        with (
            IndexedDatasetWriter(role, np.uint16, files=files) as roles,
            IndexedDatasetWriter(text, dtype, files=files) as ids,
        ):
            writer = InstructionWriter(ids, roles, files)
            yield writer
        if writer.description is not None:
            with output_errors(description):
                files.path(description).write_text(writer.description.to_json(), encoding="utf-8")


def prefixes(prefix: str | Path) -> tuple[Path, Path]:
    """Return the prefixes of the two datasets of instruction data: that of the ids and that of the roles."""
    return Path(f"{prefix}-text"), Path(f"{prefix}-role")
