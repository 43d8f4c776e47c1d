"""A published Falcon, converted to megacore and exported again, is what it was; what cannot be read is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from transformers import FalconConfig, FalconForCausalLM

from megacore.checkpoint import Checkpoint, split
from megacore.cli import cli
from megacore.errors import ConfigError, UnsupportedSourceError, WeightMapError
from megacore.plugins import get_family
from megacore.weights import convert, export
from megacore_falcon import config_from_source, config_to_source

SEVERAL_FILES = "20KB"

SEVEN_B = "7B: multi-query, one norm, parallel"
FORTY_B = "40B: grouped, two norms, parallel"
ELEVEN_B = "11B: grouped, one norm, untied"
RW = "RW: ALiBi, biases, multi-head, sequential"


def assert_same_tensors(found, expected):
    """Same names, dtypes, shapes and bits."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def message(error, call, *arguments, **options) -> str:
    with pytest.raises(error) as caught:
        call(*arguments, **options)
    return str(caught.value)


def num_groups(config: FalconConfig) -> int:
    """What tensor parallelism can cut the attention between."""
    if config.new_decoder_architecture:
        return config.num_kv_heads
    return 1 if config.multi_query else config.num_attention_heads


# There and back


@pytest.mark.parametrize("max_shard_size", ["5GB", SEVERAL_FILES], ids=["one file", "several files"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_every_tensor_comes_back_as_it_was(publish, read_tensors, tmp_path, shape, dtype, max_shard_size):
    published = publish(dtype=dtype, max_shard_size=max_shard_size, **shape)

    convert("falcon", published.directory, tmp_path / "ckpt")
    export(tmp_path / "ckpt", tmp_path / "exported")

    assert_same_tensors(read_tensors(tmp_path / "exported"), published.tensors())


@pytest.mark.parametrize("cut", ["converted to it", "split to it"])
def test_every_tensor_comes_back_from_tp_2_and_pp_2(publish, read_tensors, tmp_path, shape, cut):
    # of 3 groups, 7 heads, 99 ids, 77 rows and 3 layers, each is cut unevenly
    published = publish(**shape)
    tp = min(2, num_groups(published.model.config))  # a single group stays whole

    if cut == "converted to it":
        convert("falcon", published.directory, tmp_path / "cut", tp=tp, pp=2)
    else:
        convert("falcon", published.directory, tmp_path / "ckpt")
        split(tmp_path / "ckpt", tmp_path / "cut", tp=tp, pp=2)
    layout = Checkpoint(tmp_path / "cut").manifest.layout
    assert (layout.tp, layout.pp) == (tp, 2)
    export(tmp_path / "cut", tmp_path / "exported")

    assert_same_tensors(read_tensors(tmp_path / "exported"), published.tensors())


def test_the_exported_configuration_is_the_published_one(publish, tmp_path, shape):
    published = publish(**shape)

    convert("falcon", published.directory, tmp_path / "ckpt")
    export(tmp_path / "ckpt", tmp_path / "exported")

    assert (
        FalconConfig.from_pretrained(tmp_path / "exported").to_dict()
        == FalconConfig.from_pretrained(published.directory).to_dict()
    )


def test_transformers_loads_the_export_with_nothing_missing_or_left_over(publish, tmp_path, shape):
    published = publish(**shape)
    input_ids = torch.arange(40).view(2, 20)

    convert("falcon", published.directory, tmp_path / "ckpt")
    export(tmp_path / "ckpt", tmp_path / "exported")

    exported, loading = FalconForCausalLM.from_pretrained(tmp_path / "exported", output_loading_info=True)
    assert not loading["missing_keys"] | loading["unexpected_keys"] | loading["mismatched_keys"]
    assert torch.equal(exported(input_ids).logits, published.model(input_ids).logits)


# Configurations


def test_a_configuration_survives_the_way_to_the_published_keys_and_back(shape):
    config = config_from_source(FalconConfig(**shape).to_dict(), "hf")

    assert config_from_source(config_to_source(config, "hf"), "hf") == config


def test_a_configuration_in_our_keys_alone_makes_the_same_model_of_transformers(shape):
    published = FalconConfig(**shape)

    ours = FalconConfig(**config_to_source(config_from_source(published.to_dict(), "hf"), "hf"))

    with torch.device("meta"):
        found, expected = FalconForCausalLM(ours), FalconForCausalLM(published)
    assert str(found) == str(expected)
    assert {name: parameter.shape for name, parameter in found.named_parameters()} == {
        name: parameter.shape for name, parameter in expected.named_parameters()
    }


def test_a_configuration_without_settings_is_that_of_transformers():
    ours = config_from_source({key: getattr(FalconConfig(), key) for key in REQUIRED}, "hf")

    assert ours == config_from_source(FalconConfig().to_dict(), "hf")


REQUIRED = ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size")


@pytest.mark.parametrize("key", REQUIRED)
def test_a_configuration_that_lacks_a_size_is_refused_by_the_name_of_the_key(publish, tmp_path, shapes, key):
    published = publish(**shapes[SEVEN_B])
    with published.edited_config() as config:
        del config[key]

    refusal = message(ConfigError, convert, "falcon", published.directory, tmp_path / "ckpt")

    assert refusal == f"{published.directory / 'config.json'} lacks {key!r}"


@pytest.mark.parametrize("name", [SEVEN_B, RW])
def test_the_keys_of_the_first_files_on_the_hub_are_read(publish, read_tensors, tmp_path, shapes, name):
    published = publish(**shapes[name])
    expected = config_from_source(published.model.config.to_dict(), "hf")

    in_first_spelling(published)
    convert("falcon", published.directory, tmp_path / "ckpt")
    export(tmp_path / "ckpt", tmp_path / "exported")

    assert Checkpoint(tmp_path / "ckpt").manifest.config == expected.to_dict()
    assert_same_tensors(read_tensors(tmp_path / "exported"), published.tensors())


def test_grouped_heads_in_the_keys_of_the_first_files_are_the_new_architecture(publish, read_tensors, tmp_path, shapes):
    # the 40B of the time had code of its own, and nothing in its configuration said so but the number of groups
    published = publish(**shapes[FORTY_B])
    expected = config_from_source(published.model.config.to_dict(), "hf")

    in_first_spelling(published, n_head_kv=published.model.config.num_kv_heads)
    convert("falcon", published.directory, tmp_path / "ckpt")

    assert Checkpoint(tmp_path / "ckpt").manifest.config == expected.to_dict()


@pytest.mark.parametrize("name", [SEVEN_B, FORTY_B])
def test_an_export_of_first_spelling_is_readable_by_transformers(publish, tmp_path, shapes, name):
    published = publish(**shapes[name])
    input_ids = torch.arange(40).view(2, 20)
    in_first_spelling(published, n_head_kv=published.model.config.num_kv_heads if name == FORTY_B else None)

    convert("falcon", published.directory, tmp_path / "ckpt")
    export(tmp_path / "ckpt", tmp_path / "exported")

    exported = FalconForCausalLM.from_pretrained(tmp_path / "exported")
    assert torch.equal(exported(input_ids).logits, published.model(input_ids).logits)


def in_first_spelling(published: Any, *, n_head_kv: int | None = None) -> None:
    """Rewrite ``config.json`` as it was on the hub before transformers knew Falcon."""
    config = published.model.config
    first = {
        "architectures": ["RWForCausalLM"],
        "auto_map": {"AutoModelForCausalLM": "modelling_RW.RWForCausalLM"},
        "model_type": "RefinedWeb" if n_head_kv else "RefinedWebModel",
        "alibi": config.alibi,
        "apply_residual_connection_post_layernorm": False,
        "attention_dropout": 0.0,
        "bias": config.bias,
        "bos_token_id": 11,
        "eos_token_id": 11,
        "hidden_dropout": 0.0,
        "hidden_size": config.hidden_size,
        "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-05,
        "multi_query": config.multi_query,
        "n_head": config.num_attention_heads,
        "n_layer": config.num_hidden_layers,
        "parallel_attn": config.parallel_attn,
        "torch_dtype": "float32",
        "use_cache": True,
        "vocab_size": config.vocab_size,
    }
    if n_head_kv:
        first |= {"n_head_kv": n_head_kv}
        del first["multi_query"]
    with published.edited_config() as written:
        written.clear()
        written |= first
    if config.max_position_embeddings != 2048:  # which went without saying
        with published.edited_config() as written:
            written["max_position_embeddings"] = config.max_position_embeddings


def test_the_width_under_its_first_name_is_read(shapes):
    published = FalconConfig(**shapes[SEVEN_B]).to_dict()
    first = {**published, "n_embed": published["hidden_size"]}
    del first["hidden_size"]

    assert config_from_source(first, "hf") == config_from_source(published, "hf")


@pytest.mark.parametrize(
    "name, change, told",
    [
        (SEVEN_B, {"activation": "quick_gelu"}, "activation 'quick_gelu' is not implemented"),
        (SEVEN_B, {"rope_parameters": {"rope_type": "longrope"}}, "rope_type 'longrope' is not implemented"),
        (SEVEN_B, {"num_attention_heads": 5}, "hidden_size (56) must be a multiple of num_attention_heads (5)"),
        (FORTY_B, {"num_kv_heads": 4}, "num_attention_heads (6) must be a multiple of num_kv_heads (4)"),
        (FORTY_B, {"num_ln_in_parallel_attn": 3}, "cannot have 3 norms"),
        (SEVEN_B, {"num_ln_in_parallel_attn": 2}, "num_ln_in_parallel_attn 2 without new_decoder_architecture"),
        (FORTY_B, {"parallel_attn": False}, "parallel_attn false with new_decoder_architecture"),
        (SEVEN_B, {"hidden_size": 63, "num_attention_heads": 7}, "head_dim must be even"),
        (SEVEN_B, {"apply_residual_connection_post_layernorm": True}, "apply_residual_connection_post_layernorm"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(publish, tmp_path, shapes, name, change, told):
    published = publish(**shapes[name])
    with published.edited_config() as config:
        config |= change

    assert told in message(ConfigError, convert, "falcon", published.directory, tmp_path / "ckpt")
    assert not (tmp_path / "ckpt").exists()


@pytest.mark.parametrize(
    "hook", [lambda family, config: family.weight_map(config, "meta"),
             lambda family, config: family.qkv_permutation(config, "meta")],
    ids=["weight_map", "qkv_permutation"],
)  # fmt: skip
def test_other_formats_are_refused_by_name(shapes, hook):
    config = config_from_source(FalconConfig(**shapes[SEVEN_B]).to_dict(), "hf")

    assert "'meta'" in message(UnsupportedSourceError, hook, get_family("falcon"), config)


# Tensors that are not the model's


def test_a_tied_head_that_was_saved_nevertheless_is_accepted_and_not_written(publish, read_tensors, tmp_path, shapes):
    # the files of the 7B and the 40B on the hub have it
    published = publish(**shapes[SEVEN_B])
    before = published.tensors()
    assert "lm_head.weight" not in before
    with published.edited_tensors() as tensors:
        tensors["lm_head.weight"] = tensors["transformer.word_embeddings.weight"].clone()

    convert("falcon", published.directory, tmp_path / "ckpt")
    export(tmp_path / "ckpt", tmp_path / "exported")

    assert_same_tensors(read_tensors(tmp_path / "exported"), before)


def test_a_tied_head_that_differs_is_refused(publish, tmp_path, shapes):
    published = publish(**shapes[SEVEN_B])
    with published.edited_tensors() as tensors:
        tensors["lm_head.weight"] = tensors["transformer.word_embeddings.weight"].clone()
        tensors["lm_head.weight"][98, 55] += 1e-3

    refusal = message(WeightMapError, convert, "falcon", published.directory, tmp_path / "ckpt")

    assert "ties lm_head.weight to transformer.word_embeddings.weight, but the two tensors differ" in refusal


@pytest.mark.parametrize("module", ["rotary_emb", "maybe_rotary"])
def test_rotary_tables_of_older_checkpoints_are_ignored(publish, read_tensors, tmp_path, shapes, module):
    published = publish(**shapes[FORTY_B])
    before = published.tensors()
    with published.edited_tensors() as tensors:
        for layer in range(3):
            tensors[f"transformer.h.{layer}.self_attention.{module}.inv_freq"] = torch.ones(4)

    convert("falcon", published.directory, tmp_path / "ckpt")
    export(tmp_path / "ckpt", tmp_path / "exported")

    assert_same_tensors(read_tensors(tmp_path / "exported"), before)


def test_biases_that_the_configuration_does_not_announce_are_refused(publish, tmp_path, shapes):
    published = publish(**shapes[RW])
    with published.edited_config() as config:
        config["bias"] = False

    refusal = message(WeightMapError, convert, "falcon", published.directory, tmp_path / "ckpt")

    assert "unknown to the weight map" in refusal
    assert "self_attention.dense.bias" in refusal


# Through the command line


def megacore(*arguments: object) -> Result:
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
    return result


def verify(ckpt, reference, *options: object) -> Result:
    return megacore(
        "verify", ckpt, "--reference", reference.directory, "--random-ids", "--iters", 2, "--seq-length", 20, *options
    )


def test_a_conversion_is_verified(publish, tmp_path, shape):
    published = publish(**shape)

    done = megacore("convert", "--model", "falcon", "--from", published.directory, "--out", tmp_path / "ckpt")
    assert done.exit_code == 0, done.output
    result = verify(tmp_path / "ckpt", published)

    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1].startswith("Verified in float32")


@pytest.mark.parametrize("name", [SEVEN_B, FORTY_B])
def test_a_conversion_from_the_first_spelling_is_verified(publish, tmp_path, shapes, name):
    published = publish(**shapes[name])
    in_first_spelling(published, n_head_kv=published.model.config.num_kv_heads if name == FORTY_B else None)
    convert("falcon", published.directory, tmp_path / "ckpt")

    result = verify(tmp_path / "ckpt", published)

    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    "name, tensor",
    [
        (SEVEN_B, "transformer.h.1.self_attention.query_key_value.weight"),
        (FORTY_B, "transformer.h.2.ln_mlp.bias"),
        (ELEVEN_B, "lm_head.weight"),
        (RW, "transformer.h.0.mlp.dense_4h_to_h.bias"),
    ],
)
def test_one_value_that_differs_is_found(publish, tmp_path, shapes, name, tensor):
    published = publish(**shapes[name])
    convert("falcon", published.directory, tmp_path / "ckpt")
    with published.edited_tensors() as tensors:
        tensors[tensor].view(-1)[5] += 0.5

    result = verify(tmp_path / "ckpt", published)

    assert result.exit_code == 1, result.output
    assert "NOT VERIFIED" in result.stdout


@pytest.mark.parametrize(
    "change",
    [
        {"layer_norm_epsilon": 1e-2},
        {"alibi": False},
        {"activation": "relu"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_reference_of_another_configuration_is_found(publish, tmp_path, shapes, change):
    published = publish(**shapes[RW])
    convert("falcon", published.directory, tmp_path / "ckpt")
    with published.edited_config() as config:
        config |= change

    assert verify(tmp_path / "ckpt", published).exit_code == 1
