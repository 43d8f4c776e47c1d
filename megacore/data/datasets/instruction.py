"""Instruction data on disk: the token ids of conversations in one indexed dataset, who speaks in a second one.

``PREFIX-text`` and ``PREFIX-role`` are what ``preprocess_instruct_data.py`` of Megatron-LLM writes: sequences of equal
lengths, one a conversation, with ids in the first and a :class:`Role` for each of them in the second, as uint16.
``PREFIX.json`` describes them, where megacore wrote them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
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
    """Who speaks, as the format numbers them."""

    SYSTEM = 0
    PROMPTER = 1
    ASSISTANT = 2


@dataclass(frozen=True, kw_only=True)
class InstructionDescription(Description):
    """``PREFIX.json``: which tokenizer and which markup made instruction data."""

    FORMAT = "megacore-instruction-dataset"
    VERSION = 1
    NUMBERS = ("vocab_size",)

    tokenizer_file: str
    """Its name, without directories."""
    tokenizer_sha256: str
    vocab_size: int
    """Larger than every id that the tokenizer can give."""
    markup: str
    """``template``, a chat template, or ``megatron-llm``, the markup of that program."""
    template_sha256: str | None
    """Of the chat template's text."""
    num_conversations: int
    num_tokens: int
    num_assistant_tokens: int
    megacore_version: str
    new_tokens: dict[str, int] = field(default_factory=dict)
    """The tokens that were added to the tokenizer, and their ids."""
    tokenizer_directory: str | None = None
    """Where the tokenizer with these tokens is, beside the dataset."""
    known_tokens_sha256: str | None = None
    """Of the tokens that are not new; see :func:`~megacore.data.tokenizers.tokenizer.digest_of_tokens`."""


class InstructionDataset:
    """Conversations by number: ``dataset[i]`` is the token ids and the roles of conversation ``i``, both ``[length]``.

    Attributes:
        text: the dataset of the ids.
        roles: and that of the roles.
        lengths: int32, ``[conversations]``, tokens in each.

    Raises:
        DataError: a file is missing or damaged, or the two datasets do not belong together; and when a conversation is
            read that has a role which the format does not know.
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
        # Else what is not the assistant's would not be learned, whatever it is.
        if len(roles) and not min(Role) <= roles.min() <= roles.max() <= max(Role):
            stranger = next(role for role in roles.tolist() if role not in set(Role))
            names = ", ".join(f"{role.value} {role.name.lower()}" for role in Role)
            raise DataError(
                f"{self.roles.prefix}: conversation {number} has role {stranger}, and the format's are {names}: make "
                "the datasets anew, of single conversations (data.packing packs them)"
            )
        return self.text[number], roles


class InstructionWriter:
    """Takes conversations for instruction data; see :func:`writing_instruction_data`.

    Attributes:
        files: the files of the two datasets, for what is to appear together with them.
        description: what they are described with.
    """

    def __init__(self, text: IndexedDatasetWriter, roles: IndexedDatasetWriter, files: StagedFiles) -> None:
        self._text, self._roles = text, roles
        self.files = files
        self.description: InstructionDescription | None = None

    def add(self, ids: ArrayLike, roles: ArrayLike) -> None:
        """Append one conversation: its token ids and their roles, both ``[length]``."""
        ids, roles = np.asarray(ids), np.asarray(roles)
        assert ids.shape == roles.shape, "each token has a role"
        self._text.add_document(ids)
        self._roles.add_document(roles)


@contextmanager
def writing_instruction_data(prefix: str | Path, dtype: DTypeLike) -> Iterator[InstructionWriter]:
    """Write instruction data as its conversations come; what is set as the writer's description becomes PREFIX.json.

    A conversation is a document of each of the two datasets. An exception leaves nothing. The ids' ``.idx`` is the last
    file to appear, and without it nothing reads the others: a killed process leaves no half of the pair in use.

    Raises:
        OutputError: an output file exists, is being written by another process or cannot be written
            (:class:`DiskFullError` when there is no room).
    """
    text, role = prefixes(prefix)
    with StagedFiles(Path(prefix)) as files:
        description = Path(f"{prefix}.json")
        files.claim(Path(prefix), [".json"])
        # Their indexes get their names in this order.
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
    """The paths of the two datasets of instruction data: of the ids, and of the roles."""
    return Path(f"{prefix}-text"), Path(f"{prefix}-role")
