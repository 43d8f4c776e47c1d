"""Published Falcons of random weights, as transformers itself saves them: where the truth of these tests comes from."""

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
from transformers import FalconConfig, FalconForCausalLM
from transformers.utils import logging

from megacore.checkpoint import Checkpoint
from megacore.model import DecoderModel, load_model
from megacore.parallel import ParallelContext
from megacore.testing.ranks import ranks
from megacore.weights import convert

__all__ = ["ranks"]

COMMON = {"num_hidden_layers": 3, "vocab_size": 99, "max_position_embeddings": 64, "bos_token_id": 3, "eos_token_id": 4}

MULTI_QUERY = COMMON | {"hidden_size": 56, "num_attention_heads": 7}
GROUPED = COMMON | {
    "hidden_size": 48,
    "num_attention_heads": 6,
    "num_kv_heads": 3,
    "new_decoder_architecture": True,
}
ALIBI = COMMON | {
    "hidden_size": 64,
    "num_attention_heads": 8,
    "alibi": True,
    "bias": True,
    "multi_query": False,
    "parallel_attn": False,
}

SHAPES: dict[str, dict[str, Any]] = {
    "7B: multi-query, one norm, parallel": MULTI_QUERY,
    "7B, biases": MULTI_QUERY | {"bias": True, "ffn_hidden_size": 51},
    "7B, sequential": MULTI_QUERY | {"parallel_attn": False},
    "7B, multi-head": MULTI_QUERY | {"multi_query": False},
    "40B: grouped, two norms, parallel": GROUPED,
    "40B, one group": GROUPED | {"num_kv_heads": 1},
    "40B, untied, biases": GROUPED | {"tie_word_embeddings": False, "bias": True, "num_ln_in_parallel_attn": 2},
    "11B: grouped, one norm, untied": GROUPED
    | {
        "num_ln_in_parallel_attn": 1,
        "tie_word_embeddings": False,
        "ffn_hidden_size": 77,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500042.0},
    },
    "RW: ALiBi, biases, multi-head, sequential": ALIBI,
    "RW, 6 heads of 10": ALIBI | {"hidden_size": 60, "num_attention_heads": 6},
    "RW, 7 heads": ALIBI | {"hidden_size": 42, "num_attention_heads": 7, "ffn_hidden_size": 75},
    "ALiBi on a parallel multi-query layer": MULTI_QUERY | {"alibi": True},
    "ALiBi on 12 grouped heads": GROUPED | {"alibi": True, "hidden_size": 72, "num_attention_heads": 12},
}
"""Settings of ``transformers.FalconConfig``, by the published model that they are like and what is special."""


@dataclass(frozen=True)
class Published:
    """A model of transformers and the directory that it was saved to."""

    model: FalconForCausalLM
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


def random_falcon(*, dtype: torch.dtype = torch.float32, seed: int = 0, **settings: Any) -> FalconForCausalLM:
    """A Falcon whose every parameter is random, biases and norms too, of a size that makes logits of order 1.

    Attention is torch's own and not "eager": with ALiBi, transformers adds the biases twice there, which a test shows.
    """
    generator = torch.Generator().manual_seed(seed)
    model = FalconForCausalLM._from_config(FalconConfig(**settings), attn_implementation="sdpa")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 2:
                parameter.copy_(noise / parameter.shape[1] ** 0.5)
            elif "ln_" in name or "layernorm" in name:
                parameter.copy_(0.3 * noise + (1 if name.endswith("weight") else 0))
            else:
                parameter.copy_(0.3 * noise)
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
    """Saves a random Falcon to a directory: ``publish(dtype=torch.bfloat16, max_shard_size="20KB", **settings)``."""
    logging.disable_progress_bar()
    numbers = count()

    def save(*, max_shard_size: str = "5GB", **settings: Any) -> Published:
        published = Published(random_falcon(**settings), tmp_path / f"published-{next(numbers)}")
        published.model.save_pretrained(published.directory, max_shard_size=max_shard_size)
        return published

    return save


@pytest.fixture
def read_tensors():
    """Reads every tensor of a directory's safetensors files with safetensors' own reader."""
    return tensors_in


@pytest.fixture
def convert_and_load(tmp_path):
    """Our model of a published directory, through a native checkpoint."""
    numbers = count()

    def load(published, dtype=torch.float32) -> DecoderModel:
        ckpt = tmp_path / f"ckpt-{next(numbers)}"
        convert("falcon", published.directory, ckpt)
        return load_model(Checkpoint(ckpt), ParallelContext.single(), dtype=dtype)

    return load
