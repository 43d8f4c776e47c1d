"""Small models of random weights of other families than :mod:`tiny_llama`'s."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import FalconConfig, FalconForCausalLM

from tiny_llama import VOCAB


def tied_multi_query_falcon(directory: Path) -> Path:
    """Save a transformers Falcon like 7B: one key-value head, tied embeddings; 5 layers, a vocabulary of 99."""
    return _falcon(
        directory,
        hidden_size=32,
        num_attention_heads=4,
        ffn_hidden_size=26,
        multi_query=True,
        parallel_attn=True,
        bias=False,
    )


def falcon_with_linear_biases(directory: Path) -> Path:
    """Save a transformers Falcon like RW-1B: ALiBi, biases everywhere, 7 heads, tied embeddings; 5 layers."""
    return _falcon(
        directory,
        hidden_size=42,
        num_attention_heads=7,
        ffn_hidden_size=75,
        multi_query=False,
        parallel_attn=False,
        bias=True,
        alibi=True,
    )


def grouped_falcon(directory: Path) -> Path:
    """Save a transformers Falcon like 40B: 6 heads on 3 key-value heads, two norms, untied embeddings; 5 layers."""
    return _falcon(
        directory,
        hidden_size=48,
        num_attention_heads=6,
        num_kv_heads=3,
        new_decoder_architecture=True,
        bias=False,
        tie_word_embeddings=False,
    )


def _falcon(directory: Path, **settings: Any) -> Path:
    usual = {"new_decoder_architecture": False, "tie_word_embeddings": True}
    config = FalconConfig(vocab_size=VOCAB, num_hidden_layers=5, **(usual | settings))
    torch.manual_seed(0)
    model = FalconForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_norm = "layernorm" in name or "ln_f" in name
            parameter.normal_(std=0.2).add_(1.0 if is_norm and name.endswith("weight") else 0.0)
    model.save_pretrained(directory)
    return directory
