"""Merging of several datasets into one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path

import numpy as np

from megacore.atomic_output import StagedFiles
from megacore.data.datasets.description import DatasetDescription
from megacore.data.datasets.indexed import IndexedDataset, IndexedDatasetWriter
from megacore.data.tokenizers.tokenizer import directory_beside, is_saved, load_tokenizer, save_tokenizer
from megacore.errors import DataError


def merge_datasets(
    prefixes: Sequence[str | Path], *, out: str | Path, advance: Callable[[int], None] = lambda num_bytes: None
) -> IndexedDataset:
    """Write the documents of several datasets, in the order given, into the dataset ``out``, and return it.

    Ids are stored in the widest of the datasets' types. Memory holds a few megabytes of ids and 12 bytes per document.
    ``out`` gets a description if all of them have one, and a copy of the tokenizer that lies beside them.
    ``advance`` is called with the number of bytes of ids after each part.

    Raises:
        DataError: A dataset cannot be read, or they were made with different tokenizers, or do not agree on whether
            documents begin with a begin token or end with an end-of-document token.
        OutputError: The output exists or cannot be written. Nothing is left of it.
    """
    if not prefixes:
        raise DataError("no dataset to merge; give at least one")
    datasets = [IndexedDataset(prefix) for prefix in prefixes]
    description = _merge_descriptions([(prefix, DatasetDescription.read(prefix)) for prefix in prefixes], datasets)
    tokenizer, directory = None, directory_beside(Path(out))
    if description is not None and description.tokenizer_directory is not None:
        tokenizer = load_tokenizer(Path(prefixes[0]).with_name(description.tokenizer_directory))
        description = dataclasses.replace(description, tokenizer_directory=directory.name)
        is_saved(tokenizer, directory)  # raises before the work, not after it
    dtype = np.result_type(*(dataset.dtype for dataset in datasets))
    with StagedFiles(Path(out)) as files, IndexedDatasetWriter(out, dtype, files=files) as writer:
        for dataset in datasets:
            writer.add_dataset(dataset, advance)
        if description is not None:
            writer.describe(description.to_json())
        if tokenizer is not None:
            save_tokenizer(tokenizer, directory, files)
    return IndexedDataset(out)


def _merge_descriptions(
    found: Sequence[tuple[str | Path, DatasetDescription | None]], datasets: Sequence[IndexedDataset]
) -> DatasetDescription | None:
    """Return the description of the merged dataset, or ``None`` if one is missing; the existing ones must agree."""
    described = [(prefix, description) for prefix, description in found if description is not None]
    for (first_prefix, first), (prefix, other) in pairwise(described):
        for name, subject in (
            ("tokenizer_sha256", "tokenizer"),
            ("append_eod", "choice of --append-eod"),
            ("prepend_bos", "choice of --prepend-bos"),
        ):
            if getattr(first, name) != getattr(other, name):
                raise DataError(
                    f"{first_prefix} and {prefix} were made with a different {subject}: a merged dataset is read as "
                    f"one; tokenize one of them again, or train on both as a mixture (data.prefix)"
                )
    if len(described) < len(found):
        return None
    return dataclasses.replace(
        described[0][1],
        num_documents=sum(dataset.num_documents for dataset in datasets),
        num_tokens=sum(dataset.num_tokens for dataset in datasets),
        megacore_version=version("megacore"),
    )
