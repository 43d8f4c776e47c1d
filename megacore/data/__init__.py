"""Data: from text files to the samples that training takes.

Text becomes token ids in ``preprocess`` (with ``tokenizers``), which writes ``datasets``; ``sampling`` reads them.
Start with ``preprocess.text`` or ``sampling.samples``.
"""

from megacore.data.datasets.description import (
    DatasetDescription as DatasetDescription,
    check_token_ids as check_token_ids,
)
from megacore.data.datasets.indexed import (
    IndexedDataset as IndexedDataset,
    IndexedDatasetWriter as IndexedDatasetWriter,
    token_dtype as token_dtype,
)
from megacore.data.datasets.instruction import (
    InstructionDataset as InstructionDataset,
    InstructionDescription as InstructionDescription,
    Role as Role,
)
from megacore.data.datasets.merge import merge_datasets as merge_datasets
from megacore.data.datasets.splits import SPLITS as SPLITS, Split as Split, split_tokens as split_tokens
from megacore.data.preprocess.chat import ChatSummary as ChatSummary, tokenize_chat as tokenize_chat
from megacore.data.preprocess.conversations import MessageKeys as MessageKeys, QuestionKeys as QuestionKeys
from megacore.data.preprocess.text import TokenizeSummary as TokenizeSummary, tokenize as tokenize
from megacore.data.sampling.instruction_samples import InstructionSamples as InstructionSamples
from megacore.data.sampling.mixture import Mixture as Mixture
from megacore.data.sampling.samples import (
    MixedSamples as MixedSamples,
    Sample as Sample,
    SampleSource as SampleSource,
    WindowSamples as WindowSamples,
)
from megacore.data.sampling.windows import (
    KeyedPermutation as KeyedPermutation,
    SampleOrder as SampleOrder,
    TokenWindows as TokenWindows,
)
from megacore.data.tokenizers.added_tokens import NewTokens as NewTokens
from megacore.data.tokenizers.tokenizer import Tokenizer as Tokenizer, load_tokenizer as load_tokenizer
