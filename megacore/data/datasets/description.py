"""``PREFIX.json``: the description of a dataset, with the tokenizer that made it; and the check of its token ids."""

from __future__ import annotations

import dataclasses
import inspect
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Self

from megacore.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Description:
    """A description of a dataset in a JSON file beside it, which begins with its format and version."""

    FORMAT: ClassVar[str]
    VERSION: ClassVar[int]
    NUMBERS: ClassVar[tuple[str, ...]]
    """Names of the fields that must be integers."""

    tokenizer_file: str
    """File name of the tokenizer, without directories."""
    tokenizer_sha256: str
    vocab_size: int
    """Upper bound (exclusive) of the ids that the tokenizer produces."""
    num_tokens: int
    megacore_version: str
    new_tokens: dict[str, int] = field(default_factory=dict)
    """The tokens that were added to the tokenizer, and their ids."""
    tokenizer_directory: str | None = None
    """Name of the directory beside the dataset that holds the tokenizer with these tokens."""
    known_tokens_sha256: str | None = None
    """Digest of the tokens that are not new; see :func:`~megacore.data.tokenizers.tokenizer.digest_of_tokens`."""

    def to_json(self) -> str:
        """Return the content of the file."""
        content = {"format": self.FORMAT, "version": self.VERSION, **dataclasses.asdict(self)}
        return json.dumps(content, indent=2) + "\n"

    @classmethod
    def read(cls, prefix: str | Path) -> Self | None:
        """Read the description of a dataset; None if it has none. Raises :class:`DataError` if damaged or too new."""
        path = Path(f"{prefix}.json")
        # Another program may have a file of this name, of any size; ours begins with the format.
        if not path.is_file():
            return None
        with path.open("rb") as file:
            if f'"{cls.FORMAT}"'.encode() not in file.read(100):
                return None
        try:
            content = json.loads(path.read_bytes())
        except ValueError as error:
            raise DataError(f"{path}: is damaged: {error}") from error
        if content.get("version") != cls.VERSION:
            raise DataError(
                f"{path}: version {content.get('version')} of the description; this megacore reads {cls.VERSION}"
            )
        names = {entry.name for entry in dataclasses.fields(cls)}
        parameters = inspect.signature(cls).parameters.values()
        required = {parameter.name for parameter in parameters if parameter.default is parameter.empty}
        if missing := sorted(required - content.keys()):
            raise DataError(f"{path}: is damaged: {', '.join(missing)} missing")
        if not all(isinstance(content[key], int) for key in cls.NUMBERS):
            raise DataError(f"{path}: is damaged: it has a field that is not an integer")
        return cls(**{name: content[name] for name in names & content.keys()})


@dataclass(frozen=True, kw_only=True)
class DatasetDescription(Description):
    """``PREFIX.json`` of a text dataset, so that it is not used with a model of another vocabulary."""

    FORMAT = "megacore-dataset"
    VERSION = 1
    NUMBERS = ("vocab_size", "num_documents", "num_tokens")

    eod_id: int | None
    append_eod: bool
    """True if every document ends with ``eod_id``."""
    num_documents: int
    prepend_bos: bool = False
    """True if every document begins with the tokenizer's begin token."""


def check_token_ids(ids: Tensor, vocab_size: int, where: str) -> Tensor:
    """Return ``ids``, those of ``where``. Raises :class:`DataError` when one is not in ``[0, vocab_size)``."""
    smallest, largest = (int(bound) for bound in ids.aminmax())
    if smallest < 0 or largest >= vocab_size:
        outside = smallest if smallest < 0 else largest
        raise DataError(
            f"{where} has token id {outside}, and the checkpoint's vocabulary is 0 to {vocab_size - 1}: "
            "tokenize with the checkpoint's own tokenizer"
        )
    return ids
