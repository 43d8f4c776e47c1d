"""Published Llamas of random weights, as transformers itself saves them: where the truth of these tests comes from."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

MULTI_HEAD = {
    "num_hidden_layers": 5,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 99,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "bos_token_id": 3,
    "eos_token_id": [4, 5],
}

SHAPES: dict[str, dict[str, Any]] = {
    "multi-head": MULTI_HEAD,
    "multi-head, tied": MULTI_HEAD | {"tie_word_embeddings": True},
    "2 key-value heads": MULTI_HEAD | {"num_key_value_heads": 2},
    "3 key-value heads, tied": MULTI_HEAD
    | {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 3, "tie_word_embeddings": True},
    "multi-query": MULTI_HEAD | {"num_key_value_heads": 1},
    "heads wider than hidden": MULTI_HEAD | {"num_key_value_heads": 2, "head_dim": 20},
    "attention biases": MULTI_HEAD | {"num_key_value_heads": 2, "attention_bias": True},
    "mlp biases": MULTI_HEAD | {"num_key_value_heads": 2, "mlp_bias": True},
    "everything at once": MULTI_HEAD
    | {
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "hidden_size": 42,
        "intermediate_size": 55,
        "head_dim": 10,
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": True,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
    },
}
"""Settings of ``transformers.LlamaConfig``, by what is special about them."""


@dataclass(frozen=True)
class Published:
    """A model of transformers and the directory that it was saved to."""

    model: LlamaForCausalLM
    directory: Path

    def tensors(self) -> dict[str, Tensor]:
        """Everything in the weight files, by name, read with safetensors' own reader."""
        return tensors_in(self.directory)

    @contextmanager
    def edited_config(self) -> Iterator[dict[str, Any]]:
        """``config.json``, parsed; it is written back at the end of the block."""
        path = self.directory / "config.json"
        config = json.loads(path.read_text())
        yield config
        path.write_text(json.dumps(config))

    @contextmanager
    def edited_tensors(self) -> Iterator[dict[str, Tensor]]:
        """The tensors of ``model.safetensors``; they are written back at the end of the block."""
        path = self.directory / "model.safetensors"
        tensors = load_file(path)
        yield tensors
        save_file(tensors, path, metadata={"format": "pt"})


def tensors_in(directory: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        read = load_file(file)
        assert not tensors.keys() & read.keys(), f"{tensors.keys() & read.keys()} are in two files of {directory}"
        tensors |= read
    return tensors


def random_llama(*, dtype: torch.dtype = torch.float32, seed: int = 0, **settings: Any) -> LlamaForCausalLM:
    """A Llama whose every parameter is random, biases and norms too, of a size that makes logits of order 1."""
    generator = torch.Generator().manual_seed(seed)
    model = LlamaForCausalLM._from_config(LlamaConfig(**settings), attn_implementation="eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                parameter.copy_(1 + 0.3 * noise)
            elif parameter.dim() == 1:
                parameter.copy_(0.3 * noise)
            else:
                parameter.copy_(noise / parameter.shape[1] ** 0.5)
    return model.to(dtype).eval()


@pytest.fixture(params=SHAPES)
def shape(request) -> dict[str, Any]:
    """Each of the shapes in turn."""
    return SHAPES[request.param]


@pytest.fixture
def shapes() -> dict[str, dict[str, Any]]:
    """The shapes, for a test that picks one by name."""
    return SHAPES


@pytest.fixture
def publish(tmp_path):
    """Saves a random Llama to a directory: ``publish(dtype=torch.bfloat16, max_shard_size="20KB", **settings)``."""
    logging.disable_progress_bar()
    numbers = count()

    def save(*, max_shard_size: str = "5GB", **settings: Any) -> Published:
        published = Published(random_llama(**settings), tmp_path / f"published-{next(numbers)}")
        published.model.save_pretrained(published.directory, max_shard_size=max_shard_size)
        return published

    return save


@pytest.fixture
def read_tensors():
    """Reads every tensor of a directory's safetensors files with safetensors' own reader."""
    return tensors_in
