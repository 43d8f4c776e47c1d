"""Data: tokenizing text, the indexed dataset that holds the ids, and the samples that training takes from it."""

from megacore.data.chat_records import MessageKeys, QuestionKeys
from megacore.data.chat_tokenization import ChatSummary, tokenize_chat
from megacore.data.indexed_dataset import IndexedDataset, IndexedDatasetWriter, token_dtype
from megacore.data.instruction import InstructionDataset, InstructionDescription, Role
from megacore.data.instruction_samples import InstructionSamples
from megacore.data.merging import merge_datasets
from megacore.data.mixed_samples import MixedSamples, SampleSource, WindowSamples
from megacore.data.mixing import Mixture
from megacore.data.samples import Sample
from megacore.data.splits import SPLITS, Split, split_tokens
from megacore.data.tokenization import DatasetDescription, TokenizeSummary, tokenize
from megacore.data.tokenizer import Tokenizer, load_tokenizer
from megacore.data.vocabulary import check_token_ids
from megacore.data.windows import KeyedPermutation, SampleOrder, TokenWindows

__all__ = [
    "SPLITS",
    "ChatSummary",
    "DatasetDescription",
    "IndexedDataset",
    "IndexedDatasetWriter",
    "InstructionDataset",
    "InstructionDescription",
    "InstructionSamples",
    "KeyedPermutation",
    "MessageKeys",
    "MixedSamples",
    "Mixture",
    "QuestionKeys",
    "Role",
    "Sample",
    "SampleOrder",
    "SampleSource",
    "Split",
    "TokenWindows",
    "TokenizeSummary",
    "Tokenizer",
    "WindowSamples",
    "check_token_ids",
    "load_tokenizer",
    "merge_datasets",
    "split_tokens",
    "token_dtype",
    "tokenize",
    "tokenize_chat",
]
