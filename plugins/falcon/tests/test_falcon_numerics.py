"""A converted Falcon computes what transformers computes: logits, gradients, linear biases, rotary embeddings."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from torch.testing import assert_close
from transformers import FalconForCausalLM
from transformers.models.falcon.modeling_falcon import build_alibi_tensor

from megacore.model.alibi import alibi_mask, alibi_slopes
from megacore.plugins import get_family
from megacore_falcon import config_from_source

FP32 = {"rtol": 1.3e-6, "atol": 1e-5}

FP64 = {"rtol": 1e-11, "atol": 1e-11}


def token_ids(*shape: int) -> Tensor:
    return torch.randint(0, 99, shape, generator=torch.Generator().manual_seed(1))


def of_order_1(logits: Tensor) -> Tensor:
    """An absolute bound says something only of numbers of its own size."""
    assert 0.3 < logits.std() < 3
    return logits


def by_published_names(parameters: dict[str, Tensor], config: Any) -> dict[str, Tensor]:
    """Our parameters (or their gradients) under transformers' names and in its shapes, written down here by hand."""
    once = {
        "embedding.word_embeddings.weight": "transformer.word_embeddings.weight",
        "decoder.final_layernorm.weight": "transformer.ln_f.weight",
        "decoder.final_layernorm.bias": "transformer.ln_f.bias",
        "output_layer.weight": "lm_head.weight",
    }
    in_a_layer = {
        "self_attention.linear_qkv": "self_attention.query_key_value",
        "self_attention.linear_proj": "self_attention.dense",
        "mlp.linear_fc1": "mlp.dense_h_to_4h",
        "mlp.linear_fc2": "mlp.dense_4h_to_h",
    }
    if not config.parallel_attn:
        in_a_layer |= {"input_layernorm": "input_layernorm", "pre_mlp_layernorm": "post_attention_layernorm"}
    elif config.new_decoder_architecture and config.num_ln_in_parallel_attn != 1:
        in_a_layer |= {"input_layernorm": "ln_attn", "pre_mlp_layernorm": "ln_mlp"}
    else:
        in_a_layer |= {"input_layernorm": "input_layernorm"}
    result = {}
    for name, value in parameters.items():
        if name in once:
            result[once[name]] = value
            continue
        _, _, layer, *module, kind = name.split(".")
        if "linear_qkv" in module:
            value = value.flatten(0, 1)  # of each group the query heads, the key, the value
        elif "linear_proj" in module and kind == "weight":
            value = value.flatten(1)
        result[f"transformer.h.{layer}.{in_a_layer['.'.join(module)]}.{kind}"] = value
    return result


# Logits and gradients


@torch.no_grad()
def test_logits_are_those_of_transformers(publish, convert_and_load, shape):
    published = publish(**shape)
    input_ids = token_ids(2, 40)

    ours = convert_and_load(published)(input_ids)

    assert_close(ours, of_order_1(published.model(input_ids).logits), **FP32)


@torch.no_grad()
def test_logits_are_those_of_transformers_in_float64(publish, convert_and_load, shape):
    published = publish(dtype=torch.float64, **shape)
    input_ids = token_ids(2, 40)

    ours = convert_and_load(published, torch.float64)(input_ids)

    assert ours.dtype == torch.float64
    assert_close(ours, of_order_1(published.model(input_ids).logits), **FP64)


@pytest.mark.parametrize("dtype, bounds", [(torch.float32, FP32), (torch.float64, FP64)], ids=["fp32", "fp64"])
def test_gradients_are_those_of_autograd_through_transformers(publish, convert_and_load, shape, dtype, bounds):
    published = publish(dtype=dtype, **shape)
    tokens = token_ids(2, 41)
    input_ids, targets = tokens[:, :-1], tokens[:, 1:]
    ours = convert_and_load(published, dtype)

    F.cross_entropy(published.model(input_ids).logits.flatten(0, 1), targets.flatten(), reduction="sum").backward()
    ours(input_ids, targets=targets, token_weights=torch.ones(targets.shape, dtype=dtype)).backward()

    gradients = by_published_names(
        {name: parameter.grad for name, parameter in ours.named_parameters()}, published.model.config
    )
    expected = {name: parameter.grad for name, parameter in published.model.named_parameters()}
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        scale = gradient.abs().max()
        assert scale > 1e-3, f"{name} has nothing to compare"
        assert_close(gradients[name] / scale, gradient / scale, **bounds, msg=lambda text, name=name: f"{name}: {text}")


@torch.no_grad()
@pytest.mark.parametrize("activation", ["gelu", "gelu_pytorch_tanh", "relu", "silu"])
def test_every_activation_that_is_read_is_the_one_of_transformers(publish, convert_and_load, shapes, activation):
    published = publish(**shapes["7B: multi-query, one norm, parallel"] | {"activation": activation})
    input_ids = token_ids(2, 20)

    assert_close(convert_and_load(published)(input_ids), of_order_1(published.model(input_ids).logits), **FP32)


@torch.no_grad()
@pytest.mark.parametrize("eps", [1e-6, 1e-2, 0.5])
def test_the_norms_have_the_eps_of_the_configuration(publish, convert_and_load, shapes, eps):
    published = publish(**shapes["40B: grouped, two norms, parallel"] | {"layer_norm_epsilon": eps})
    input_ids = token_ids(2, 20)

    assert_close(convert_and_load(published)(input_ids), of_order_1(published.model(input_ids).logits), **FP32)


@torch.no_grad()
@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 500042.0},
        {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
        {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 3.0},
        {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16},
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_logits_are_those_of_transformers_with_every_rotary_embedding(publish, convert_and_load, shapes, rope):
    published = publish(**shapes["11B: grouped, one norm, untied"] | {"rope_parameters": rope})
    input_ids = token_ids(1, 100)

    assert_close(convert_and_load(published)(input_ids), of_order_1(published.model(input_ids).logits), **FP32)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("name", ["40B: grouped, two norms, parallel", "RW, 6 heads of 10"])
def test_in_16_bit_logits_stay_as_close_to_fp32_as_those_of_transformers(
    publish, convert_and_load, shapes, dtype, name
):
    published = publish(dtype=dtype, **shapes[name])
    input_ids = token_ids(2, 40)
    theirs = published.model(input_ids).logits.float()
    exact = published.model.float()(input_ids).logits

    ours = convert_and_load(published, dtype)(input_ids)

    assert ours.dtype == dtype
    assert (ours - exact).abs().mean() < 1.2 * (theirs - exact).abs().mean()


# Attention with linear biases


@pytest.mark.parametrize("num_heads", [1, 2, 3, 5, 6, 7, 8, 12, 16, 24, 31, 32, 48, 64, 71, 100, 128, 232])
def test_slopes_are_those_of_transformers_in_bfloat16(num_heads):
    theirs = build_alibi_tensor(torch.ones(1, 2, dtype=torch.long), num_heads, torch.float32)

    assert torch.equal(alibi_slopes(num_heads).bfloat16().float(), theirs[:, 0, 1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("num_heads", [8, 7])
@pytest.mark.parametrize("head_dim, ulps", [(64, 0), (10, 1)])  # every published model with linear biases has 64
def test_biases_are_those_of_transformers_at_1000_positions(num_heads, head_dim, ulps, dtype):
    # bfloat16 has no 257: beyond position 256 its rounding is part of what the models were trained with
    theirs = build_alibi_tensor(torch.ones(1, 1000, dtype=torch.long), num_heads, dtype) / math.sqrt(head_dim)

    ours = alibi_mask(alibi_slopes(num_heads), 1000, head_dim**-0.5, device=torch.device("cpu"), dtype=dtype)

    assert ours.dtype == dtype
    assert ours.shape == (num_heads, 1000, 1000)
    assert_close(ours[:, -1:], theirs, rtol=ulps * torch.finfo(dtype).eps, atol=0)
    assert_close(ours[:, 299, :300], theirs[:, 0, :300], rtol=ulps * torch.finfo(dtype).eps, atol=0)
    assert torch.isneginf(ours[:, 299, 300:]).all()


@torch.no_grad()
@pytest.mark.parametrize("name", ["RW: ALiBi, biases, multi-head, sequential", "RW, 7 heads"])
def test_logits_with_linear_biases_are_those_of_transformers_at_300_positions(publish, convert_and_load, shapes, name):
    published = publish(**shapes[name] | {"max_position_embeddings": 512})
    input_ids = token_ids(1, 300)

    ours = convert_and_load(published)(input_ids)

    assert_close(ours, of_order_1(published.model(input_ids).logits), **FP32)


@torch.no_grad()
def test_a_slope_that_is_off_by_its_last_bit_shows_in_the_logits(publish, convert_and_load, shapes, monkeypatch):
    # so that the tests above would notice another rounding
    published = publish(**shapes["RW, 7 heads"] | {"max_position_embeddings": 512})
    input_ids = token_ids(1, 300)
    ours = convert_and_load(published)

    slopes = alibi_slopes(7)
    slopes[4] *= 1 + torch.finfo(torch.bfloat16).eps
    monkeypatch.setattr("megacore.model.positions.alibi_slopes", lambda num_heads: slopes)

    assert (ours(input_ids) - published.model(input_ids).logits).abs().max() > 1e-4


@torch.no_grad()
def test_the_eager_attention_of_transformers_adds_linear_biases_twice(publish, shapes):
    # That is why the plugin's reference does without it. FalconModel.forward puts the biases into the causal mask,
    # whatever the attention, and FalconAttention adds them to the scores once more unless it uses torch's own. Seen in
    # transformers 5.23: when it is mended, this test fails, and the reference can be "eager" as other families' are.
    published = publish(**shapes["RW: ALiBi, biases, multi-head, sequential"])
    input_ids = token_ids(1, 40)
    eager = FalconForCausalLM.from_pretrained(published.directory, attn_implementation="eager")

    hidden, once = first_attention(published.model, input_ids)
    _, twice = first_attention(eager, input_ids)

    attention = published.model.transformer.h[0].self_attention
    assert_close(once, alibi_attention(attention, hidden, times=1), **FP32)
    assert_close(twice, alibi_attention(attention, hidden, times=2), **FP32)
    assert (published.model(input_ids).logits - eager(input_ids).logits).abs().max() > 0.1


def first_attention(model: FalconForCausalLM, input_ids: Tensor) -> tuple[Tensor, Tensor]:
    """What goes into the attention of the first layer, and what comes out of it."""
    seen: list[Tensor] = []
    handle = model.transformer.h[0].self_attention.register_forward_hook(
        lambda module, inputs, output: seen.extend((inputs[0], output[0]))
    )
    model(input_ids)
    handle.remove()
    return seen[0], seen[1]


def alibi_attention(attention: Any, hidden: Tensor, *, times: int) -> Tensor:
    """Press, Smith and Lewis' attention with biases that are ``times`` as large, with the weights of ``attention``."""
    heads, head_dim = attention.num_heads, attention.head_dim
    fused = attention.query_key_value(hidden).unflatten(-1, (heads, 3, head_dim))
    query, key, value = (part.transpose(1, 2) for part in fused.unbind(-2))
    length = hidden.shape[1]
    slopes = torch.tensor([2 ** (-8 * (head + 1) / heads) for head in range(heads)])
    distance = torch.arange(length)[None, :] - torch.arange(length)[:, None]
    scores = query @ key.mT + times * slopes[:, None, None] * distance
    scores = (scores / math.sqrt(head_dim)).masked_fill(distance > 0, -math.inf)
    return attention.dense((scores.softmax(-1) @ value).transpose(1, 2).flatten(2))


# The reference that the plugin names


@torch.no_grad()
def test_the_reference_is_the_published_model(publish, shape):
    published = publish(**shape)
    input_ids = token_ids(2, 20)
    config = config_from_source(published.model.config.to_dict(), "hf")

    reference = get_family("falcon").load_reference(config, published.directory, torch.float32, torch.device("cpu"))

    assert torch.equal(reference(input_ids), published.model(input_ids).logits)


@torch.no_grad()
def test_a_reference_without_a_path_has_random_weights_of_the_same_shapes(publish, shape):
    published = publish(**shape)
    config = config_from_source(published.model.config.to_dict(), "hf")

    reference = get_family("falcon").load_reference(config, None, torch.float32, torch.device("cpu"))

    assert reference(token_ids(2, 20)).shape == (2, 20, 99)
    assert {name: parameter.shape for name, parameter in reference.model.named_parameters()} == {
        name: parameter.shape for name, parameter in published.model.named_parameters()
    }
