"""The Falcon family for megacore: LayerNorm, rotary positions or linear biases, few or grouped key-value heads."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from megacore import ModelFamily, hookimpl
from megacore.errors import UnsupportedSourceError
from megacore_falcon.config import FalconConfig, config_from_source, config_to_source
from megacore_falcon.first_files import for_transformers
from megacore_falcon.presets import HUB, PRESETS

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
            name="falcon",
            architectures=("FalconForCausalLM", "RWForCausalLM"),
            config_from_source=config_from_source,
            config_to_source=config_to_source,
            config_class=FalconConfig,
            sources=("hf", "megatron-llm"),
            presets=PRESETS,
            hub=HUB,
        )
    ]


@hookimpl
def weight_map(config: FalconConfig, source: str) -> WeightMap:
    from megacore_falcon.megatron_llm import megatron_llm_weight_map
    from megacore_falcon.weights import hf_weight_map

    if source == "megatron-llm":
        return megatron_llm_weight_map(config)
    _require_hf(source)
    return hf_weight_map(config)


@hookimpl
def qkv_permutation(config: FalconConfig, source: str) -> Sequence[int]:
    if source == "megatron-llm":
        from megacore.weights.formats.megatron_llm.weight_map import interleaved_qkv_rows

        return interleaved_qkv_rows(config)
    _require_hf(source)
    # The published projection is fused and grouped as megacore's: of each group the query heads, the key, the value.
    # Multi-query attention is a single group, and in multi-head attention each head is a group of its own.
    return range((config.num_attention_heads + 2 * config.num_kv_heads) * config.head_dim)


@hookimpl
def load_reference(config: FalconConfig, path: Path | None, dtype: torch.dtype, device: torch.device) -> ReferenceModel:
    from transformers import FalconForCausalLM
    from transformers.utils import logging

    from megacore.verification import TransformersReference

    logging.disable_progress_bar()
    published = config_to_source(config, "hf")
    with for_transformers(path) if path is not None else nullcontext() as readable:
        # Not "eager": with linear biases, transformers 5 adds them twice there.
        return TransformersReference.load(
            FalconForCausalLM, published, readable, dtype=dtype, device=device, attention="sdpa"
        )


@hookimpl
def build_layer(config: FalconConfig, parallel: ParallelContext) -> nn.Module:
    from megacore_falcon.layer import FalconLayer

    return FalconLayer(config, parallel)


def _require_hf(source: str) -> None:
    if source != "hf":
        raise UnsupportedSourceError(f"megacore-falcon reads the formats hf and megatron-llm, not {source!r}")
