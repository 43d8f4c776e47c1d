"""The published sizes of Falcon, in billions of parameters. Dimensions are those of each ``config.json`` on the hub."""

from __future__ import annotations

from typing import Any

_COMMON = {"vocab_size": 65024, "max_position_embeddings": 2048, "norm_eps": 1e-5, "norm": "layernorm"}
_EARLY = {"activation": "gelu", "tie_embeddings": True, "parallel_attention": True}


def _falcon(**sizes: Any) -> dict[str, Any]:
    return {**_COMMON, **_EARLY, "ffn_hidden_size": 4 * sizes["hidden_size"], **sizes}


PRESETS = {
    # falcon-rw-1b: linear biases on the attention, biases everywhere, attention and MLP one after the other
    "1": _falcon(
        num_layers=24,
        hidden_size=2048,
        num_attention_heads=32,
        num_kv_heads=32,
        head_dim=64,
        vocab_size=50304,
        position_embedding="alibi",
        qkv_bias=True,
        attention_output_bias=True,
        mlp_bias=True,
        new_decoder_architecture=False,
        parallel_attention=False,
        num_layer_norms=2,
    ),
    "7": _falcon(
        num_layers=32,
        hidden_size=4544,
        num_attention_heads=71,
        num_kv_heads=1,
        head_dim=64,
        new_decoder_architecture=False,
        num_layer_norms=1,
    ),
    # Falcon2-11B
    "11": _falcon(
        num_layers=60,
        hidden_size=4096,
        num_attention_heads=32,
        num_kv_heads=8,
        head_dim=128,
        max_position_embeddings=8192,
        rope_theta=500042.0,
        tie_embeddings=False,
        new_decoder_architecture=True,
        num_layer_norms=1,
    ),
    "40": _falcon(
        num_layers=60,
        hidden_size=8192,
        num_attention_heads=128,
        num_kv_heads=8,
        head_dim=64,
        new_decoder_architecture=True,
        num_layer_norms=2,
    ),
    "180": _falcon(
        num_layers=80,
        hidden_size=14848,
        num_attention_heads=232,
        num_kv_heads=8,
        head_dim=64,
        new_decoder_architecture=True,
        num_layer_norms=2,
    ),
}

HUB = {
    "1": "tiiuae/falcon-rw-1b",
    "7": "tiiuae/falcon-7b",
    "11": "tiiuae/falcon-11B",
    "40": "tiiuae/falcon-40b",
    "180": "tiiuae/falcon-180B",  # gated
}
"""The repository of each size on the hub."""
