"""Small models of random weights and a small dataset, for tests that need the whole path."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from megacore.data import IndexedDatasetWriter

VOCAB = 99

SIZES: dict[str, Any] = {
    "num_hidden_layers": 5,
    "hidden_size": 24,
    "intermediate_size": 13,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 8,
    "vocab_size": VOCAB,
    "max_position_embeddings": 32,
}
"""Nothing that two ranks divide evenly: 3 groups, an ffn of 13, a vocabulary of 99, 5 layers."""


def published_model(directory: Path, **settings: Any) -> Path:
    """Save a transformers Llama with random weights: logits are of order 1, norms are not all ones."""
    config = LlamaConfig(**(SIZES | settings))
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.2).add_(1.0 if "norm" in name else 0.0)
    model.save_pretrained(directory)
    return directory


def write_dataset(prefix: Path, *, num_tokens: int = 1009, vocab_size: int = VOCAB) -> Path:
    """Random token ids in documents of 50; by default samples of 8 and of 12 tokens leave none over."""
    ids = np.random.default_rng(0).integers(0, vocab_size, num_tokens)
    ids[7] = vocab_size - 1
    with IndexedDatasetWriter(prefix, "uint16") as writer:
        for document in np.split(ids, range(50, num_tokens, 50)):
            writer.add_document(document)
    return prefix
