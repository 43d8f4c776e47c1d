"""Which tensors of a published Falcon are which of megacore's parameters."""

from __future__ import annotations

from megacore.weights import Copy, FusedQKV, Rule, WeightMap
from megacore_falcon.config import FalconConfig


def hf_weight_map(config: FalconConfig) -> WeightMap:
    """The map of the Hugging Face format."""
    rules: list[Rule] = [
        Copy("embedding.word_embeddings.weight", "transformer.word_embeddings.weight"),
        FusedQKV(
            "decoder.layers.*.self_attention.linear_qkv.weight",
            qkv="transformer.h.*.self_attention.query_key_value.weight",
        ),
        Copy("decoder.layers.*.self_attention.linear_proj.weight", "transformer.h.*.self_attention.dense.weight"),
        Copy("decoder.layers.*.mlp.linear_fc1.weight", "transformer.h.*.mlp.dense_h_to_4h.weight"),
        Copy("decoder.layers.*.mlp.linear_fc2.weight", "transformer.h.*.mlp.dense_4h_to_h.weight"),
        Copy("decoder.final_layernorm.weight", "transformer.ln_f.weight"),
        Copy("decoder.final_layernorm.bias", "transformer.ln_f.bias"),
    ]
    for native, published in _norms(config).items():
        rules.append(Copy(f"decoder.layers.*.{native}.weight", f"transformer.h.*.{published}.weight"))
        rules.append(Copy(f"decoder.layers.*.{native}.bias", f"transformer.h.*.{published}.bias"))
    if not config.tie_embeddings:
        rules.append(Copy("output_layer.weight", "lm_head.weight"))
    if config.qkv_bias:
        rules += [
            FusedQKV(
                "decoder.layers.*.self_attention.linear_qkv.bias",
                qkv="transformer.h.*.self_attention.query_key_value.bias",
            ),
            Copy("decoder.layers.*.self_attention.linear_proj.bias", "transformer.h.*.self_attention.dense.bias"),
            Copy("decoder.layers.*.mlp.linear_fc1.bias", "transformer.h.*.mlp.dense_h_to_4h.bias"),
            Copy("decoder.layers.*.mlp.linear_fc2.bias", "transformer.h.*.mlp.dense_4h_to_h.bias"),
        ]
    return WeightMap(
        *rules,
        ignored=("transformer.h.*.self_attention.*rotary*.inv_freq",),  # a table that older checkpoints carry
        aliases={"lm_head.weight": "transformer.word_embeddings.weight"} if config.tie_embeddings else {},
    )


def _norms(config: FalconConfig) -> dict[str, str]:
    """What each norm of a layer is called in the published format."""
    if config.num_layer_norms == 1:
        return {"input_layernorm": "input_layernorm"}
    if config.parallel_attention:
        return {"input_layernorm": "ln_attn", "pre_mlp_layernorm": "ln_mlp"}
    return {"input_layernorm": "input_layernorm", "pre_mlp_layernorm": "post_attention_layernorm"}
