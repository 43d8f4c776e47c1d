"""Weight maps, and the engine that runs them in both directions."""

from megacore.weights.conversion import convert
from megacore.weights.exporting import export
from megacore.weights.formats import recognise
from megacore.weights.meta_config import config_from_meta, config_to_meta
from megacore.weights.rotary_settings import ROTARY_METHODS, rotary_from_hf, rotary_to_hf
from megacore.weights.rules import Copy, FusedQKV, Rule, Stacked, SwappedHalves, WeightMap, grouped_qkv_rows
from megacore.weights.standard_config import standard_config_from_hf, standard_config_to_hf
from megacore.weights.standard_maps import meta_map, standard_hf_map
from megacore.weights.translation import translate

__all__ = [
    "ROTARY_METHODS",
    "Copy",
    "FusedQKV",
    "Rule",
    "Stacked",
    "SwappedHalves",
    "WeightMap",
    "config_from_meta",
    "config_to_meta",
    "convert",
    "export",
    "grouped_qkv_rows",
    "meta_map",
    "recognise",
    "rotary_from_hf",
    "rotary_to_hf",
    "standard_config_from_hf",
    "standard_config_to_hf",
    "standard_hf_map",
    "translate",
]
