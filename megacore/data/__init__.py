"""Data: tokenizing text, the indexed dataset that holds the ids, and the samples that training takes from it.

The names are imported on first use: the processes that tokenize need no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megacore.data.chat_records import MessageKeys as MessageKeys
    from megacore.data.chat_records import QuestionKeys as QuestionKeys
    from megacore.data.chat_tokenization import ChatSummary as ChatSummary
    from megacore.data.chat_tokenization import tokenize_chat as tokenize_chat
    from megacore.data.description import DatasetDescription as DatasetDescription
    from megacore.data.indexed_dataset import IndexedDataset as IndexedDataset
    from megacore.data.indexed_dataset import IndexedDatasetWriter as IndexedDatasetWriter
    from megacore.data.indexed_dataset import token_dtype as token_dtype
    from megacore.data.instruction import InstructionDataset as InstructionDataset
    from megacore.data.instruction import InstructionDescription as InstructionDescription
    from megacore.data.instruction import Role as Role
    from megacore.data.instruction_samples import InstructionSamples as InstructionSamples
    from megacore.data.merging import merge_datasets as merge_datasets
    from megacore.data.mixed_samples import MixedSamples as MixedSamples
    from megacore.data.mixed_samples import SampleSource as SampleSource
    from megacore.data.mixed_samples import WindowSamples as WindowSamples
    from megacore.data.mixing import Mixture as Mixture
    from megacore.data.new_tokens import NewTokens as NewTokens
    from megacore.data.samples import Sample as Sample
    from megacore.data.splits import SPLITS as SPLITS
    from megacore.data.splits import Split as Split
    from megacore.data.splits import split_tokens as split_tokens
    from megacore.data.tokenization import TokenizeSummary as TokenizeSummary
    from megacore.data.tokenization import tokenize as tokenize
    from megacore.data.tokenizer import Tokenizer as Tokenizer
    from megacore.data.tokenizer import load_tokenizer as load_tokenizer
    from megacore.data.vocabulary import check_token_ids as check_token_ids
    from megacore.data.windows import KeyedPermutation as KeyedPermutation
    from megacore.data.windows import SampleOrder as SampleOrder
    from megacore.data.windows import TokenWindows as TokenWindows

_HOME = {
    "ChatSummary": "megacore.data.chat_tokenization",
    "DatasetDescription": "megacore.data.description",
    "IndexedDataset": "megacore.data.indexed_dataset",
    "IndexedDatasetWriter": "megacore.data.indexed_dataset",
    "InstructionDataset": "megacore.data.instruction",
    "InstructionDescription": "megacore.data.instruction",
    "InstructionSamples": "megacore.data.instruction_samples",
    "KeyedPermutation": "megacore.data.windows",
    "MessageKeys": "megacore.data.chat_records",
    "MixedSamples": "megacore.data.mixed_samples",
    "Mixture": "megacore.data.mixing",
    "NewTokens": "megacore.data.new_tokens",
    "QuestionKeys": "megacore.data.chat_records",
    "Role": "megacore.data.instruction",
    "SPLITS": "megacore.data.splits",
    "Sample": "megacore.data.samples",
    "SampleOrder": "megacore.data.windows",
    "SampleSource": "megacore.data.mixed_samples",
    "Split": "megacore.data.splits",
    "TokenWindows": "megacore.data.windows",
    "TokenizeSummary": "megacore.data.tokenization",
    "Tokenizer": "megacore.data.tokenizer",
    "WindowSamples": "megacore.data.mixed_samples",
    "check_token_ids": "megacore.data.vocabulary",
    "load_tokenizer": "megacore.data.tokenizer",
    "merge_datasets": "megacore.data.merging",
    "split_tokens": "megacore.data.splits",
    "token_dtype": "megacore.data.indexed_dataset",
    "tokenize": "megacore.data.tokenization",
    "tokenize_chat": "megacore.data.chat_tokenization",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
