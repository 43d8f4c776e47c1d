"""The Llama family for megacore: RMSNorm, rotary positions, grouped-query attention, gated MLP."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megacore import ModelConfig, ModelFamily, hookimpl
from megacore.errors import UnsupportedSourceError
from megacore_llama.config import config_from_source, config_to_source
from megacore_llama.presets import PRESETS

if TYPE_CHECKING:
    import torch
    from torch import nn

    from megacore.hookspecs import ReferenceModel
    from megacore.parallel import ParallelContext
    from megacore.weights import WeightMap

SOURCES = ("hf", "meta", "megatron-llm")


@hookimpl
def model_families() -> list[ModelFamily]:
    return [
        ModelFamily(
            name="llama",
            architectures=("LlamaForCausalLM",),
            config_from_source=config_from_source,
            config_to_source=config_to_source,
            sources=SOURCES,
            presets=PRESETS,
        )
    ]


@hookimpl
def weight_map(config: ModelConfig, source: str) -> WeightMap:
    from megacore_llama.weights import WEIGHT_MAPS

    _require_known(source)
    return WEIGHT_MAPS[source](config)


@hookimpl
def qkv_permutation(config: ModelConfig, source: str) -> Sequence[int]:
    from megacore_llama.weights import QKV_ROWS

    _require_known(source)
    return QKV_ROWS[source](config)


@hookimpl
def load_reference(config: ModelConfig, path: Path | None, dtype: torch.dtype, device: torch.device) -> ReferenceModel:
    from transformers import LlamaForCausalLM
    from transformers.utils import logging

    from megacore.verification import MetaReference, TransformersReference
    from megacore.weights import recognise

    if path is not None and recognise(path) == "meta":
        return MetaReference.load(
            path,
            implementation="llama_models.llama3",
            extra="megacore-llama[meta]",
            max_seq_len=config.max_position_embeddings,
            dtype=dtype,
            device=device,
        )
    logging.disable_progress_bar()
    published = config_to_source(config, "hf")
    return TransformersReference.load(LlamaForCausalLM, published, path, dtype=dtype, device=device, attention="eager")


@hookimpl
def build_layer(config: ModelConfig, parallel: ParallelContext) -> nn.Module:
    from megacore_llama.layer import LlamaLayer

    return LlamaLayer(config, parallel)


def _require_known(source: str) -> None:
    if source not in SOURCES:
        raise UnsupportedSourceError(f"megacore-llama reads the formats {', '.join(SOURCES)}, not {source!r}")
