"""Weights: a table of rules connects a published checkpoint and the native parameters, in both directions.

Start with ``rules``; ``conversion`` and ``exporting`` run a table, ``formats`` knows the files.
The names below are imported on first use, so that a plugin can import from here without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megacore.weights.conversion import convert as convert
    from megacore.weights.exporting import export as export, translate as translate
    from megacore.weights.formats import recognise as recognise
    from megacore.weights.rules import (
        Copy as Copy,
        FusedQKV as FusedQKV,
        Rule as Rule,
        Stacked as Stacked,
        SwappedHalves as SwappedHalves,
        WeightMap as WeightMap,
        grouped_qkv_rows as grouped_qkv_rows,
    )
    from megacore.weights.standard_decoder import StandardDecoder as StandardDecoder
    from megacore.weights.standard_decoder.hf import (
        ROTARY_METHODS as ROTARY_METHODS,
        rotary_from_hf as rotary_from_hf,
        rotary_to_hf as rotary_to_hf,
        standard_config_from_hf as standard_config_from_hf,
        standard_config_to_hf as standard_config_to_hf,
        standard_hf_map as standard_hf_map,
    )
    from megacore.weights.standard_decoder.meta import (
        config_from_meta as config_from_meta,
        config_to_meta as config_to_meta,
        meta_map as meta_map,
    )

_NAMES = {
    "conversion": ("convert",),
    "exporting": ("export", "translate"),
    "formats": ("recognise",),
    "rules": ("Copy", "FusedQKV", "Rule", "Stacked", "SwappedHalves", "WeightMap", "grouped_qkv_rows"),
    "standard_decoder": ("StandardDecoder",),
    "standard_decoder.hf": (
        "ROTARY_METHODS",
        "rotary_from_hf",
        "rotary_to_hf",
        "standard_config_from_hf",
        "standard_config_to_hf",
        "standard_hf_map",
    ),
    "standard_decoder.meta": ("config_from_meta", "config_to_meta", "meta_map"),
}
_HOME = {name: f"{__name__}.{module}" for module, names in _NAMES.items() for name in names}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
