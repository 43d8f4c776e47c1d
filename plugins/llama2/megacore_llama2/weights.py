"""Which tensors of a published Llama 2 are which of megacore's parameters, in each format.

The names are those of most decoders (:mod:`megacore.weights.standard_maps`). What differs is the layout of the rotary
pairs in the query and key heads: Meta's files have them interleaved, Hugging Face's as halves, as megacore has.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from megacore import ModelConfig
from megacore.weights import WeightMap, grouped_qkv_rows, meta_map, standard_hf_map
from megacore.weights.formats.megatron_llm.weight_map import gated_weight_map, interleaved_qkv_rows

WEIGHT_MAPS: dict[str, Callable[[ModelConfig], WeightMap]] = {
    "hf": standard_hf_map,
    "meta": meta_map,
    "megatron-llm": gated_weight_map,
}

QKV_ROWS: dict[str, Callable[[ModelConfig], Sequence[int]]] = {
    "hf": grouped_qkv_rows,
    "meta": partial(grouped_qkv_rows, interleaved=True),
    "megatron-llm": interleaved_qkv_rows,
}
