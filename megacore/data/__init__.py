"""Data: tokenizing text, the indexed dataset that holds the ids, and the samples that training takes from it."""

from megacore.data.chat_records import MessageKeys, QuestionKeys
from megacore.data.chat_tokenization import ChatSummary, tokenize_chat
from megacore.data.indexed_dataset import IndexedDataset, IndexedDatasetWriter, token_dtype
from megacore.data.instruction import InstructionDataset, InstructionDescription, Role
from megacore.data.instruction_samples import InstructionSamples
from megacore.data.samples import Sample
from megacore.data.tokenization import DatasetDescription, TokenizeSummary, tokenize
from megacore.data.tokenizer import Tokenizer, load_tokenizer
from megacore.data.vocabulary import check_token_ids
from megacore.data.windows import KeyedPermutation, SampleOrder, TokenWindows

__all__ = [
    "ChatSummary",
    "DatasetDescription",
    "IndexedDataset",
    "IndexedDatasetWriter",
    "InstructionDataset",
    "InstructionDescription",
    "InstructionSamples",
    "KeyedPermutation",
    "MessageKeys",
    "QuestionKeys",
    "Role",
    "Sample",
    "SampleOrder",
    "TokenWindows",
    "TokenizeSummary",
    "Tokenizer",
    "check_token_ids",
    "load_tokenizer",
    "token_dtype",
    "tokenize",
    "tokenize_chat",
]
