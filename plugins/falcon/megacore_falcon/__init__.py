"""The Falcon family for megacore: LayerNorm, rotary positions or linear biases, few or grouped key-value heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megacore import ModelFamily, hookimpl
from megacore.errors import UnsupportedSourceError
from megacore_falcon.config import FalconConfig
from megacore_falcon.first_files import for_transformers
from megacore_falcon.presets import HUB, PRESETS

if TYPE_CHECKING:
    import torch
    from torch import nn

    from megacore.hookspecs import ReferenceModel
    from megacore.parallel import ParallelContext
    from megacore.weights import WeightMap

SOURCES = ("hf", "megatron-llm")


@hookimpl
def model_families() -> list[ModelFamily]:
    return [
        ModelFamily(
            name="falcon",
            architectures=("FalconForCausalLM", "RWForCausalLM"),
            config_from_source=config_from_source,
            config_to_source=config_to_source,
            config_class=FalconConfig,
            sources=SOURCES,
            presets=PRESETS,
            hub=HUB,
        )
    ]


def config_from_source(published: Mapping[str, Any], source: str) -> FalconConfig:
    """Read a published configuration. Raises :class:`ConfigError`, naming a setting that is not implemented."""
    from megacore_falcon import hf, megatron_llm

    return hf.config_from_hf(published) if source == "hf" else megatron_llm.config_from_args(published)


def config_to_source(config: FalconConfig, source: str) -> dict[str, Any]:
    """Return the published configuration of ``config``, the inverse of :func:`config_from_source`."""
    from megacore_falcon import hf, megatron_llm

    return hf.config_to_hf(config) if source == "hf" else megatron_llm.config_to_args(config)


@hookimpl
def weight_map(config: FalconConfig, source: str) -> WeightMap:
    from megacore_falcon import hf, megatron_llm

    _require_known(source)
    return hf.hf_weight_map(config) if source == "hf" else megatron_llm.megatron_llm_weight_map(config)


@hookimpl
def qkv_permutation(config: FalconConfig, source: str) -> Sequence[int]:
    from megacore.weights.standard_decoder.megatron_llm import interleaved_qkv_rows

    _require_known(source)
    if source == "megatron-llm":
        return interleaved_qkv_rows(config)
    # The published projection is fused and grouped as megacore's: for each group the query heads, the key, the value.
    # Multi-query attention is a single group; in multi-head attention each head is a group of its own.
    return range((config.num_attention_heads + 2 * config.num_kv_heads) * config.head_dim)


@hookimpl
def load_reference(config: FalconConfig, path: Path | None, dtype: torch.dtype, device: torch.device) -> ReferenceModel:
    from transformers import FalconForCausalLM

    from megacore.verification import TransformersReference

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


def _require_known(source: str) -> None:
    if source not in SOURCES:
        raise UnsupportedSourceError(f"megacore-falcon reads the formats {' and '.join(SOURCES)}, not {source!r}")
