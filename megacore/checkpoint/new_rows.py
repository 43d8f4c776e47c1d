"""Rows of the embedding and the head for tokens that were added to the tokenizer."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megacore.checkpoint.manifest import TOKENIZER_FILES
from megacore.checkpoint.matrix import ConcatenatedRows, LazyMatrix, count
from megacore.checkpoint.writing import Parameter
from megacore.data import DatasetDescription, InstructionDescription, Tokenizer, load_tokenizer
from megacore.errors import DataError
from megacore.parallel import Rows

_OF_THE_VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")
_DEFINITIONS = {"tokenizer.json", "tokenizer.model", "added_tokens.json"}
"""Files that say which ids a tokenizer gives: those of one must not be beside those of another."""
_ROWS_AT_ONCE = 4096


@dataclass(frozen=True)
class AddedTokens:
    """A tokenizer with tokens that a model lacks.

    Attributes:
        directory: where it is.
        tokenizer: it.
    """

    directory: Path
    tokenizer: Tokenizer

    @classmethod
    def read(cls, path: Path | str, *, known: Mapping[str, Path]) -> AddedTokens:
        """The tokenizer of a dataset, or that in a directory; ``known`` are the files of the model's own tokenizer.

        Raises:
            DataError: when there is none, or it gives other ids to tokens of the model's tokenizer.
        """
        directory = _tokenizer_directory(Path(path))
        tokenizer = load_tokenizer(directory)
        for name in ("tokenizer.json", "tokenizer.model"):
            if name in known:
                here, there = tokenizer.vocabulary(), load_tokenizer(known[name]).vocabulary()
                changed = [token for token, number in there.items() if here.get(token) != number]
                if changed:
                    raise DataError(
                        f"{directory}: is not the model's tokenizer with tokens added: {len(changed)} of the model's "
                        f"tokens have other ids there or none, {changed[0]!r} for one. Tokenize with the model's own"
                    )
                break
        return cls(directory, tokenizer)

    def tokenizer_files(self, known: Mapping[str, Path]) -> dict[str, Path]:
        """The files of this tokenizer, and of ``known``, the model's own, what does not say which ids there are."""
        kept = {name: path for name, path in known.items() if name not in _DEFINITIONS}
        found = {name: self.directory / name for name in TOKENIZER_FILES if (self.directory / name).is_file()}
        return kept | found

    def vocab_size(self, current: int) -> int:
        """Of the model: never less than ``current``, since a model may have rows to spare."""
        return max(current, self.tokenizer.vocab_size)

    def grow(self, parameters: Mapping[str, Parameter]) -> dict[str, Parameter]:
        """The parameters with rows for the added tokens, each the mean of the rows that are there."""
        return {
            name: _with_rows(parameter, self.vocab_size(parameter.matrix.rows))
            if name in _OF_THE_VOCABULARY
            else parameter
            for name, parameter in parameters.items()
        }


class MeanRows(LazyMatrix):
    """The mean of the rows of another matrix, so many times. The other matrix is read once, some rows at a time."""

    def __init__(self, base: LazyMatrix, rows: int) -> None:
        super().__init__(rows, base.columns, base.dtype)
        self._base = base
        self._mean: Tensor | None = None

    def read(self, rows: Rows, columns: slice) -> Tensor:
        if self._mean is None:
            total = torch.zeros(self.columns, dtype=torch.float64)
            for start in range(0, self._base.rows, _ROWS_AT_ONCE):
                block = slice(start, min(start + _ROWS_AT_ONCE, self._base.rows))
                total += self._base.read(block, slice(0, self.columns)).sum(0, dtype=torch.float64)
            self._mean = (total / self._base.rows).to(self.dtype)
        return self._mean[columns].expand(count(rows), -1)


def _with_rows(parameter: Parameter, rows: int) -> Parameter:
    missing = rows - parameter.matrix.rows
    if missing == 0:
        return parameter
    return Parameter(
        dataclasses.replace(parameter.spec, shape=(rows, *parameter.spec.shape[1:])),
        ConcatenatedRows([parameter.matrix, MeanRows(parameter.matrix, missing)]),
        parameter.dtype,
    )


def _tokenizer_directory(path: Path) -> Path:
    if path.is_dir():
        return path
    description = DatasetDescription.read(path) or InstructionDescription.read(path)
    if description is None:
        raise DataError(f"{path}: neither a tokenizer's directory nor a dataset that megacore has made")
    if description.tokenizer_directory is None:
        raise DataError(f"{path}: the dataset was tokenized without new tokens: leave out --add-tokens")
    return path.with_name(description.tokenizer_directory)
