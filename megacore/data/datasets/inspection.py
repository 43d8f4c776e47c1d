"""The figures of a dataset and its first documents, for ``megacore data inspect`` and ``megacore data head``."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megacore.data.datasets.description import DatasetDescription
from megacore.data.datasets.indexed import IndexedDataset
from megacore.data.datasets.instruction import InstructionDataset, InstructionDescription, Role
from megacore.data.tokenizers.tokenizer import load_tokenizer
from megacore.errors import DataError

QUANTILES = {"shortest": 0.0, "10 %": 0.1, "median": 0.5, "90 %": 0.9, "99 %": 0.99, "longest": 1.0}
"""The reported quantiles of the lengths, by label."""


def has_conversations(prefix: Path) -> bool:
    """Return whether ``prefix`` is instruction data, which consists of two datasets, and not a dataset of text."""
    return Path(f"{prefix}-text.idx").is_file() and not Path(f"{prefix}.idx").is_file()


def read_description(prefix: Path) -> DatasetDescription | InstructionDescription | None:
    """Return the description of the text or instruction data at ``prefix``, if it has one."""
    return (InstructionDescription if has_conversations(prefix) else DatasetDescription).read(prefix)


def inspect_dataset(prefix: Path) -> dict[str, Any]:
    """Return the counts, the dtype, the quantiles of the lengths and the description of a dataset, as JSON values."""
    description = read_description(prefix)
    described = {"description": None if description is None else dataclasses.asdict(description)}
    if has_conversations(prefix):
        conversations = InstructionDataset(prefix)
        return {
            "conversations": len(conversations),
            "tokens": conversations.text.num_tokens,
            "assistant_tokens": description.num_assistant_tokens
            if isinstance(description, InstructionDescription)
            else sum(int(np.count_nonzero(conversations[i][1] == Role.ASSISTANT)) for i in range(len(conversations))),
            "dtype": conversations.text.dtype.name,
            "lengths": _quantiles(conversations.lengths),
            **described,
        }
    dataset = IndexedDataset(prefix)
    return {
        "documents": dataset.num_documents,
        "sequences": len(dataset),
        "tokens": dataset.num_tokens,
        "dtype": dataset.dtype.name,
        "lengths": _quantiles(dataset.document_lengths()),
        **described,
    }


def _quantiles(lengths: NDArray[Any]) -> dict[str, int]:
    """Return the quantiles of ``lengths``, each an existing length and not an interpolation."""
    return {
        label: int(np.quantile(lengths, share, method="lower")) if len(lengths) else 0
        for label, share in QUANTILES.items()
    }


class DatasetReader:
    """Reads the first documents of a dataset as text or, without a tokenizer, as ids.

    Args:
        prefix: The dataset, of text or of conversations.
        tokenizer: The tokenizer to decode ids with. By default, the one that ``tokenize`` wrote beside the dataset.

    Raises:
        DataError: The tokenizer cannot be read, or another one made the dataset.
    """

    def __init__(self, prefix: Path, tokenizer: Path | None) -> None:
        self.prefix = prefix
        description = read_description(prefix)
        if tokenizer is None and description is not None and description.tokenizer_directory is not None:
            tokenizer = prefix.with_name(description.tokenizer_directory)
        self._tokenizer = None if tokenizer is None else load_tokenizer(tokenizer)
        if self._tokenizer and description and self._tokenizer.sha256 != description.tokenizer_sha256:
            raise DataError(
                f"{prefix} was made with another tokenizer ({description.tokenizer_file}, sha256 "
                f"{description.tokenizer_sha256}) than {self._tokenizer.file}, which would print another text"
            )

    def conversations(self, count: int) -> Iterator[tuple[int, list[tuple[Role, str]]]]:
        """Yield the length in tokens and the turns of each of the first ``count`` conversations."""
        dataset = InstructionDataset(self.prefix)
        for number in range(min(count, len(dataset))):
            ids, roles = dataset[number]
            tokens = zip(ids.tolist(), roles.tolist(), strict=True)
            turns = groupby(tokens, key=lambda token: token[1])
            yield len(ids), [(Role(role), self._decode([token for token, _ in turn])) for role, turn in turns]

    def documents(self, count: int) -> Iterator[tuple[int, str]]:
        """Yield the length in tokens and the text of each of the first ``count`` documents."""
        for sequences in islice(IndexedDataset(self.prefix).documents(), count):
            ids = np.concatenate(sequences).tolist() if sequences else []
            yield len(ids), self._decode(ids)

    def _decode(self, ids: list[int]) -> str:
        """Return the text of ``ids``. A dataset without a description may have ids that the tokenizer lacks."""
        if self._tokenizer is None:
            return " ".join(map(str, ids))
        vocab_size = self._tokenizer.vocab_size
        if ids and not 0 <= min(ids) <= max(ids) < vocab_size:
            unknown = next(number for number in ids if not 0 <= number < vocab_size)
            raise DataError(
                f"{self.prefix} has token id {unknown}, and the vocabulary of {self._tokenizer.file} is 0 to "
                f"{vocab_size - 1}: give the tokenizer that made the dataset"
            )
        return self._tokenizer.decode(ids)
