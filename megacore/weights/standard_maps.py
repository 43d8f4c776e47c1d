"""The names that most decoders' tensors have in the published formats: the maps of any family that follows them.

A family that deviates writes its own map; these are for the many that do not.
"""

from __future__ import annotations

from megacore.config import ModelConfig
from megacore.weights.meta_config import check_expressible
from megacore.weights.rules import Copy, FusedQKV, Rule, Stacked, WeightMap


def standard_hf_map(config: ModelConfig) -> WeightMap:
    """The map of the Hugging Face format, for layers of two norms, separate query, key and value, and a gated MLP."""
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
        rules.append(
            FusedQKV(
                "decoder.layers.*.self_attention.linear_qkv.bias",
                q="model.layers.*.self_attn.q_proj.bias",
                k="model.layers.*.self_attn.k_proj.bias",
                v="model.layers.*.self_attn.v_proj.bias",
            )
        )
    if config.attention_output_bias:
        rules.append(Copy("decoder.layers.*.self_attention.linear_proj.bias", "model.layers.*.self_attn.o_proj.bias"))
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


def meta_map(config: ModelConfig) -> WeightMap:
    """The map of Meta's format, whose rotary pairs are interleaved (see :func:`megacore.weights.grouped_qkv_rows`).

    Raises:
        ConfigError: when the model has something that the format cannot say.
    """
    check_expressible(config)
    return WeightMap(
        Copy("embedding.word_embeddings.weight", "tok_embeddings.weight"),
        Copy("decoder.layers.*.input_layernorm.weight", "layers.*.attention_norm.weight"),
        FusedQKV(
            "decoder.layers.*.self_attention.linear_qkv.weight",
            q="layers.*.attention.wq.weight",
            k="layers.*.attention.wk.weight",
            v="layers.*.attention.wv.weight",
        ),
        Copy("decoder.layers.*.self_attention.linear_proj.weight", "layers.*.attention.wo.weight"),
        Copy("decoder.layers.*.pre_mlp_layernorm.weight", "layers.*.ffn_norm.weight"),
        Stacked(
            "decoder.layers.*.mlp.linear_fc1.weight",
            gate="layers.*.feed_forward.w1.weight",
            up="layers.*.feed_forward.w3.weight",
        ),
        Copy("decoder.layers.*.mlp.linear_fc2.weight", "layers.*.feed_forward.w2.weight"),
        Copy("decoder.final_layernorm.weight", "norm.weight"),
        Copy("output_layer.weight", "output.weight"),
        ignored=("rope.freqs", "layers.*.attention.inner_attention.rope.freqs"),  # tables that older files carry
    )
