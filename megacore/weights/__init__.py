"""Weight maps, and the engine that runs them in both directions."""

from megacore.weights.conversion import convert
from megacore.weights.exporting import export
from megacore.weights.rotary_settings import ROTARY_METHODS, rotary_from_hf, rotary_to_hf
from megacore.weights.rules import Copy, FusedQKV, Rule, Stacked, WeightMap, grouped_qkv_rows

__all__ = [
    "ROTARY_METHODS",
    "Copy",
    "FusedQKV",
    "Rule",
    "Stacked",
    "WeightMap",
    "convert",
    "export",
    "grouped_qkv_rows",
    "rotary_from_hf",
    "rotary_to_hf",
]
