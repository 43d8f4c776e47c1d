"""Data: tokenizing text, the indexed dataset that holds the ids, and the samples that training takes from it."""

from megacore.data.indexed_dataset import IndexedDataset, IndexedDatasetWriter, token_dtype
from megacore.data.samples import Sample
from megacore.data.tokenization import DatasetDescription, TokenizeSummary, tokenize
from megacore.data.tokenizer import Tokenizer, load_tokenizer
from megacore.data.vocabulary import check_token_ids
from megacore.data.windows import KeyedPermutation, SampleOrder, TokenWindows

__all__ = [
    "DatasetDescription",
    "IndexedDataset",
    "IndexedDatasetWriter",
    "KeyedPermutation",
    "Sample",
    "SampleOrder",
    "TokenWindows",
    "TokenizeSummary",
    "Tokenizer",
    "check_token_ids",
    "load_tokenizer",
    "token_dtype",
    "tokenize",
]
