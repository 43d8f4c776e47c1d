"""The published sizes of Llama, in billions of parameters. Dimensions are those of each ``params.json``."""

from __future__ import annotations

from typing import Any


def _llama(*, layers: int, hidden: int, ffn: int, heads: int, eps: float) -> dict[str, Any]:
    return {
        "num_layers": layers,
        "hidden_size": hidden,
        "ffn_hidden_size": ffn,
        "num_attention_heads": heads,
        "num_kv_heads": heads,
        "head_dim": 128,
        "vocab_size": 32000,
        "max_position_embeddings": 2048,
        "norm_eps": eps,
    }


PRESETS = {
    "7": _llama(layers=32, hidden=4096, ffn=11008, heads=32, eps=1e-6),
    "13": _llama(layers=40, hidden=5120, ffn=13824, heads=40, eps=1e-6),
    "30": _llama(layers=60, hidden=6656, ffn=17920, heads=52, eps=1e-6),
    "65": _llama(layers=80, hidden=8192, ffn=22016, heads=64, eps=1e-5),
}
