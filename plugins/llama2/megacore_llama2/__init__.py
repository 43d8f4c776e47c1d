"""The Llama 2 and Code Llama families for megacore: RMSNorm, rotary positions, grouped-query attention, gated MLP.

The two are one architecture: Code Llama's rotary base of a million and its vocabulary with tokens for infilling are in
its configuration files.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megacore import ModelConfig, ModelFamily, hookimpl
from megacore.weights import StandardDecoder
from megacore_llama2.presets import CODELLAMA, CODELLAMA_HUB, LLAMA2, LLAMA2_HUB

if TYPE_CHECKING:
    import torch
    from torch import nn

    from megacore.hookspecs import ReferenceModel
    from megacore.parallel import ParallelContext
    from megacore.weights import WeightMap

DECODERS = {
    name: StandardDecoder(name=name, architecture="LlamaForCausalLM", model_type="llama", context_length=context_length)
    for name, context_length in (("llama2", 4096), ("codellama", 16384))
}


@hookimpl
def model_families() -> list[ModelFamily]:
    return [
        DECODERS["llama2"].model_family(presets=LLAMA2, hub=LLAMA2_HUB),
        DECODERS["codellama"].model_family(presets=CODELLAMA, hub=CODELLAMA_HUB),
    ]


@hookimpl
def weight_map(config: ModelConfig, source: str) -> WeightMap:
    return DECODERS[config.family].weight_map(config, source)


@hookimpl
def qkv_permutation(config: ModelConfig, source: str) -> Sequence[int]:
    return DECODERS[config.family].qkv_permutation(config, source)


@hookimpl
def load_reference(config: ModelConfig, path: Path | None, dtype: torch.dtype, device: torch.device) -> ReferenceModel:
    from transformers import LlamaForCausalLM

    from megacore.verification import load_standard_reference

    return load_standard_reference(
        LlamaForCausalLM,
        DECODERS[config.family].config_to_source(config, "hf"),
        path,
        meta_implementation="llama_models.llama3",
        meta_extra="megacore-llama2[meta]",
        max_seq_len=config.max_position_embeddings,
        dtype=dtype,
        device=device,
    )


@hookimpl
def build_layer(config: ModelConfig, parallel: ParallelContext) -> nn.Module:
    from megacore_llama2.layer import Llama2Layer

    return Llama2Layer(config, parallel)
