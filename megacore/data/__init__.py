"""Data: tokenizing text, the indexed dataset that holds the ids, and the samples that training takes from it.

The names are imported on first use: the processes that tokenize need no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megacore.data.description import DatasetDescription as DatasetDescription
    from megacore.data.indexed_dataset import IndexedDataset as IndexedDataset
    from megacore.data.indexed_dataset import IndexedDatasetWriter as IndexedDatasetWriter
    from megacore.data.indexed_dataset import token_dtype as token_dtype
    from megacore.data.new_tokens import NewTokens as NewTokens
    from megacore.data.samples import Sample as Sample
    from megacore.data.tokenization import TokenizeSummary as TokenizeSummary
    from megacore.data.tokenization import tokenize as tokenize
    from megacore.data.tokenizer import Tokenizer as Tokenizer
    from megacore.data.tokenizer import load_tokenizer as load_tokenizer
    from megacore.data.vocabulary import check_token_ids as check_token_ids
    from megacore.data.windows import KeyedPermutation as KeyedPermutation
    from megacore.data.windows import SampleOrder as SampleOrder
    from megacore.data.windows import TokenWindows as TokenWindows

_HOME = {
    "DatasetDescription": "megacore.data.description",
    "IndexedDataset": "megacore.data.indexed_dataset",
    "IndexedDatasetWriter": "megacore.data.indexed_dataset",
    "KeyedPermutation": "megacore.data.windows",
    "NewTokens": "megacore.data.new_tokens",
    "Sample": "megacore.data.samples",
    "SampleOrder": "megacore.data.windows",
    "TokenWindows": "megacore.data.windows",
    "TokenizeSummary": "megacore.data.tokenization",
    "Tokenizer": "megacore.data.tokenizer",
    "check_token_ids": "megacore.data.vocabulary",
    "load_tokenizer": "megacore.data.tokenizer",
    "token_dtype": "megacore.data.indexed_dataset",
    "tokenize": "megacore.data.tokenization",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
