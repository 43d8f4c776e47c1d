"""The global batches of a run, and which part of each a data-parallel process sees."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megacore.checkpoint import Checkpoint
from megacore.data import DatasetDescription, IndexedDataset, SampleOrder, TokenWindows, check_token_ids
from megacore.errors import DataError
from megacore.training.run_config import RunConfig


@dataclass(frozen=True)
class Batch:
    """What one data-parallel process sees of a global batch.

    Attributes:
        tokens: token ids, ``[samples, sequence + 1]``.
        loss_mask: what each target counts for in the loss, ``[samples, sequence]``; 0 for one not to be learned.
        sample_ids: the number of each sample among all of the run, ``[samples]``.
    """

    tokens: Tensor
    loss_mask: Tensor
    sample_ids: Tensor


def open_dataset(run: RunConfig, checkpoint: Checkpoint) -> IndexedDataset:
    """Open the run's dataset; what it was tokenized with must fit the checkpoint, where the dataset says so.

    Raises:
        DataError: when it does not fit, or cannot be read.
    """
    dataset = IndexedDataset(run.data.prefix)
    description = DatasetDescription.read(run.data.prefix)
    vocab_size = checkpoint.manifest.config["vocab_size"]
    if description is not None and description.vocab_size > vocab_size:
        raise DataError(
            f"the dataset {run.data.prefix} was made with a tokenizer of {description.vocab_size} ids, and the "
            f"checkpoint's vocabulary has {vocab_size}: tokenize with the checkpoint's own tokenizer, and with "
            f"--no-new-tokens or, where its new tokens are wanted, give the model rows for them: "
            f"`megacore split {checkpoint.path} --out … --add-tokens {run.data.prefix}`"
        )
    return dataset


def batches(run: RunConfig, checkpoint: Checkpoint, *, dp_rank: int = 0, dp_size: int = 1) -> Iterator[Batch]:
    """What data-parallel process ``dp_rank`` of ``dp_size`` sees of the run's global batches.

    Raises:
        DataError: when a token id is beyond the vocabulary.
    """
    windows = TokenWindows(open_dataset(run, checkpoint), run.data.seq_length)
    order = SampleOrder(len(windows), run.data.seed)
    size = run.training.global_batch_size
    share = size // dp_size
    vocab_size = checkpoint.manifest.config["vocab_size"]
    for iteration in range(run.training.train_iters):
        first = iteration * size + dp_rank * share
        numbers = range(first, first + share)
        tokens = torch.stack([torch.from_numpy(windows[order[number]]) for number in numbers])
        yield Batch(
            tokens=check_token_ids(tokens, vocab_size, str(run.data.prefix)),
            loss_mask=torch.ones(share, run.data.seq_length),
            sample_ids=torch.tensor(numbers),
        )
