"""Rows of the embedding and the head for tokens that were added to the tokenizer."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megacore.checkpoint.manifest import TOKENIZER_FILES
from megacore.checkpoint.matrix import ConcatenatedRows, LazyMatrix, block_of, count
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
        first: the ids from here on are of tokens that the model lacks, which may have rows to spare for them; None
            where neither the model nor the dataset says.
    """

    directory: Path
    tokenizer: Tokenizer
    first: int | None

    @classmethod
    def read(cls, path: Path | str, *, known: Mapping[str, Path]) -> AddedTokens:
        """The tokenizer of a dataset, or that in a directory; ``known`` are the files of the model's own tokenizer.

        Raises:
            DataError: when there is none, or it gives other ids to tokens of the model's tokenizer.
        """
        directory, first = _tokenizer_directory(Path(path))
        tokenizer = load_tokenizer(directory)
        for name in ("tokenizer.json", "tokenizer.model"):
            if name in known:
                models_own = load_tokenizer(known[name])
                here, there = tokenizer.vocabulary(), models_own.vocabulary()
                changed = [token for token, number in there.items() if here.get(token) != number]
                if changed:
                    raise DataError(
                        f"{directory}: is not the model's tokenizer with tokens added: {len(changed)} of the model's "
                        f"tokens have other ids there or none, {changed[0]!r} for one. Tokenize with the model's own"
                    )
                # Not what the dataset says is new: the model may have learned that by now.
                first = models_own.vocab_size
                break
        return cls(directory, tokenizer, first)

    def tokenizer_files(self, known: Mapping[str, Path]) -> dict[str, Path]:
        """The files of this tokenizer, and of ``known``, the model's own, what does not say which ids there are."""
        kept = {name: path for name, path in known.items() if name not in _DEFINITIONS}
        found = {name: self.directory / name for name in TOKENIZER_FILES if (self.directory / name).is_file()}
        return kept | found

    def vocab_size(self, current: int) -> int:
        """Of the model: never less than ``current``, since a model may have rows to spare."""
        return max(current, self.tokenizer.vocab_size)

    def grow(self, parameters: Mapping[str, Parameter]) -> dict[str, Parameter]:
        """The parameters with rows for the added tokens, each the mean of the rows before the first of them.

        Rows to spare that the model has for them are replaced; any behind them stay as they are.
        """
        return {
            name: _with_rows(parameter, self.first, self.tokenizer.vocab_size)
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


def _with_rows(parameter: Parameter, first: int | None, stop: int) -> Parameter:
    """The parameter, its rows ``[first, stop)`` the mean of those before. Without ``first`` they are new ones."""
    matrix = parameter.matrix
    first = matrix.rows if first is None else min(first, matrix.rows)
    if first >= stop:
        return parameter
    columns = slice(0, matrix.columns)
    known = block_of(matrix, slice(0, first), columns)
    parts = [known, MeanRows(known, stop - first)]
    if stop < matrix.rows:
        parts.append(block_of(matrix, slice(stop, matrix.rows), columns))
    joined = ConcatenatedRows(parts)
    return Parameter(
        dataclasses.replace(parameter.spec, shape=(joined.rows, *parameter.spec.shape[1:])), joined, parameter.dtype
    )


def _tokenizer_directory(path: Path) -> tuple[Path, int | None]:
    """Where the tokenizer is, and the first id that a dataset says is new."""
    if path.is_dir():
        return path, None
    description = DatasetDescription.read(path) or InstructionDescription.read(path)
    if description is None:
        raise DataError(f"{path}: neither a tokenizer's directory nor a dataset that megacore has made")
    if description.tokenizer_directory is None:
        raise DataError(f"{path}: the dataset was tokenized without new tokens: leave out --add-tokens")
    return path.with_name(description.tokenizer_directory), min(description.new_tokens.values(), default=None)
