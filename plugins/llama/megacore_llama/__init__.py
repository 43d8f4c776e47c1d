"""The Llama family for megacore: RMSNorm, rotary positions, grouped-query attention, gated MLP."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megacore import ModelConfig, ModelFamily, hookimpl
from megacore.errors import UnsupportedSourceError
from megacore_llama.config import config_from_source, config_to_source

if TYPE_CHECKING:
    import torch
    from torch import nn

    from megacore.hookspecs import ReferenceModel
    from megacore.parallel import ParallelContext
    from megacore.weights import WeightMap


@hookimpl
def model_families() -> list[ModelFamily]:
    return [
        ModelFamily(
            name="llama",
            architectures=("LlamaForCausalLM",),
            config_from_source=config_from_source,
            config_to_source=config_to_source,
        )
    ]


@hookimpl
def weight_map(config: ModelConfig, source: str) -> WeightMap:
    from megacore_llama.weights import hf_weight_map

    _require_hf(source)
    return hf_weight_map(config)


@hookimpl
def qkv_permutation(config: ModelConfig, source: str) -> Sequence[int]:
    from megacore.weights import grouped_qkv_rows

    _require_hf(source)
    return grouped_qkv_rows(config)  # Hugging Face's rotary pairs are halves, as megacore's are


@hookimpl
def load_reference(config: ModelConfig, path: Path | None, dtype: torch.dtype, device: torch.device) -> ReferenceModel:
    from transformers import LlamaForCausalLM
    from transformers.utils import logging

    from megacore.verification import TransformersReference

    logging.disable_progress_bar()
    published = config_to_source(config, "hf")
    return TransformersReference.load(LlamaForCausalLM, published, path, dtype=dtype, device=device, attention="eager")


@hookimpl
def build_layer(config: ModelConfig, parallel: ParallelContext) -> nn.Module:
    from megacore_llama.layer import LlamaLayer

    return LlamaLayer(config, parallel)


def _require_hf(source: str) -> None:
    if source != "hf":
        raise UnsupportedSourceError(f"megacore-llama reads the format hf, not {source!r}")
