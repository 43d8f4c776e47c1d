"""The Llama family for megacore: RMSNorm, rotary positions, grouped-query attention, gated MLP."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megacore import ModelConfig, ModelFamily, hookimpl
from megacore.config import FrequencyBandScaling
from megacore.weights import StandardDecoder
from megacore_llama.presets import PRESETS

if TYPE_CHECKING:
    import torch
    from torch import nn

    from megacore.hookspecs import ReferenceModel
    from megacore.parallel import ParallelContext
    from megacore.weights import WeightMap

LLAMA = StandardDecoder(
    name="llama",
    architecture="LlamaForCausalLM",
    model_type="llama",
    context_length=2048,
    rotary_methods={"llama3": FrequencyBandScaling},
)


@hookimpl
def model_families() -> list[ModelFamily]:
    return [LLAMA.model_family(presets=PRESETS)]


@hookimpl
def weight_map(config: ModelConfig, source: str) -> WeightMap:
    return LLAMA.weight_map(config, source)


@hookimpl
def qkv_permutation(config: ModelConfig, source: str) -> Sequence[int]:
    return LLAMA.qkv_permutation(config, source)


@hookimpl
def load_reference(config: ModelConfig, path: Path | None, dtype: torch.dtype, device: torch.device) -> ReferenceModel:
    from transformers import LlamaForCausalLM

    from megacore.verification import load_standard_reference

    return load_standard_reference(
        LlamaForCausalLM,
        LLAMA.config_to_source(config, "hf"),
        path,
        meta_implementation="llama_models.llama3",
        meta_extra="megacore-llama[meta]",
        max_seq_len=config.max_position_embeddings,
        dtype=dtype,
        device=device,
    )


@hookimpl
def build_layer(config: ModelConfig, parallel: ParallelContext) -> nn.Module:
    from megacore_llama.layer import LlamaLayer

    return LlamaLayer(config, parallel)
