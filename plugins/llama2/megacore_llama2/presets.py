"""The published sizes of Llama 2 and Code Llama, in billions of parameters, as each configuration file has them."""

from __future__ import annotations

from typing import Any


def _llama2(*, layers: int, hidden: int, ffn: int, heads: int, kv_heads: int, **settings: Any) -> dict[str, Any]:
    return {
        "num_layers": layers,
        "hidden_size": hidden,
        "ffn_hidden_size": ffn,
        "num_attention_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": 128,
        "vocab_size": 32000,
        "max_position_embeddings": 4096,
        "norm_eps": 1e-5,
        **settings,
    }


def _codellama(*, vocab: int, **sizes: int) -> dict[str, Any]:
    return _llama2(**sizes, vocab_size=vocab, max_position_embeddings=16384, rope_theta=1e6)


LLAMA2 = {
    "7": _llama2(layers=32, hidden=4096, ffn=11008, heads=32, kv_heads=32),
    "13": _llama2(layers=40, hidden=5120, ffn=13824, heads=40, kv_heads=40),
    "70": _llama2(layers=80, hidden=8192, ffn=28672, heads=64, kv_heads=8),
}

CODELLAMA = {
    # The base and instruct models. The Python models have no infilling, and a vocabulary of 32000.
    "7": _codellama(layers=32, hidden=4096, ffn=11008, heads=32, kv_heads=32, vocab=32016),
    "13": _codellama(layers=40, hidden=5120, ffn=13824, heads=40, kv_heads=40, vocab=32016),
    "34": _codellama(layers=48, hidden=8192, ffn=22016, heads=64, kv_heads=8, vocab=32000),
    "70": _codellama(layers=80, hidden=8192, ffn=28672, heads=64, kv_heads=8, vocab=32016),
}

LLAMA2_HUB = {size: f"meta-llama/Llama-2-{size}b-hf" for size in LLAMA2}
CODELLAMA_HUB = {size: f"codellama/CodeLlama-{size}b-hf" for size in CODELLAMA}
"""The repository of each size on the hub, in the Hugging Face format; Llama 2 requires accepting Meta's licence."""
