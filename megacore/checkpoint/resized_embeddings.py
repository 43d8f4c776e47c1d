"""Resizing the embedding and the head for tokens that were added to the tokenizer."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megacore.checkpoint.manifest import TOKENIZER_FILES
from megacore.checkpoint.matrix import ConcatenatedRows, LazyMatrix, block_of, num_rows
from megacore.checkpoint.writing import Parameter
from megacore.data import DatasetDescription, InstructionDescription, Tokenizer, load_tokenizer
from megacore.errors import DataError
from megacore.parallel import Rows

_RESIZED = ("embedding.word_embeddings.weight", "output_layer.weight")
_DEFINITIONS = {"tokenizer.json", "tokenizer.model", "added_tokens.json"}
"""Files that define the ids of a tokenizer: files of two tokenizers must not be mixed."""
_BLOCK_ROWS = 4096


@dataclass(frozen=True)
class ExtendedTokenizer:
    """A model's tokenizer with tokens added."""

    directory: Path
    tokenizer: Tokenizer
    first: int | None
    """First id that is new to the model, which may have spare rows for it; None if nothing defines it."""

    @classmethod
    def read(cls, path: Path | str, *, known: Mapping[str, Path]) -> ExtendedTokenizer:
        """Read the tokenizer of a dataset, or that in a directory; ``known`` are the files of the model's tokenizer.

        Raises:
            DataError: when there is no tokenizer, or it gives other ids to tokens of the model's tokenizer.
        """
        directory, first = _tokenizer_directory(Path(path))
        tokenizer = load_tokenizer(directory)
        for name in ("tokenizer.json", "tokenizer.model"):
            if name in known:
                own = load_tokenizer(known[name])
                extended_ids = tokenizer.vocabulary()
                changed = [token for token, number in own.vocabulary().items() if extended_ids.get(token) != number]
                if changed:
                    raise DataError(
                        f"{directory} is not the model's tokenizer with tokens added: {len(changed)} of the model's "
                        f"tokens have other ids there or none, for example {changed[0]!r}. Tokenize with the model's"
                    )
                # Not the ids that were new to the dataset: the model may have learned those by now.
                first = own.vocab_size
                break
        return cls(directory, tokenizer, first)

    def tokenizer_files(self, known: Mapping[str, Path]) -> dict[str, Path]:
        """Return the files of this tokenizer, and those of ``known``, the model's own, that do not define ids."""
        kept = {name: path for name, path in known.items() if name not in _DEFINITIONS}
        found = {name: self.directory / name for name in TOKENIZER_FILES if (self.directory / name).is_file()}
        return kept | found

    def vocab_size(self, current: int) -> int:
        """Return the vocabulary size of the resized model, at least ``current``: a model may have spare rows."""
        return max(current, self.tokenizer.vocab_size)

    def resize_embeddings(self, parameters: Mapping[str, Parameter]) -> dict[str, Parameter]:
        """Return the parameters with rows for the added tokens, each the mean of the rows before the first of them.

        Spare rows of the model that the new tokens use are replaced; spare rows after them are kept.
        """
        return {
            name: _with_rows(parameter, self.first, self.tokenizer.vocab_size) if name in _RESIZED else parameter
            for name, parameter in parameters.items()
        }


class MeanRows(LazyMatrix):
    """The mean of the rows of another matrix, repeated. The other matrix is read once, in blocks of rows."""

    def __init__(self, base: LazyMatrix, rows: int) -> None:
        super().__init__(rows, base.columns, base.dtype)
        self._base = base
        self._mean: Tensor | None = None

    def read(self, rows: Rows, columns: slice) -> Tensor:
        if self._mean is None:
            total = torch.zeros(self.columns, dtype=torch.float64)
            for start in range(0, self._base.rows, _BLOCK_ROWS):
                block = slice(start, min(start + _BLOCK_ROWS, self._base.rows))
                total += self._base.read(block, slice(0, self.columns)).sum(0, dtype=torch.float64)
            self._mean = (total / self._base.rows).to(self.dtype)
        return self._mean[columns].expand(num_rows(rows), -1)


def _with_rows(parameter: Parameter, first: int | None, stop: int) -> Parameter:
    """Return the parameter with rows ``[first, stop)`` set to the mean of those before; ``None`` starts at its end."""
    matrix = parameter.matrix
    first = matrix.rows if first is None else min(first, matrix.rows)
    if first >= stop:
        return parameter
    columns = slice(0, matrix.columns)
    learned = block_of(matrix, slice(0, first), columns)
    parts = [learned, MeanRows(learned, stop - first)]
    if stop < matrix.rows:
        parts.append(block_of(matrix, slice(stop, matrix.rows), columns))
    joined = ConcatenatedRows(parts)
    return Parameter(
        dataclasses.replace(parameter.spec, shape=(joined.rows, *parameter.spec.shape[1:])), joined, parameter.dtype
    )


def _tokenizer_directory(path: Path) -> tuple[Path, int | None]:
    """Return the directory of the tokenizer, and for a dataset its first new id."""
    if path.is_dir():
        return path, None
    description = DatasetDescription.read(path) or InstructionDescription.read(path)
    if description is None:
        raise DataError(f"{path} is neither a tokenizer's directory nor a dataset made by megacore")
    if description.tokenizer_directory is None:
        raise DataError(f"{path} was tokenized without new tokens: leave out --add-tokens")
    return path.with_name(description.tokenizer_directory), min(description.new_tokens.values(), default=None)
