"""Token ids for a verification: from a dataset, from text, or random."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from megacore.checkpoint import Checkpoint
from megacore.data import IndexedDataset, TokenWindows, check_token_ids, load_tokenizer
from megacore.errors import DataError


def dataset_samples(prefix: Path, checkpoint: Checkpoint, *, iterations: int, seq_length: int) -> Tensor:
    """Return the first ``iterations`` samples of a dataset, ``[iterations, seq_length + 1]``.

    Raises :class:`DataError` if the dataset is too short, or has ids beyond the checkpoint's vocabulary.
    """
    windows = TokenWindows(IndexedDataset(prefix), seq_length)
    if len(windows) < iterations:
        raise DataError(
            f"{prefix} has {len(windows)} samples of {seq_length} tokens, not {iterations}: "
            "choose a smaller --iters or --seq-length"
        )
    samples = torch.stack([torch.from_numpy(windows[index]) for index in range(iterations)])
    return check_token_ids(samples, checkpoint.manifest.config["vocab_size"], str(prefix))


def text_samples(file: Path, checkpoint: Checkpoint, *, iterations: int, seq_length: int) -> Tensor:
    """Return the first tokens of a text file by the checkpoint's tokenizer, ``[iterations, seq_length + 1]``.

    Raises :class:`DataError` if the text is too short, or the checkpoint has no tokenizer.
    """
    if checkpoint.tokenizer_directory is None:
        raise DataError(f"{checkpoint.path} has no tokenizer: tokenize {file} yourself and give --data")
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read as text: {error}") from error
    ids = torch.tensor(load_tokenizer(checkpoint.tokenizer_directory).encode(text), dtype=torch.int64)
    if len(ids) < iterations * seq_length + 1:
        raise DataError(
            f"{file} has {len(ids)} tokens, but {iterations} iterations of {seq_length} need "
            f"{iterations * seq_length + 1}: choose a smaller --iters or --seq-length"
        )
    samples = ids.unfold(0, seq_length + 1, seq_length)[:iterations]
    return check_token_ids(samples, checkpoint.manifest.config["vocab_size"], str(file))


def random_samples(checkpoint: Checkpoint, *, iterations: int, seq_length: int, seed: int = 0) -> Tensor:
    """Return random token ids, ``[iterations, seq_length + 1]``, the same for the same ``seed``."""
    generator = torch.Generator().manual_seed(seed)
    vocab_size = checkpoint.manifest.config["vocab_size"]
    return torch.randint(0, vocab_size, (iterations, seq_length + 1), generator=generator)
