"""A converted Llama computes what transformers computes: logits, gradients, every kind of rotary embedding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding

from megacore.checkpoint import Checkpoint
from megacore.errors import ConfigError
from megacore.model import DecoderModel, inverse_frequencies, load_model
from megacore.parallel import ParallelContext
from megacore.weights import convert
from megacore_llama import LLAMA

FP32 = {"rtol": 1.3e-6, "atol": 1e-5}

FP64 = {"rtol": 1e-11, "atol": 1e-11}  # with everything in transformers in float64 too


@pytest.fixture
def convert_and_load(tmp_path):
    """Our model of a published directory, through a native checkpoint."""

    def load(published, dtype=torch.float32) -> DecoderModel:
        convert("llama", published.directory, tmp_path / "ckpt")
        return load_model(Checkpoint(tmp_path / "ckpt"), ParallelContext.single(), dtype=dtype)

    return load


def token_ids(*shape: int) -> Tensor:
    return torch.randint(0, 99, shape, generator=torch.Generator().manual_seed(1))


def all_in_float64(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """transformers computes norms and softmax in float32 whatever the dtype; torch's own do not."""
    model.set_attn_implementation("sdpa")
    for name, module in list(model.named_modules()):
        if isinstance(module, LlamaRMSNorm):
            norm = torch.nn.RMSNorm(module.weight.shape, eps=module.variance_epsilon)
            norm.weight = module.weight
            model.set_submodule(name, norm)
    return model


def of_order_1(logits: Tensor) -> Tensor:
    """An absolute bound says something only of numbers of its own size."""
    assert 0.3 < logits.std() < 3
    return logits


def by_published_names(parameters: dict[str, Tensor], *, queries_per_kv: int, head_dim: int) -> dict[str, Tensor]:
    """Our parameters (or their gradients) cut up into transformers' own, written down here by hand."""
    result = {}
    for name, value in parameters.items():
        if not name.startswith("decoder.layers."):
            result[
                {
                    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
                    "decoder.final_layernorm.weight": "model.norm.weight",
                    "output_layer.weight": "lm_head.weight",
                }[name]
            ] = value
            continue
        _, _, layer, module, *_, kind = name.split(".")
        prefix = f"model.layers.{layer}"
        if "linear_qkv" in name:
            groups, rows, *columns = value.shape
            assert rows == (queries_per_kv + 2) * head_dim
            heads = value.view(groups, queries_per_kv + 2, head_dim, *columns)
            result[f"{prefix}.self_attn.q_proj.{kind}"] = heads[:, :queries_per_kv].reshape(-1, *columns)
            result[f"{prefix}.self_attn.k_proj.{kind}"] = heads[:, queries_per_kv].reshape(-1, *columns)
            result[f"{prefix}.self_attn.v_proj.{kind}"] = heads[:, queries_per_kv + 1].reshape(-1, *columns)
        elif "linear_proj" in name:
            result[f"{prefix}.self_attn.o_proj.{kind}"] = value.flatten(1) if kind == "weight" else value
        elif "linear_fc1" in name:
            result[f"{prefix}.mlp.gate_proj.{kind}"], result[f"{prefix}.mlp.up_proj.{kind}"] = value
        elif "linear_fc2" in name:
            result[f"{prefix}.mlp.down_proj.{kind}"] = value
        else:
            theirs = {"input_layernorm": "input_layernorm", "pre_mlp_layernorm": "post_attention_layernorm"}[module]
            result[f"{prefix}.{theirs}.{kind}"] = value
    return result


# Logits and gradients


def test_logits_are_those_of_transformers(publish, convert_and_load, shape):
    published = publish(**shape)
    input_ids = token_ids(2, 40)

    ours = convert_and_load(published)(input_ids)

    assert_close(ours, of_order_1(published.model(input_ids).logits), **FP32)


def test_logits_are_those_of_transformers_in_float64(publish, convert_and_load, shape):
    published = publish(dtype=torch.float64, **shape)
    input_ids = token_ids(2, 40)

    ours = convert_and_load(published, torch.float64)(input_ids)

    assert ours.dtype == torch.float64
    assert_close(ours, of_order_1(all_in_float64(published.model)(input_ids).logits), **FP64)


@pytest.mark.parametrize("dtype, bounds", [(torch.float32, FP32), (torch.float64, FP64)], ids=["fp32", "fp64"])
def test_gradients_are_those_of_autograd_through_transformers(publish, convert_and_load, shape, dtype, bounds):
    published = publish(dtype=dtype, **shape)
    tokens = token_ids(2, 41)
    input_ids, targets = tokens[:, :-1], tokens[:, 1:]
    theirs = published.model if dtype == torch.float32 else all_in_float64(published.model)
    ours = convert_and_load(published, dtype)

    F.cross_entropy(theirs(input_ids).logits.flatten(0, 1), targets.flatten(), reduction="sum").backward()
    ours(input_ids, targets=targets, token_weights=torch.ones(targets.shape, dtype=dtype)).backward()

    gradients = by_published_names(
        {name: parameter.grad for name, parameter in ours.named_parameters()},
        queries_per_kv=ours.config.queries_per_kv,
        head_dim=ours.config.head_dim,
    )
    expected = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        scale = gradient.abs().max()
        assert scale > 1e-3, f"{name} has nothing to compare"
        assert_close(gradients[name] / scale, gradient / scale, **bounds, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("activation", ["silu", "swish", "gelu", "gelu_pytorch_tanh", "relu"])
def test_every_activation_that_is_read_is_the_one_of_transformers(publish, convert_and_load, shapes, activation):
    published = publish(**shapes["multi-head"] | {"hidden_act": activation, "num_hidden_layers": 2})
    input_ids = token_ids(2, 20)

    assert_close(convert_and_load(published)(input_ids), of_order_1(published.model(input_ids).logits), **FP32)


@pytest.mark.parametrize("eps", [1e-6, 1e-2, 0.5])
def test_the_norm_has_the_eps_of_the_configuration(publish, convert_and_load, shapes, eps):
    published = publish(**shapes["multi-head"] | {"rms_norm_eps": eps, "num_hidden_layers": 2})
    input_ids = token_ids(2, 20)

    assert_close(convert_and_load(published)(input_ids), of_order_1(published.model(input_ids).logits), **FP32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_in_16_bit_logits_stay_as_close_to_fp32_as_those_of_transformers(publish, convert_and_load, shapes, dtype):
    published = publish(dtype=dtype, **shapes["3 key-value heads, tied"])
    input_ids = token_ids(2, 40)
    theirs = published.model(input_ids).logits.float()
    exact = published.model.float()(input_ids).logits

    ours = convert_and_load(published, dtype)(input_ids)

    assert ours.dtype == dtype
    assert (ours - exact).abs().mean() < 1.2 * (theirs - exact).abs().mean()


# Rotary position embedding

ROTARY: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "another theta": {"rope_type": "default", "rope_theta": 1234.5},
    "a large theta": {"rope_type": "default", "rope_theta": 1e6},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 3.0},
    "yarn": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16},
    "yarn of the whole context": {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0},
    "yarn, betas": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "original_max_position_embeddings": 256,
        "beta_fast": 6.0,
        "beta_slow": 2,
    },
    "yarn, not truncated": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "original_max_position_embeddings": 256,
        "beta_fast": 6.0,
        "beta_slow": 2,
        "truncate": False,
    },
    "yarn, mscale": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 40.0,
        "original_max_position_embeddings": 16,
        "mscale": 0.707,
        "mscale_all_dim": 1.2,
    },
    "yarn, mscale without mscale_all_dim": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 40.0,
        "original_max_position_embeddings": 16,
        "mscale": 0.707,
    },
    "yarn, attention_factor": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "attention_factor": 1.3,
        "mscale": 0.7,
        "mscale_all_dim": 1.2,
    },
    "yarn, factor 1": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 1.0,
        "original_max_position_embeddings": 64,
    },
    "yarn, a ramp of no width": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 6,
    },
    "yarn, an original context of next to nothing": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 2,
    },
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "llama3, other bands": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "low_freq_factor": 2.0,
        "high_freq_factor": 20.0,
        "original_max_position_embeddings": 512,
    },
}

CHANGED_BY = {
    "yarn, betas": "yarn, not truncated",
    "yarn, mscale": "yarn, mscale without mscale_all_dim",
    "default": "linear",
}
"""Settings that must not amount to the same, or a test of one would not be a test of the other."""

WIDE = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32, "num_hidden_layers": 2}


@pytest.fixture(params=ROTARY)
def rope(request) -> dict[str, Any]:
    return dict(ROTARY[request.param])


def in_old_spelling(rope: dict[str, Any]) -> dict[str, Any]:
    """As transformers 4 writes it: the base on its own, the rest under ``rope_scaling``."""
    rope = dict(rope)
    return {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope if rope["rope_type"] != "default" else None}


def rotary_of_transformers(settings: dict[str, Any], sequence_length: int) -> tuple[Tensor, float]:
    """Inverse frequencies and amplitude of transformers' own module, when it has met a sequence of that length."""
    rotary = LlamaRotaryEmbedding(LlamaConfig(**settings))
    rotary(torch.zeros(1), torch.arange(sequence_length).unsqueeze(0))
    return rotary.inv_freq, rotary.attention_scaling


@pytest.mark.parametrize("sequence_length", [20, 64, 100], ids="sequence of {}".format)
def test_inverse_frequencies_are_those_of_transformers(shapes, rope, sequence_length):
    settings = shapes["multi-head"] | WIDE | {"rope_parameters": rope}
    config = LLAMA.config_from_source(LlamaConfig(**settings).to_dict(), "hf")

    frequencies, amplitude = inverse_frequencies(config, sequence_length)

    expected_frequencies, expected_amplitude = rotary_of_transformers(settings, sequence_length)
    assert frequencies.dtype == torch.float32
    assert_close(frequencies, expected_frequencies, rtol=1e-6, atol=0)
    assert amplitude == pytest.approx(expected_amplitude, rel=1e-12)


@pytest.mark.parametrize("sequence_length", [40, 100], ids="sequence of {}".format)
def test_logits_are_those_of_transformers_with_every_rotary_embedding(
    publish, convert_and_load, shapes, rope, sequence_length
):
    published = publish(**shapes["multi-head"] | WIDE | {"rope_parameters": rope})
    input_ids = token_ids(1, sequence_length)

    ours = convert_and_load(published)(input_ids)

    assert_close(ours, of_order_1(published.model(input_ids).logits), **FP32)


@pytest.mark.parametrize("one, other", CHANGED_BY.items())
def test_rotary_settings_that_are_tested_apart_differ(shapes, one, other):
    (frequencies, amplitude), (other_frequencies, other_amplitude) = (
        rotary_of_transformers(shapes["multi-head"] | WIDE | {"rope_parameters": dict(ROTARY[name])}, 100)
        for name in (one, other)
    )

    assert not torch.equal(frequencies, other_frequencies) or amplitude != other_amplitude


def test_dynamic_scaling_begins_after_the_length_that_the_model_was_trained_on(shapes):
    settings = shapes["multi-head"] | WIDE | {"rope_parameters": dict(ROTARY["dynamic"])}
    config = LLAMA.config_from_source(LlamaConfig(**settings).to_dict(), "hf")
    default, _ = rotary_of_transformers(settings | {"rope_parameters": None}, 64)

    assert_close(inverse_frequencies(config, 64)[0], default, rtol=1e-6, atol=0)
    assert inverse_frequencies(config, 65)[0][-1] < default[-1]


def test_both_spellings_of_the_rotary_settings_are_read_alike(shapes, rope):
    settings = shapes["multi-head"] | WIDE
    old, new = settings | in_old_spelling(rope), settings | {"rope_parameters": rope}
    assert LlamaConfig(**old).rope_parameters == LlamaConfig(**new).rope_parameters

    assert LLAMA.config_from_source(old, "hf") == LLAMA.config_from_source(new, "hf")


def test_the_oldest_spelling_of_the_method_is_read(shapes):
    settings = shapes["multi-head"] | {"rope_scaling": {"type": "linear", "factor": 4.0}}

    frequencies, _ = inverse_frequencies(LLAMA.config_from_source(settings, "hf"), 40)

    assert_close(frequencies, rotary_of_transformers(settings, 40)[0], rtol=1e-6, atol=0)


def test_a_configuration_without_rotary_settings_has_those_of_transformers(shapes):
    settings = dict(shapes["multi-head"])

    frequencies, _ = inverse_frequencies(LLAMA.config_from_source(settings, "hf"), 40)

    assert_close(frequencies, rotary_of_transformers(settings, 40)[0], rtol=1e-6, atol=0)


def test_the_original_context_beside_the_rotary_settings_counts_more_than_the_one_in_them(shapes):
    # as transformers has it
    settings = shapes["multi-head"] | WIDE | {"rope_parameters": dict(ROTARY["yarn, betas"])}
    settings["original_max_position_embeddings"] = 32

    frequencies, _ = inverse_frequencies(LLAMA.config_from_source(settings, "hf"), 40)

    assert_close(frequencies, rotary_of_transformers(settings, 40)[0], rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "change, named",
    [
        ({"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}}, "'longrope'"),
        ({"rope_scaling": {"type": "su", "factor": 2.0}, "rope_theta": 1e4}, "'su'"),
        ({"rope_parameters": {"rope_type": "proportional", "rope_theta": 1e4}}, "'proportional'"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "of_tomorrow": 1}}, "of_tomorrow"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5"),
        ({"partial_rotary_factor": 0.25}, "partial_rotary_factor 0.25"),
        ({"hidden_act": "quick_gelu"}, "'quick_gelu'"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(shapes, change, named):
    with pytest.raises(ConfigError) as caught:
        LLAMA.config_from_source(shapes["multi-head"] | change, "hf")

    assert named in str(caught.value)
    assert "not implemented" in str(caught.value)


def test_a_rotary_embedding_of_the_whole_head_may_be_spelled_out(shapes):
    settings = shapes["multi-head"]

    assert LLAMA.config_from_source(settings | {"partial_rotary_factor": 1.0}, "hf") == LLAMA.config_from_source(
        settings, "hf"
    )
