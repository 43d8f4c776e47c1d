"""Data: from text files to the samples that training takes.

Text becomes token ids in ``preprocess`` (with ``tokenizers``), which writes ``datasets``; ``sampling`` reads them.
Start with ``preprocess.text`` or ``sampling.samples``. Names are imported on first use: tokenizing needs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megacore.data.datasets.description import DatasetDescription as DatasetDescription
    from megacore.data.datasets.description import check_token_ids as check_token_ids
    from megacore.data.datasets.indexed import IndexedDataset as IndexedDataset
    from megacore.data.datasets.indexed import IndexedDatasetWriter as IndexedDatasetWriter
    from megacore.data.datasets.indexed import token_dtype as token_dtype
    from megacore.data.datasets.instruction import InstructionDataset as InstructionDataset
    from megacore.data.datasets.instruction import InstructionDescription as InstructionDescription
    from megacore.data.datasets.instruction import Role as Role
    from megacore.data.datasets.merge import merge_datasets as merge_datasets
    from megacore.data.datasets.splits import SPLITS as SPLITS
    from megacore.data.datasets.splits import Split as Split
    from megacore.data.datasets.splits import split_tokens as split_tokens
    from megacore.data.preprocess.chat import ChatSummary as ChatSummary
    from megacore.data.preprocess.chat import tokenize_chat as tokenize_chat
    from megacore.data.preprocess.conversations import MessageKeys as MessageKeys
    from megacore.data.preprocess.conversations import QuestionKeys as QuestionKeys
    from megacore.data.preprocess.text import TokenizeSummary as TokenizeSummary
    from megacore.data.preprocess.text import tokenize as tokenize
    from megacore.data.sampling.instruction_samples import InstructionSamples as InstructionSamples
    from megacore.data.sampling.mixture import Mixture as Mixture
    from megacore.data.sampling.samples import MixedSamples as MixedSamples
    from megacore.data.sampling.samples import Sample as Sample
    from megacore.data.sampling.samples import SampleSource as SampleSource
    from megacore.data.sampling.samples import WindowSamples as WindowSamples
    from megacore.data.sampling.windows import KeyedPermutation as KeyedPermutation
    from megacore.data.sampling.windows import SampleOrder as SampleOrder
    from megacore.data.sampling.windows import TokenWindows as TokenWindows
    from megacore.data.tokenizers.added_tokens import NewTokens as NewTokens
    from megacore.data.tokenizers.tokenizer import Tokenizer as Tokenizer
    from megacore.data.tokenizers.tokenizer import load_tokenizer as load_tokenizer

_HOME = {
    "ChatSummary": "megacore.data.preprocess.chat",
    "DatasetDescription": "megacore.data.datasets.description",
    "IndexedDataset": "megacore.data.datasets.indexed",
    "IndexedDatasetWriter": "megacore.data.datasets.indexed",
    "InstructionDataset": "megacore.data.datasets.instruction",
    "InstructionDescription": "megacore.data.datasets.instruction",
    "InstructionSamples": "megacore.data.sampling.instruction_samples",
    "KeyedPermutation": "megacore.data.sampling.windows",
    "MessageKeys": "megacore.data.preprocess.conversations",
    "MixedSamples": "megacore.data.sampling.samples",
    "Mixture": "megacore.data.sampling.mixture",
    "NewTokens": "megacore.data.tokenizers.added_tokens",
    "QuestionKeys": "megacore.data.preprocess.conversations",
    "Role": "megacore.data.datasets.instruction",
    "SPLITS": "megacore.data.datasets.splits",
    "Sample": "megacore.data.sampling.samples",
    "SampleOrder": "megacore.data.sampling.windows",
    "SampleSource": "megacore.data.sampling.samples",
    "Split": "megacore.data.datasets.splits",
    "TokenWindows": "megacore.data.sampling.windows",
    "TokenizeSummary": "megacore.data.preprocess.text",
    "Tokenizer": "megacore.data.tokenizers.tokenizer",
    "WindowSamples": "megacore.data.sampling.samples",
    "check_token_ids": "megacore.data.datasets.description",
    "load_tokenizer": "megacore.data.tokenizers.tokenizer",
    "merge_datasets": "megacore.data.datasets.merge",
    "split_tokens": "megacore.data.datasets.splits",
    "token_dtype": "megacore.data.datasets.indexed",
    "tokenize": "megacore.data.preprocess.text",
    "tokenize_chat": "megacore.data.preprocess.chat",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
