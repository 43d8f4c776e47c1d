"""The section of the run file on the data to train and evaluate on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from megacore.data.datasets.instruction import prefixes
from megacore.data.datasets.splits import SPLITS, Split
from megacore.training.config.section import Section

_INSTRUCTION_KEYS = {"packing", "variable_seq_lengths", "overlong", "scalar_loss_mask"}
"""Keys that apply to conversations only."""

_TEXT_KEYS = {"split", "document_boundaries", "reset_position_ids", "reset_attention_mask", "eod_mask_loss"}
"""Keys that apply to text only."""

_INSTRUCTION_PARTS = ("text", "role")
"""The two pairs of files of a dataset of conversations."""


class WeightedDataset(Section):
    """A dataset of a mixture, with its weight."""

    prefix: Path
    weight: float = Field(gt=0)


Datasets = Path | tuple[WeightedDataset, ...]
"""One dataset by its path, or a weighted mixture of several."""


class DataSection(Section):
    """The data to train and evaluate on."""

    prefix: Datasets = Field(
        description="Dataset: the `--out` of `megacore tokenize`; or a mixture of datasets, "
        '`[{ prefix = "data/web", weight = 0.7 }, { prefix = "data/code", weight = 0.3 }]`.'
    )
    seq_length: int = Field(gt=0, description="Number of predicted tokens per sample.")
    seed: int = Field(1234, ge=0, description="Seed for shuffling the samples.")
    kind: Literal["text", "instruction"] = Field(
        "text",
        description='Kind of the dataset: `"text"`, or `"instruction"` for conversations made by '
        "`megacore tokenize-chat` or Megatron-LLM.",
    )
    packing: bool = Field(
        False, description="Instruction data only: pack several conversations into a sample, without cross-attention."
    )
    variable_seq_lengths: bool = Field(
        False,
        description="Instruction data only: pad each micro-batch to its longest sample, rounded up to a multiple of "
        "16, instead of to seq_length.",
    )
    overlong: Literal["truncate", "drop"] = Field(
        "truncate",
        description='Instruction data only: `"truncate"` or `"drop"` conversations that are longer than a sample.',
    )
    scalar_loss_mask: float = Field(
        0.0,
        ge=0,
        description="Instruction data only: loss weight of the tokens that are not the assistant's, whose weight is 1.",
    )

    split: tuple[Annotated[float, Field(ge=0)], ...] | None = Field(
        None,
        min_length=1,
        max_length=3,
        description="Weights of the training, validation and test parts of each dataset of `prefix`, for example "
        "`[969, 30, 1]`. Default: train on all of it.",
    )
    valid_prefix: Datasets | None = Field(
        None, description="Validation data instead of such a part, in the form of `prefix`."
    )
    test_prefix: Datasets | None = Field(None, description="Test data instead of such a part, in the form of `prefix`.")
    document_boundaries: Literal["none", "reset"] = Field(
        "none",
        description='`"none"`: attention crosses document boundaries; `"reset"`: attention stays within a document, '
        "and positions start from 0 in each.",
    )
    reset_position_ids: bool = Field(
        False, description='Together with the next key, Megatron-LM\'s name for `document_boundaries = "reset"`.'
    )
    reset_attention_mask: bool = Field(False, description="See reset_position_ids; set both or neither.")
    eod_mask_loss: bool = Field(
        False, description="Leave the first token of each document, predicted from the previous one, out of the loss."
    )
    other_vocabulary: bool = Field(
        False,
        description="Accept datasets whose token ids stand for other tokens than those of the checkpoint's tokenizer.",
    )
    prefetch: int = Field(2, ge=0, description="Number of batches prepared ahead of time by a thread; 0: no thread.")

    @field_validator("prefix", "valid_prefix", "test_prefix", mode="before")
    @classmethod
    def _parse_datasets(cls, value: Any) -> Any:
        if value is None or isinstance(value, str | Path):
            return value
        if isinstance(value, list | tuple) and value:
            return tuple(cls._parse_entry(number, entry) for number, entry in enumerate(value, start=1))
        raise ValueError("must be a path, or a list of tables { prefix = PATH, weight = NUMBER }")

    @staticmethod
    def _parse_entry(number: int, entry: Any) -> WeightedDataset:
        try:
            return WeightedDataset.model_validate(entry)
        except ValidationError as error:
            problems = "; ".join(
                f"{'.'.join(map(str, problem['loc'])) or 'it'}: {problem['msg']}" for problem in error.errors()
            )
            raise ValueError(
                f"entry {number} must be a table {{ prefix = PATH, weight = NUMBER }} ({problems})"
            ) from error

    @model_validator(mode="after")
    def _keys_agree(self) -> DataSection:
        if self.reset_position_ids != self.reset_attention_mask:
            raise ValueError(
                "reset_position_ids and reset_attention_mask go together: what attends within its document only, also "
                'counts its positions from there; set both, or document_boundaries = "reset"'
            )
        stray = _TEXT_KEYS if self.kind == "instruction" else _INSTRUCTION_KEYS
        if given := self.model_fields_set & stray:
            keys = f"{' and '.join(sorted(given))} belong{'s' if len(given) == 1 else ''}"
            other = "text" if self.kind == "instruction" else "instruction"
            raise ValueError(f'{keys} to data.kind = "{other}", and that is "{self.kind}"')
        if self.split is not None and not self.split[0]:
            raise ValueError("the first weight of split is of the part to train on, and must not be 0")
        for split in ("valid", "test"):
            if self._has_part(split) and self._named(split) is not None:
                raise ValueError(f"split cuts off a part for {split}, and {split}_prefix names a dataset: give one")
        return self

    @property
    def resets_at_documents(self) -> bool:
        """True if attention and positions start anew at each document."""
        return self.document_boundaries == "reset" or self.reset_position_ids

    @property
    def splits(self) -> tuple[Split, ...]:
        """The splits that have data, ``"train"`` first."""
        return tuple(s for s in SPLITS if s == "train" or self._has_part(s) or self._named(s) is not None)

    def datasets(self, split: Split = "train") -> tuple[WeightedDataset, ...]:
        """Return the datasets of ``split``. :meth:`part_weights` says which part of each belongs to it."""
        named = self._named(split)
        if named is None:
            named = self.prefix
        return (WeightedDataset(prefix=named, weight=1.0),) if isinstance(named, Path) else named

    def part_weights(self, split: Split) -> tuple[float, ...] | None:
        """Return the weights by which these datasets are divided into splits; ``None`` where they are used whole."""
        return None if self._named(split) is not None else self.split

    def prefixes(self, splits: Sequence[Split] = SPLITS) -> dict[str, Path]:
        """Return the prefix of every dataset of ``splits``, keyed by the key of the run file that names it."""
        keys = {"prefix": self.prefix, "valid_prefix": self.valid_prefix, "test_prefix": self.test_prefix}
        used_keys = {"prefix" if self._named(split) is None else f"{split}_prefix" for split in splits}
        found: dict[str, Path] = {}
        for key, named in keys.items():
            if key not in used_keys:
                continue
            if isinstance(named, Path):
                found[f"data.{key}"] = named
            elif named is not None:
                found |= {f"data.{key}[{number}]": entry.prefix for number, entry in enumerate(named)}
        return found

    def files(self, splits: Sequence[Split] = SPLITS) -> dict[str, Path]:
        """Return the prefix of every pair of ``.bin`` and ``.idx`` files of these datasets.

        A dataset of conversations has two of them.
        """
        if self.kind == "text":
            return self.prefixes(splits)
        pairs = {key: prefixes(prefix) for key, prefix in self.prefixes(splits).items()}
        return {
            f"{key}, {part}": path
            for key, paths in pairs.items()
            for part, path in zip(_INSTRUCTION_PARTS, paths, strict=True)
        }

    def _named(self, split: str) -> Datasets | None:
        return {"train": None, "valid": self.valid_prefix, "test": self.test_prefix}[split]

    def _has_part(self, split: Split) -> bool:
        number = SPLITS.index(split)
        return self.split is not None and number < len(self.split) and self.split[number] > 0
