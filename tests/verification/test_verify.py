"""`megacore verify` passes what is right and nothing else; the faults are those that a plugin's author makes."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import tokenizers
import torch
from click.testing import CliRunner, Result
from torch.nn import functional as F  # noqa: N812

from megacore.checkpoint import split
from megacore.cli import cli
from megacore.data import IndexedDatasetWriter
from megacore.plugins import default_registry
from megacore.weights import convert

GOOD_PLUGIN = """
from dataclasses import replace

import megacore_llama as llama
from megacore import ModelFamily, hookimpl
from megacore.weights import Copy, FusedQKV, Stacked, WeightMap


def changed_config(config):
    return config


def changed_rule(rule):
    return rule


def changed_rows(rows, config):
    return rows


@hookimpl
def model_families():
    [family] = llama.model_families()

    def config_from_source(published, source):
        return changed_config(replace(family.config_from_source(published, source), family="faulty"))

    return [replace(family, name="faulty", config_from_source=config_from_source)]


@hookimpl
def weight_map(config, source):
    right = llama.weight_map(config, source)
    rules = [changed_rule(rule) for rule in right.expand(config.num_layers)]
    return WeightMap(*rules, ignored=right.ignored, aliases=right.aliases)


@hookimpl
def qkv_permutation(config, source):
    return changed_rows(llama.qkv_permutation(config, source), config)


@hookimpl
def load_reference(config, path, dtype, device):
    return llama.load_reference(config, path, dtype, device)


@hookimpl
def build_layer(config, parallel):
    return llama.build_layer(config, parallel)
"""

FAULTS = {
    "key and value swapped": """
def changed_rule(rule):
    if isinstance(rule, FusedQKV):
        q, k, v = rule.sources
        return FusedQKV(rule.native, q=q, k=v, v=k)
    return rule
""",
    "gate and up swapped": """
def changed_rule(rule):
    if isinstance(rule, Stacked):
        gate, up = rule.sources
        return Stacked(rule.native, gate=up, up=gate)
    return rule
""",
    "rotary pairs taken for interleaved": """
def changed_rows(rows, config):
    # the source's rows 0, 1, 2, 3, … of a query or key head for 0, 2, 4, …, 1, 3, 5, …
    turned = (config.num_attention_heads + config.num_kv_heads) * config.head_dim
    def interleaved(row):
        head, component = divmod(row, config.head_dim)
        half, pair = divmod(component, config.head_dim // 2)
        return head * config.head_dim + 2 * pair + half
    return [interleaved(row) if row < turned else row for row in rows]
""",
    "heads not grouped": """
def changed_rows(rows, config):
    return range(len(rows))
""",
    "eps ten times too large": """
def changed_config(config):
    return replace(config, norm_eps=10 * config.norm_eps)
""",
    "eps ten times too small": """
def changed_config(config):
    return replace(config, norm_eps=config.norm_eps / 10)
""",
    "two layers' norms swapped": """
NEIGHBOUR = {"1": "2", "2": "1"}

def changed_rule(rule):
    [source, *_] = rule.sources
    if source.endswith("input_layernorm.weight") and source.split(".")[2] in NEIGHBOUR:
        layer = source.split(".")[2]
        return Copy(rule.native, source.replace(f".{layer}.", f".{NEIGHBOUR[layer]}."))
    return rule
""",
    "the two norms of a layer swapped": """
def changed_rule(rule):
    [source, *_] = rule.sources
    first, second = "layers.3.input_layernorm", "layers.3.post_attention_layernorm"
    if first in source:
        return Copy(rule.native, source.replace(first, second))
    return Copy(rule.native, source.replace(second, first)) if second in source else rule
""",
    "another rotary base": """
def changed_config(config):
    return replace(config, rope_theta=500000.0)
""",
    "another activation": """
def changed_config(config):
    return replace(config, activation="gelu")
""",
}

A_NUMBER = r"\d+(?:\.\d+)?(?:e[+-]\d+)?"


@pytest.fixture
def install_plugin(tmp_path, monkeypatch):
    """Installs a plugin for the family ``faulty``: the Llama plugin with some of its functions written anew."""
    site = tmp_path / "site"
    metadata = site / "megacore_faulty-1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: megacore-faulty\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[megacore]\nfaulty = megacore_faulty\n")
    monkeypatch.syspath_prepend(site)

    def install(changes: str = "") -> None:
        (site / "megacore_faulty.py").write_text(GOOD_PLUGIN + changes)
        default_registry.cache_clear()

    yield install
    sys.modules.pop("megacore_faulty", None)
    default_registry.cache_clear()


@pytest.fixture
def published(publish, shapes):
    """A Llama of which every part matters; its eps too, beside activations of order 1."""
    published = publish(**shapes["2 key-value heads"] | {"rms_norm_eps": 1e-2})
    logits = published.model(torch.arange(30).unsqueeze(0)).logits
    assert 0.3 < logits.std() < 3
    return published


@pytest.fixture
def ckpt(published, tmp_path) -> Path:
    """``published``, converted."""
    convert("llama", published.directory, tmp_path / "ckpt")
    return tmp_path / "ckpt"


def megacore(*arguments: object) -> Result:
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
    return result


def verify(checkpoint: Path, reference, *options: object, ids: tuple[object, ...] = ("--random-ids",)) -> Result:
    return megacore(
        "verify", checkpoint, "--reference", reference.directory, *ids, "--iters", 3, "--seq-length", 20, *options
    )


def convert_with_plugin(published, out: Path) -> Path:
    done = megacore("convert", "--model", "faulty", "--from", published.directory, "--out", out)
    assert done.exit_code == 0, done.output
    return out


def write_dataset(prefix: Path, ids: list[int]) -> Path:
    with IndexedDatasetWriter(prefix, "uint16") as writer:
        writer.add_document(ids)
    return prefix


def some_ids(count: int = 200) -> list[int]:
    return torch.randint(0, 99, (count,), generator=torch.Generator().manual_seed(5)).tolist()


# Faults


def test_a_plugin_without_a_fault_is_verified(install_plugin, published, tmp_path):
    install_plugin()

    result = verify(convert_with_plugin(published, tmp_path / "ckpt"), published)

    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1].startswith("Verified in float32")


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_of_a_plugin_is_found(install_plugin, published, tmp_path, fault):
    install_plugin(FAULTS[fault])

    result = verify(convert_with_plugin(published, tmp_path / "ckpt"), published)

    assert result.exit_code == 1, result.output
    assert result.stdout.splitlines()[-1].startswith("NOT VERIFIED in float32")


@pytest.mark.parametrize(
    "fault", ["key and value swapped", "gate and up swapped", "rotary pairs taken for interleaved"]
)
def test_a_gross_fault_is_found_in_16_bit_too(install_plugin, published, tmp_path, fault):
    install_plugin(FAULTS[fault])

    result = verify(convert_with_plugin(published, tmp_path / "ckpt"), published, "--dtype", "bf16")

    assert result.exit_code == 1, result.output
    assert "NOT VERIFIED in bfloat16" in result.stdout


def test_an_eps_of_the_usual_size_is_found_out_too(install_plugin, publish, shapes, tmp_path):
    published = publish(**shapes["2 key-value heads"] | {"rms_norm_eps": 1e-5})
    install_plugin(FAULTS["eps ten times too large"])

    assert verify(convert_with_plugin(published, tmp_path / "ckpt"), published).exit_code == 1


def test_a_norm_taken_twice_is_refused_before_anything_is_written(install_plugin, published, tmp_path):
    install_plugin("""
def changed_rule(rule):
    [source, *_] = rule.sources
    if source == "model.layers.2.input_layernorm.weight":
        return Copy(rule.native, "model.layers.1.input_layernorm.weight")
    return rule
""")

    done = megacore("convert", "--model", "faulty", "--from", published.directory, "--out", tmp_path / "ckpt")

    assert done.exit_code == 2
    assert "used by several rules: model.layers.1.input_layernorm.weight" in done.stderr
    assert not (tmp_path / "ckpt").exists()


@pytest.mark.parametrize("where", ["ours", "the reference", "both"])
def test_a_logit_that_is_not_a_number_is_never_verified(publish, shapes, tmp_path, where):
    right, wrong = (publish(**shapes["multi-head"]) for _ in range(2))
    with wrong.edited_tensors() as tensors:
        tensors["lm_head.weight"][50, 0] = float("nan")
    ours = right if where == "the reference" else wrong
    convert("llama", ours.directory, tmp_path / "ckpt")

    result = verify(
        tmp_path / "ckpt", right if where == "ours" else wrong, "--tolerance", 1e30, "--json", tmp_path / "figures.json"
    )

    assert result.exit_code == 1
    assert "NOT VERIFIED" in result.stdout
    assert "Max absolute error in the logits: nan" in result.stdout
    figures = (tmp_path / "figures.json").read_text()
    assert "NaN" not in figures  # no JSON
    assert json.loads(figures)["iterations"][0]["max_error"] is None


def test_one_iteration_that_differs_is_enough(publish, shapes, tmp_path):
    published, other = (publish(**shapes["multi-head"]) for _ in range(2))
    with other.edited_tensors() as tensors:
        tensors["model.embed_tokens.weight"][98] += 1
    ids = [number % 98 for number in some_ids(61)]
    ids[30] = 98  # in the second of three samples
    convert("llama", published.directory, tmp_path / "ckpt")

    result = verify(tmp_path / "ckpt", other, ids=("--data", write_dataset(tmp_path / "data", ids)))

    errors = [float(error) for error in re.findall(r"logits: (\S+)$", result.stdout, re.MULTILINE)]
    assert [error > 1e-3 for error in errors] == [False, True, False]
    assert result.exit_code == 1


# What is printed, and that it is true


def test_each_iteration_prints_its_two_lines_and_the_end_a_verdict(published, ckpt):
    result = verify(ckpt, published)

    assert result.exit_code == 0
    iterations = "".join(
        rf"Iteration {index}\.\.\.\n"
        r"Max absolute error in the logits: 0\.0000\d\d\n"
        r"Abs loss error: 0\.00000\d Our loss: \d\.\d{3}, theirs: \d\.\d{3}\n"
        for index in range(3)
    )
    verdict = (
        rf"Verified in float32, tp 1: over 3 iterations, logit error at most {A_NUMBER} \(allowed 0\.001\), "
        rf"on average at most {A_NUMBER} \(allowed 0\.0001\), loss error at most {A_NUMBER}, "
        r"same most likely token at 100\.00% of positions\n"
    )
    assert re.fullmatch(iterations + verdict, result.stdout), result.stdout


def test_the_figures_are_those_of_the_two_models_on_the_data(publish, shapes, tmp_path):
    published = publish(**shapes["multi-head"])
    other = publish(seed=1, **shapes["multi-head"])
    ids = some_ids()
    convert("llama", published.directory, tmp_path / "ckpt")
    data = write_dataset(tmp_path / "data", ids)
    figures = tmp_path / "figures.json"

    result = verify(tmp_path / "ckpt", other, "--json", figures, ids=("--data", data))

    assert result.exit_code == 1
    report = json.loads(figures.read_text())
    for index, iteration in enumerate(report["iterations"]):
        inputs, targets = torch.tensor(ids[20 * index : 20 * index + 20]), ids[20 * index + 1 : 20 * index + 21]
        with torch.no_grad():
            ours, theirs = (model(inputs.unsqueeze(0)).logits[0].double() for model in (published.model, other.model))
        our_loss, their_loss = (F.cross_entropy(logits, torch.tensor(targets)).item() for logits in (ours, theirs))
        assert iteration["index"] == index
        assert iteration["max_error"] == pytest.approx((ours - theirs).abs().max().item(), abs=1e-4)
        assert iteration["mean_error"] == pytest.approx((ours - theirs).abs().mean().item(), abs=1e-5)
        assert iteration["our_loss"] == pytest.approx(our_loss, abs=1e-5)
        assert iteration["their_loss"] == pytest.approx(their_loss, abs=1e-5)
        assert iteration["loss_error"] == pytest.approx(abs(our_loss - their_loss), abs=2e-5)
        assert iteration["agreement"] == (ours.argmax(-1) == theirs.argmax(-1)).double().mean().item()
        lines = result.stdout.splitlines()[3 * index : 3 * index + 3]
        assert lines[0] == f"Iteration {index}..."
        assert lines[1] == f"Max absolute error in the logits: {iteration['max_error']:.6f}"
        assert lines[2] == (
            f"Abs loss error: {iteration['loss_error']:.6f} "
            f"Our loss: {iteration['our_loss']:.3f}, theirs: {iteration['their_loss']:.3f}"
        )
    assert len(report["iterations"]) == 3


def test_json_holds_the_verdict_and_what_was_allowed(published, ckpt, tmp_path):
    verify(ckpt, published, "--json", tmp_path / "figures.json")

    report = json.loads((tmp_path / "figures.json").read_text())
    assert report["passed"] is True
    assert (report["dtype"], report["tp"]) == ("float32", 1)
    assert report["tolerance"] == {"max_error": 1e-3, "mean_error": pytest.approx(1e-4)}


def test_a_failed_verification_writes_its_figures_too(published, ckpt, tmp_path):
    result = verify(ckpt, published, "--tolerance", 0, "--json", tmp_path / "figures.json")

    assert result.exit_code == 1
    assert json.loads((tmp_path / "figures.json").read_text())["passed"] is False


def test_ten_iterations_are_the_default(published, ckpt):
    result = megacore("verify", ckpt, "--reference", published.directory, "--random-ids", "--seq-length", 8)

    assert [line for line in result.stdout.splitlines() if line.startswith("Iteration")] == [
        f"Iteration {index}..." for index in range(10)
    ]


def test_the_default_length_is_the_models_where_that_is_short(published, ckpt, tmp_path):
    ids = some_ids(64 + 1)  # just enough for one sample of max_position_embeddings
    data = write_dataset(tmp_path / "data", ids)

    result = megacore("verify", ckpt, "--reference", published.directory, "--data", data, "--iters", 1)

    assert result.exit_code == 0, result.output
    with torch.no_grad():
        logits = published.model(torch.tensor([ids[:-1]])).logits[0]
    assert f"theirs: {F.cross_entropy(logits, torch.tensor(ids[1:])).item():.3f}" in result.stdout


# Tolerance


@pytest.fixture
def one_logit_off(publish, shapes, tmp_path):
    """A checkpoint and a reference that differ in one row of the head, and by how much their logits do at most."""
    published, other = (publish(**shapes["multi-head"]) for _ in range(2))
    with other.edited_tensors() as tensors:
        tensors["lm_head.weight"][7] *= 1.01
    convert("llama", published.directory, tmp_path / "ckpt")
    ids = some_ids(21)
    with torch.no_grad():
        error = 0.01 * published.model(torch.tensor([ids[:-1]])).logits[0, :, 7].abs().max().item()
    data = write_dataset(tmp_path / "data", ids)

    def run(*options):
        return verify(tmp_path / "ckpt", other, "--iters", 1, *options, ids=("--data", data))

    return run, error


@pytest.mark.parametrize("share, exit_code", [(1.01, 0), (0.99, 1)])
def test_the_tolerance_bounds_the_largest_error(one_logit_off, share, exit_code):
    run, error = one_logit_off
    assert error > 0.01

    result = run("--tolerance", share * error)

    assert result.exit_code == exit_code, result.output
    assert f"(allowed {share * error:g})" in result.stdout


def test_the_mean_error_is_allowed_a_tenth(publish, shapes, tmp_path):
    published, other = (publish(**shapes["multi-head"]) for _ in range(2))
    with other.edited_tensors() as tensors:
        tensors["lm_head.weight"] *= 1.001  # every logit is off by as much as its own size asks for
    convert("llama", published.directory, tmp_path / "ckpt")

    result = verify(tmp_path / "ckpt", other, "--json", tmp_path / "figures.json", "--tolerance", 0.005)

    iterations = json.loads((tmp_path / "figures.json").read_text())["iterations"]
    assert max(iteration["max_error"] for iteration in iterations) < 0.005
    assert max(iteration["mean_error"] for iteration in iterations) > 0.0005
    assert result.exit_code == 1
    assert "(allowed 0.0005)" in result.stdout


@pytest.mark.parametrize("dtype, name", [("bf16", "bfloat16"), ("fp16", "float16")])
def test_in_16_bit_the_mean_error_decides_and_the_agreement_is_told(published, ckpt, tmp_path, dtype, name):
    result = verify(ckpt, published, "--dtype", dtype, "--json", tmp_path / "figures.json")

    report = json.loads((tmp_path / "figures.json").read_text())
    assert max(iteration["max_error"] for iteration in report["iterations"]) > 1e-3
    assert report["tolerance"] == {"max_error": None, "mean_error": 0.1}
    assert result.exit_code == 0, result.output
    verdict = (
        rf"Verified in {name}, tp 1: over 3 iterations, logit error at most {A_NUMBER}, "
        rf"on average at most {A_NUMBER} \(allowed 0\.1\), loss error at most {A_NUMBER}, "
        rf"same most likely token at {A_NUMBER}% of positions"
    )
    assert re.fullmatch(verdict, result.stdout.splitlines()[-1])


def test_in_16_bit_the_tolerance_bounds_the_mean_error(published, ckpt):
    result = verify(ckpt, published, "--dtype", "bf16", "--tolerance", 1e-5)

    assert result.exit_code == 1
    assert "NOT VERIFIED in bfloat16" in result.stdout
    assert "(allowed 1e-05)" in result.stdout


def test_in_float64_the_reference_computes_in_float64_too(published, ckpt):
    # transformers computes norms and softmax in float32 even so
    result = verify(ckpt, published, "--dtype", "fp64", "--tolerance", 2e-5)

    assert result.exit_code == 0, result.output
    assert "Verified in float64" in result.stdout


# Where the token ids come from


def test_random_ids_are_the_same_every_time(published, ckpt):
    assert verify(ckpt, published).stdout == verify(ckpt, published).stdout


def test_text_is_read_with_the_checkpoints_own_tokenizer(published, tmp_path):
    words = [f"w{number}" for number in range(99)]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, "w0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(published.directory / "tokenizer.json"))
    convert("llama", published.directory, tmp_path / "ckpt")
    ids = some_ids(61)
    (tmp_path / "text.txt").write_text(" ".join(words[i] for i in ids))

    result = verify(tmp_path / "ckpt", published, ids=("--text", tmp_path / "text.txt"))

    assert result.exit_code == 0, result.output
    for index in range(3):
        with torch.no_grad():
            logits = published.model(torch.tensor([ids[20 * index : 20 * index + 20]])).logits[0]
        loss = F.cross_entropy(logits, torch.tensor(ids[20 * index + 1 : 20 * index + 21])).item()
        assert f"theirs: {loss:.3f}" in result.stdout.splitlines()[3 * index + 2]


def test_a_checkpoint_that_is_cut_is_verified_in_one_process_with_tp_1(published, ckpt, tmp_path):
    split(ckpt, tmp_path / "cut", tp=2, pp=2)

    result = verify(tmp_path / "cut", published, "--tp", 1)

    assert result.exit_code == 0, result.output
    assert result.stdout == verify(ckpt, published).stdout


# Mistakes


@pytest.mark.parametrize(
    "ids",
    [
        (),
        ("--random-ids", "--data", "data"),
        ("--text", "text.txt", "--data", "data"),
        ("--random-ids", "--text", "text.txt"),
    ],
    ids=["none", "random and data", "text and data", "random and text"],
)
def test_anything_but_one_source_of_token_ids_is_a_mistake(published, ckpt, ids):
    result = verify(ckpt, published, ids=ids)

    assert result.exit_code == 2
    assert "Give one of --data, --text and --random-ids." in result.stderr
    assert result.stdout == ""


def test_a_dataset_with_ids_beyond_the_vocabulary_is_a_mistake(published, ckpt, tmp_path):
    data = write_dataset(tmp_path / "data", [*some_ids(70), 99])

    result = verify(ckpt, published, "--iters", 1, "--seq-length", 70, ids=("--data", data))

    assert result.exit_code == 2
    assert "has token id 99" in result.stderr


def test_too_little_data_is_a_mistake(published, ckpt, tmp_path):
    result = verify(ckpt, published, ids=("--data", write_dataset(tmp_path / "data", some_ids(41))))

    assert result.exit_code == 2
    assert "has 2 samples of 20 tokens, not 3" in result.stderr


def test_text_without_a_tokenizer_is_a_mistake(published, ckpt, tmp_path):
    (tmp_path / "text.txt").write_text("some text")

    result = verify(ckpt, published, ids=("--text", tmp_path / "text.txt"))

    assert result.exit_code == 2
    assert "has no tokenizer" in result.stderr


def test_a_reference_of_another_vocabulary_fails_the_check(publish, shapes, ckpt):
    result = verify(ckpt, publish(**shapes["2 key-value heads"] | {"vocab_size": 105}))

    assert result.exit_code == 1
    assert "our logits are [20, 99] and the reference's [20, 105]" in result.stderr


def test_a_reference_that_lacks_a_tensor_is_refused(published, ckpt):
    # transformers by itself would fill it with random numbers and say so in a warning
    with published.edited_tensors() as tensors:
        del tensors["model.layers.2.mlp.up_proj.weight"]

    result = verify(ckpt, published)

    assert result.exit_code == 2
    assert "lacks model.layers.2.mlp.up_proj.weight" in result.stderr


def test_a_truncated_reference_is_refused_in_one_line(published, ckpt):
    file = published.directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])

    result = verify(ckpt, published)

    assert result.exit_code == 2
    assert "transformers cannot load the reference" in result.stderr
    assert "Traceback" not in result.output


@pytest.mark.parametrize("missing", ["reference", "checkpoint"])
def test_a_directory_that_is_not_there_is_a_mistake(published, ckpt, tmp_path, missing):
    nowhere = tmp_path / "nowhere"
    checkpoint, reference = (nowhere, published.directory) if missing == "checkpoint" else (ckpt, nowhere)

    result = megacore("verify", checkpoint, "--reference", reference, "--random-ids")

    assert result.exit_code == 2
    assert f"{nowhere} is not a directory" in result.stderr


def test_a_file_for_the_figures_that_cannot_be_written_is_said_before_the_work(published, ckpt, tmp_path):
    result = verify(ckpt, published, "--json", tmp_path / "nowhere" / "figures.json")

    assert result.exit_code == 2
    assert str(tmp_path / "nowhere") in result.stderr
    assert result.stdout == ""
