"""A published Llama, converted to megacore and exported again, is what it was."""

from __future__ import annotations

import json

import pytest
import torch
from click.testing import CliRunner
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from megacore.checkpoint import Checkpoint, split
from megacore.cli import cli
from megacore.errors import CheckpointError, ConfigError, CorruptCheckpointError, UnsupportedSourceError, WeightMapError
from megacore.weights import convert, export

SEVERAL_FILES = "20KB"
INDEX = "model.safetensors.index.json"


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


# There and back


@pytest.mark.parametrize(
    ("max_shard_size", "dtype"),
    [("5GB", torch.bfloat16), (SEVERAL_FILES, torch.float32)],
    ids=["bf16 in one file", "fp32 in several files"],
)
def test_every_tensor_comes_back_as_it_was(publish, read_tensors, tmp_path, shape, dtype, max_shard_size):
    published = publish(dtype=dtype, max_shard_size=max_shard_size, **shape)
    assert (published.directory / INDEX).exists() == (max_shard_size == SEVERAL_FILES)

    convert("llama", published.directory, tmp_path / "ckpt")
    export(tmp_path / "ckpt", tmp_path / "exported")

    assert_same_tensors(read_tensors(tmp_path / "exported"), published.tensors())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=["fp16", "fp64"])
def test_every_other_dtype_is_kept_too(publish, read_tensors, tmp_path, shapes, dtype):
    published = publish(dtype=dtype, **shapes["everything at once"])

    convert("llama", published.directory, tmp_path / "ckpt")
    export(tmp_path / "ckpt", tmp_path / "exported")

    assert_same_tensors(read_tensors(tmp_path / "exported"), published.tensors())


def test_a_checkpoint_of_mixed_dtypes_keeps_each(publish, read_tensors, tmp_path, shapes):
    published = publish(dtype=torch.bfloat16, **shapes["2 key-value heads"])
    with published.edited_tensors() as tensors:
        for name in tensors:
            if "norm" in name:
                tensors[name] = tensors[name].float() + 1e-5

    convert("llama", published.directory, tmp_path / "ckpt")
    export(tmp_path / "ckpt", tmp_path / "exported")

    assert_same_tensors(read_tensors(tmp_path / "exported"), published.tensors())


@pytest.mark.parametrize("tp, pp", [(2, 2), (3, 5), (1, 4)])
@pytest.mark.parametrize("cut", ["converted to it", "split to it"])
def test_every_tensor_comes_back_from_a_checkpoint_that_is_cut(publish, read_tensors, tmp_path, shapes, tp, pp, cut):
    # 3 groups are 2 + 1 over tp 2, the vocabulary of 99 is 50 + 49, the width of 55 is 28 + 27, 5 layers are 3 + 2.
    published = publish(**shapes["everything at once"])

    if cut == "converted to it":
        convert("llama", published.directory, tmp_path / "cut", tp=tp, pp=pp)
    else:
        convert("llama", published.directory, tmp_path / "ckpt")
        split(tmp_path / "ckpt", tmp_path / "cut", tp=tp, pp=pp)
    layout = Checkpoint(tmp_path / "cut").manifest.layout
    assert (layout.tp, layout.pp) == (tp, pp)
    export(tmp_path / "cut", tmp_path / "exported")

    assert_same_tensors(read_tensors(tmp_path / "exported"), published.tensors())


def test_every_shape_that_tp_2_can_cut_comes_back_from_tp_2_and_pp_2(publish, read_tensors, tmp_path, shape):
    published = publish(dtype=torch.bfloat16, **shape)
    tp = min(2, shape["num_key_value_heads"])  # multi-query attention has one group, which stays whole

    convert("llama", published.directory, tmp_path / "ckpt", tp=tp, pp=2)
    export(tmp_path / "ckpt", tmp_path / "exported")

    assert_same_tensors(read_tensors(tmp_path / "exported"), published.tensors())


# What transformers makes of the export


def test_the_exported_configuration_is_the_published_one(publish, tmp_path, shape):
    published = publish(**shape)

    convert("llama", published.directory, tmp_path / "ckpt")
    export(tmp_path / "ckpt", tmp_path / "exported")

    assert (
        LlamaConfig.from_pretrained(tmp_path / "exported").to_dict()
        == LlamaConfig.from_pretrained(published.directory).to_dict()
    )


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 1e6},
        {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
        {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
        {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16},
        {
            "rope_type": "yarn",
            "rope_theta": 5e5,
            "factor": 4.0,
            "original_max_position_embeddings": 16,
            "beta_fast": 16,
            "beta_slow": 2,
            "mscale": 0.7,
            "mscale_all_dim": 1.2,
            "truncate": False,
            "attention_factor": 1.1,
        },
        {
            "rope_type": "llama3",
            "rope_theta": 5e5,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    ],
    ids=lambda rope: f"{rope['rope_type']}-{len(rope)}",
)
def test_the_exported_rotary_settings_are_the_published_ones(publish, tmp_path, shapes, rope):
    published = publish(**shapes["2 key-value heads"] | {"rope_parameters": dict(rope), "num_hidden_layers": 1})

    convert("llama", published.directory, tmp_path / "ckpt")
    export(tmp_path / "ckpt", tmp_path / "exported")

    with published.edited_config() as config:
        assert config["rope_parameters"] == rope
    exported = json.loads((tmp_path / "exported" / "config.json").read_text())
    old, new = ("rope_scaling", "rope_theta"), ("rope_parameters",)
    in_new_spelling = LlamaConfig(**{key: value for key, value in exported.items() if key not in old})
    in_old_spelling = LlamaConfig(**{key: value for key, value in exported.items() if key not in new})
    expected = LlamaRotaryEmbedding(published.model.config)
    for config in (in_new_spelling, in_old_spelling):
        assert {key: config.rope_parameters[key] for key in rope} == rope
        rotary = LlamaRotaryEmbedding(config)
        assert torch.equal(rotary.inv_freq, expected.inv_freq)  # whatever was added is what it was by default
        assert rotary.attention_scaling == expected.attention_scaling


def test_transformers_loads_the_export_with_nothing_missing_or_left_over(publish, tmp_path, shape):
    published = publish(**shape)
    input_ids = torch.arange(40).view(2, 20)

    convert("llama", published.directory, tmp_path / "ckpt")
    export(tmp_path / "ckpt", tmp_path / "exported")

    exported, loading = LlamaForCausalLM.from_pretrained(
        tmp_path / "exported", output_loading_info=True, attn_implementation="eager"
    )
    assert not loading["missing_keys"] | loading["unexpected_keys"] | loading["mismatched_keys"]
    assert exported.dtype == torch.float32
    assert torch.equal(exported(input_ids).logits, published.model(input_ids).logits)


def test_an_export_in_16_bit_says_its_dtype_to_transformers(publish, tmp_path, shapes):
    published = publish(dtype=torch.bfloat16, **shapes["multi-head"])

    convert("llama", published.directory, tmp_path / "ckpt")
    export(tmp_path / "ckpt", tmp_path / "exported")

    assert LlamaForCausalLM.from_pretrained(tmp_path / "exported", dtype="auto").dtype == torch.bfloat16


# Conversion of the dtype


@pytest.mark.parametrize("option, dtype", [("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp64", torch.float64)])
def test_dtype_converts_as_torch_does(publish, read_tensors, tmp_path, shapes, option, dtype):
    published = publish(dtype=torch.float32, **shapes["everything at once"])
    source, ckpt, out = str(published.directory), str(tmp_path / "ckpt"), str(tmp_path / "exported")

    done = CliRunner().invoke(cli, ["convert", "--model", "llama", "--from", source, "--out", ckpt, "--dtype", option])
    assert done.exit_code == 0, done.output
    export(ckpt, out)

    assert_same_tensors(
        read_tensors(tmp_path / "exported"), {name: value.to(dtype) for name, value in published.tensors().items()}
    )


def test_dtype_converts_on_export_too(publish, read_tensors, tmp_path, shapes):
    published = publish(dtype=torch.float32, **shapes["everything at once"])
    ckpt, out = str(tmp_path / "ckpt"), str(tmp_path / "exported")
    convert("llama", published.directory, ckpt, tp=2, pp=2)

    done = CliRunner().invoke(cli, ["export", ckpt, "--out", out, "--dtype", "bf16"])

    assert done.exit_code == 0, done.output
    assert_same_tensors(
        read_tensors(tmp_path / "exported"),
        {name: value.to(torch.bfloat16) for name, value in published.tensors().items()},
    )
    assert LlamaConfig.from_pretrained(out).dtype == torch.bfloat16


def test_query_key_and_value_of_different_dtypes_are_refused_until_a_dtype_is_chosen(
    publish, read_tensors, tmp_path, shapes
):
    published = publish(**shapes["2 key-value heads"])
    with published.edited_tensors() as tensors:
        tensors["model.layers.2.self_attn.k_proj.weight"] = tensors["model.layers.2.self_attn.k_proj.weight"].bfloat16()

    refusal = message(WeightMapError, convert, "llama", published.directory, tmp_path / "ckpt")
    assert "model.layers.2.self_attn.k_proj.weight" in refusal
    assert "--dtype" in refusal

    convert("llama", published.directory, tmp_path / "ckpt", dtype=torch.float32)
    export(tmp_path / "ckpt", tmp_path / "exported")
    assert_same_tensors(
        read_tensors(tmp_path / "exported"), {name: value.float() for name, value in published.tensors().items()}
    )


# What comes with the weights


def test_tokenizer_files_are_carried_byte_by_byte(publish, tmp_path, shapes):
    published = publish(**shapes["multi-head"])
    files = {
        "tokenizer.json": b'{"model": {}}\r\n',
        "tokenizer.model": b"\x00\xff\n",
        "tokenizer_config.json": b"{}",
        "special_tokens_map.json": b"{ }",
        "chat_template.jinja": b"{{ messages }}",
    }
    for name, content in files.items():
        (published.directory / name).write_bytes(content)
    (published.directory / "README.md").write_text("not a tokenizer's")

    convert("llama", published.directory, tmp_path / "ckpt")
    split(tmp_path / "ckpt", tmp_path / "cut", tp=2, pp=2)
    export(tmp_path / "cut", tmp_path / "exported")

    assert {path.name: path.read_bytes() for path in (tmp_path / "cut" / "tokenizer").iterdir()} == files
    assert {name: (tmp_path / "exported" / name).read_bytes() for name in files} == files
    assert not (tmp_path / "exported" / "README.md").exists()


def test_the_generation_config_is_carried(publish, tmp_path, shapes):
    published = publish(**shapes["multi-head"])
    generation = {"temperature": 0.6, "eos_token_id": [4, 5], "do_sample": True}
    (published.directory / "generation_config.json").write_text(json.dumps(generation))

    convert("llama", published.directory, tmp_path / "ckpt")
    export(tmp_path / "ckpt", tmp_path / "exported")

    assert json.loads((tmp_path / "exported" / "generation_config.json").read_text()) == generation


def test_settings_that_megacore_has_no_use_for_are_carried(publish, tmp_path, shapes):
    published = publish(**shapes["multi-head"])
    with published.edited_config() as config:
        config |= {"attention_dropout": 0.25, "pad_token_id": 7, "a_setting_of_tomorrow": {"a": [1]}}

    convert("llama", published.directory, tmp_path / "ckpt")
    export(tmp_path / "ckpt", tmp_path / "exported")

    exported = json.loads((tmp_path / "exported" / "config.json").read_text())
    assert exported["attention_dropout"] == 0.25
    assert (exported["bos_token_id"], exported["eos_token_id"], exported["pad_token_id"]) == (3, [4, 5], 7)
    assert exported["a_setting_of_tomorrow"] == {"a": [1]}


def test_a_reference_to_code_that_others_would_run_is_not_carried(publish, tmp_path, shapes):
    published = publish(**shapes["multi-head"])
    with published.edited_config() as config:
        config["auto_map"] = {"AutoModelForCausalLM": "somebody/repository--modeling.Llama"}

    convert("llama", published.directory, tmp_path / "ckpt")
    export(tmp_path / "ckpt", tmp_path / "exported")

    assert "auto_map" not in (tmp_path / "exported" / "config.json").read_text()
    assert "auto_map" not in (tmp_path / "ckpt" / "megacore.json").read_text()


# Several files


def test_an_export_in_several_files_has_an_index_of_all_tensors(publish, read_tensors, tmp_path, shapes):
    published = publish(**shapes["everything at once"])
    convert("llama", published.directory, tmp_path / "ckpt")

    export(tmp_path / "ckpt", tmp_path / "exported", max_file_bytes=20_000)

    index = json.loads((tmp_path / "exported" / INDEX).read_text())
    files = sorted((tmp_path / "exported").glob("*.safetensors"))
    tensors = read_tensors(tmp_path / "exported")
    assert len(files) > 5
    assert [file.name for file in files] == [
        f"model-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)
    ]
    assert_same_tensors(tensors, published.tensors())
    assert index["weight_map"].keys() == tensors.keys()
    assert set(index["weight_map"].values()) == {file.name for file in files}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    _, loading = LlamaForCausalLM.from_pretrained(tmp_path / "exported", output_loading_info=True)
    assert not loading["missing_keys"] | loading["unexpected_keys"]


def test_no_exported_file_holds_more_than_it_may_unless_one_tensor_does(publish, tmp_path, shapes):
    published = publish(**shapes["multi-head"])
    convert("llama", published.directory, tmp_path / "ckpt")

    export(tmp_path / "ckpt", tmp_path / "exported", max_file_bytes=10_000)

    weight_map = json.loads((tmp_path / "exported" / INDEX).read_text())["weight_map"]
    sizes: dict[str, list[int]] = {}
    for name, file in weight_map.items():
        sizes.setdefault(file, []).append(published.tensors()[name].nbytes)
    assert all(sum(in_file) <= 10_000 or len(in_file) == 1 for in_file in sizes.values())
    assert max(len(in_file) for in_file in sizes.values()) > 1


@pytest.mark.parametrize(
    "name", ["../elsewhere.safetensors", "sub/elsewhere.safetensors", "{tmp_path}/elsewhere.safetensors"]
)
def test_an_index_that_names_a_file_of_another_directory_is_refused(publish, tmp_path, shapes, name):
    published = publish(max_shard_size=SEVERAL_FILES, **shapes["multi-head"])
    name = name.format(tmp_path=tmp_path)
    index = json.loads((published.directory / INDEX).read_text())
    moved = index["weight_map"]["model.norm.weight"]
    index["weight_map"] = {
        tensor: name if file == moved else file for tensor, file in index["weight_map"].items()
    }  # fmt: skip
    (published.directory / INDEX).write_text(json.dumps(index))
    (published.directory / "sub").mkdir()
    (published.directory / moved).rename(published.directory / name)  # all there, and in its right shape

    refusal = message(CorruptCheckpointError, convert, "llama", published.directory, tmp_path / "ckpt")

    assert f"names {name!r}, which is not a safetensors file of its own directory" in refusal
    assert not (tmp_path / "ckpt").exists()


@pytest.mark.parametrize("name", ["..", "", 5, None, ["model.safetensors"]])
def test_an_index_that_names_no_file_at_all_is_refused(publish, tmp_path, shapes, name):
    published = publish(max_shard_size=SEVERAL_FILES, **shapes["multi-head"])
    index = json.loads((published.directory / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = name
    (published.directory / INDEX).write_text(json.dumps(index))

    message(CheckpointError, convert, "llama", published.directory, tmp_path / "ckpt")

    assert not (tmp_path / "ckpt").exists()


def test_a_file_that_the_index_names_and_that_is_missing_is_named(publish, tmp_path, shapes):
    published = publish(max_shard_size=SEVERAL_FILES, **shapes["multi-head"])
    gone = sorted(published.directory.glob("*.safetensors"))[2]
    gone.unlink()

    assert f"{gone} is missing" in message(CheckpointError, convert, "llama", published.directory, tmp_path / "ckpt")


def test_a_tensor_that_is_in_two_files_is_refused(publish, tmp_path, shapes):
    published = publish(max_shard_size=SEVERAL_FILES, **shapes["multi-head"])
    first, second, *_ = sorted(published.directory.glob("*.safetensors"))
    second.write_bytes(first.read_bytes())

    refusal = message(CorruptCheckpointError, convert, "llama", published.directory, tmp_path / "ckpt")

    assert first.name in refusal
    assert second.name in refusal


# Tensors that are not the model's


def test_a_tied_head_that_was_saved_nevertheless_is_accepted_and_not_written(publish, read_tensors, tmp_path, shapes):
    published = publish(**shapes["multi-head, tied"])
    before = published.tensors()
    with published.edited_tensors() as tensors:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    convert("llama", published.directory, tmp_path / "ckpt")
    export(tmp_path / "ckpt", tmp_path / "exported")

    assert_same_tensors(read_tensors(tmp_path / "exported"), before)


@pytest.mark.parametrize(
    "change",
    [
        lambda head: torch.cat([head[:-1], head[-1:].nextafter(torch.tensor(9.0))]),  # one row, by one bit
        lambda head: head[:-1],
        lambda head: head.bfloat16(),
    ],
    ids=["last row", "shape", "dtype"],
)
def test_a_tied_head_that_differs_is_refused(publish, tmp_path, shapes, change):
    published = publish(**shapes["multi-head, tied"])
    with published.edited_tensors() as tensors:
        tensors["lm_head.weight"] = change(tensors["model.embed_tokens.weight"]).clone()

    refusal = message(WeightMapError, convert, "llama", published.directory, tmp_path / "ckpt")

    assert "config.json ties lm_head.weight to model.embed_tokens.weight, but the two tensors differ" in refusal
    assert '"tie_word_embeddings": false' in refusal
    assert not (tmp_path / "ckpt").exists()


def test_rotary_tables_of_older_checkpoints_are_ignored(publish, read_tensors, tmp_path, shapes):
    published = publish(**shapes["multi-head"])
    before = published.tensors()
    with published.edited_tensors() as tensors:
        for layer in range(5):
            tensors[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.ones(4)

    convert("llama", published.directory, tmp_path / "ckpt")
    export(tmp_path / "ckpt", tmp_path / "exported")

    assert_same_tensors(read_tensors(tmp_path / "exported"), before)


def test_all_tensors_that_do_not_fit_are_listed_at_once(publish, tmp_path, shapes):
    published = publish(**shapes["multi-head"])
    with published.edited_tensors() as tensors:
        del tensors["model.layers.3.mlp.up_proj.weight"]
        del tensors["lm_head.weight"]
        tensors["model.layers.5.mlp.up_proj.weight"] = torch.ones(56, 32)
        tensors["model.layers.0.self_attn.q_proj.bias"] = torch.ones(32)
        tensors["model.layers.1.self_attn.k_proj.weight"] = torch.ones(16, 32)
        tensors["model.norm.weight"] = torch.ones(32, 1)

    refusal = message(WeightMapError, convert, "llama", published.directory, tmp_path / "ckpt")

    heading, missing, unknown, shaped = refusal.splitlines()
    assert heading == f"{published.directory} does not hold the tensors of this model:"
    assert missing.startswith("  missing: ")
    assert set(missing.removeprefix("  missing: ").split(", ")) == {
        "model.layers.3.mlp.up_proj.weight",
        "lm_head.weight",
    }
    assert set(unknown.removeprefix("  unknown to the weight map: ").split(", ")) == {
        "model.layers.5.mlp.up_proj.weight",
        "model.layers.0.self_attn.q_proj.bias",
    }
    assert "model.layers.1.self_attn.k_proj.weight [16, 32] instead of [32, 32]" in shaped
    assert "model.norm.weight [32, 1] instead of [32]" in shaped
    assert not (tmp_path / "ckpt").exists()


def test_a_scalar_where_a_matrix_should_be_is_listed(publish, tmp_path, shapes):
    published = publish(**shapes["multi-head"])
    with published.edited_tensors() as tensors:
        tensors["model.embed_tokens.weight"] = torch.tensor(1.0)

    refusal = message(WeightMapError, convert, "llama", published.directory, tmp_path / "ckpt")

    assert "model.embed_tokens.weight [] instead of [99, 32]" in refusal


def test_a_long_list_of_missing_tensors_is_cut_and_counted(publish, tmp_path, shapes):
    published = publish(**shapes["multi-head"])
    with published.edited_config() as config:
        config["num_hidden_layers"] = 7

    refusal = message(WeightMapError, convert, "llama", published.directory, tmp_path / "ckpt")

    assert refusal.endswith(", and 10 more")  # 9 tensors in each of 2 layers, 8 named


# Sources that are refused


def test_a_checkpoint_of_another_architecture_is_refused(publish, tmp_path, shapes):
    published = publish(**shapes["multi-head"])
    with published.edited_config() as config:
        config["architectures"] = ["GPT2LMHeadModel"]

    refusal = message(ConfigError, convert, "llama", published.directory, tmp_path / "ckpt")

    assert "GPT2LMHeadModel" in refusal
    assert "llama reads LlamaForCausalLM" in refusal


@pytest.mark.parametrize("architectures", [None, []])
def test_a_checkpoint_that_names_no_architecture_is_refused(publish, tmp_path, shapes, architectures):
    published = publish(**shapes["multi-head"])
    with published.edited_config() as config:
        config["architectures"] = architectures

    assert "none named" in message(ConfigError, convert, "llama", published.directory, tmp_path / "ckpt")


def test_a_quantized_checkpoint_is_refused(publish, tmp_path, shapes):
    published = publish(**shapes["multi-head"])
    with published.edited_config() as config:
        config["quantization_config"] = {"quant_method": "gptq", "bits": 4}

    assert "quantized" in message(ConfigError, convert, "llama", published.directory, tmp_path / "ckpt")


def test_weights_in_a_dtype_that_no_parameter_has_are_refused_by_name(publish, tmp_path, shapes):
    published = publish(**shapes["multi-head"])
    with published.edited_tensors() as tensors:
        tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.float8_e4m3fn)

    refusal = message(CheckpointError, convert, "llama", published.directory, tmp_path / "ckpt")

    assert "lm_head.weight has dtype F8_E4M3" in refusal


def test_an_activation_that_is_not_implemented_is_refused_by_name(publish, tmp_path, shapes):
    published = publish(**shapes["multi-head"])
    with published.edited_config() as config:
        config["hidden_act"] = "quick_gelu"

    assert "hidden_act 'quick_gelu' is not implemented" in message(
        ConfigError, convert, "llama", published.directory, tmp_path / "ckpt"
    )


def test_a_setting_that_is_missing_is_named(publish, tmp_path, shapes):
    published = publish(**shapes["multi-head"])
    with published.edited_config() as config:
        del config["num_hidden_layers"]

    refusal = message(ConfigError, convert, "llama", published.directory, tmp_path / "ckpt")

    assert refusal == f"{published.directory / 'config.json'} lacks 'num_hidden_layers'"


@pytest.mark.parametrize(
    "setting, value",
    [
        ("architectures", "LlamaForCausalLM"),
        ("num_attention_heads", 0),
        ("num_attention_heads", "4"),
        ("num_key_value_heads", 3),
        ("head_dim", 7),
        ("vocab_size", 99.0),
        ("rms_norm_eps", "small"),
        ("rms_norm_eps", None),
        ("hidden_act", ["silu"]),
        ("rope_scaling", "linear"),
        ("rope_parameters", {"rope_theta": "ten thousand"}),
        ("rope_parameters", {"rope_type": "linear"}),
        ("rope_parameters", {"rope_type": "linear", "factor": "2"}),
        ("rope_parameters", {"rope_type": "linear", "factor": 0}),
    ],
)
def test_a_value_that_no_model_can_have_is_a_configuration_error(publish, tmp_path, shapes, setting, value):
    published = publish(**shapes["multi-head"])
    with published.edited_config() as config:
        del config["head_dim"]
        config[setting] = value

    message(ConfigError, convert, "llama", published.directory, tmp_path / "ckpt")

    assert not (tmp_path / "ckpt").exists()


@pytest.mark.parametrize("direction", ["convert", "export"])
def test_a_format_that_the_family_does_not_know_is_refused(publish, tmp_path, shapes, direction):
    published = publish(**shapes["multi-head"])

    if direction == "convert":
        refusal = message(
            UnsupportedSourceError, convert, "llama", published.directory, tmp_path / "ckpt", source="gguf"
        )
    else:
        convert("llama", published.directory, tmp_path / "ckpt")
        refusal = message(UnsupportedSourceError, export, tmp_path / "ckpt", tmp_path / "exported", format="gguf")

    assert "'gguf'" in refusal
    assert "hf" in refusal


def test_the_command_line_says_what_does_not_fit_and_exits_with_2(publish, tmp_path, shapes):
    published = publish(**shapes["multi-head"])
    with published.edited_tensors() as tensors:
        del tensors["model.norm.weight"]

    done = CliRunner().invoke(
        cli, ["convert", "--model", "llama", "--from", str(published.directory), "--out", str(tmp_path / "ckpt")]
    )

    assert done.exit_code == 2
    assert "missing: model.norm.weight" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == [published.directory.name]  # nothing half written
