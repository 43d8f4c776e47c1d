"""Which tensors of a published Llama are which of megacore's parameters."""

from __future__ import annotations

from megacore import ModelConfig
from megacore.weights import Copy, FusedQKV, Rule, Stacked, WeightMap


def hf_weight_map(config: ModelConfig) -> WeightMap:
    """The map of the Hugging Face format."""
    rules: list[Rule] = [
        Copy("embedding.word_embeddings.weight", "model.embed_tokens.weight"),
        Copy("decoder.layers.*.input_layernorm.weight", "model.layers.*.input_layernorm.weight"),
        FusedQKV(
            "decoder.layers.*.self_attention.linear_qkv.weight",
            q="model.layers.*.self_attn.q_proj.weight",
            k="model.layers.*.self_attn.k_proj.weight",
            v="model.layers.*.self_attn.v_proj.weight",
        ),
        Copy("decoder.layers.*.self_attention.linear_proj.weight", "model.layers.*.self_attn.o_proj.weight"),
        Copy("decoder.layers.*.pre_mlp_layernorm.weight", "model.layers.*.post_attention_layernorm.weight"),
        Stacked(
            "decoder.layers.*.mlp.linear_fc1.weight",
            gate="model.layers.*.mlp.gate_proj.weight",
            up="model.layers.*.mlp.up_proj.weight",
        ),
        Copy("decoder.layers.*.mlp.linear_fc2.weight", "model.layers.*.mlp.down_proj.weight"),
        Copy("decoder.final_layernorm.weight", "model.norm.weight"),
    ]
    if not config.tie_embeddings:
        rules.append(Copy("output_layer.weight", "lm_head.weight"))
    if config.qkv_bias:
        rules += [
            FusedQKV(
                "decoder.layers.*.self_attention.linear_qkv.bias",
                q="model.layers.*.self_attn.q_proj.bias",
                k="model.layers.*.self_attn.k_proj.bias",
                v="model.layers.*.self_attn.v_proj.bias",
            ),
            Copy("decoder.layers.*.self_attention.linear_proj.bias", "model.layers.*.self_attn.o_proj.bias"),
        ]
    if config.mlp_bias:
        rules += [
            Stacked(
                "decoder.layers.*.mlp.linear_fc1.bias",
                gate="model.layers.*.mlp.gate_proj.bias",
                up="model.layers.*.mlp.up_proj.bias",
            ),
            Copy("decoder.layers.*.mlp.linear_fc2.bias", "model.layers.*.mlp.down_proj.bias"),
        ]
    return WeightMap(
        *rules,
        ignored=("model.layers.*.self_attn.rotary_emb.inv_freq",),  # a table that older checkpoints carry
        aliases={"lm_head.weight": "model.embed_tokens.weight"} if config.tie_embeddings else {},
    )
