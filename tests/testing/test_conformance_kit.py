"""The conformance kit on broken plugins: each fault fails the check that is there for it, with a message that says it.

Every broken plugin is the one that ``megacore new-plugin`` writes, which passes the kit (see ``test_plugin_guide.py``),
with one fault put in. All are installed side by side and tested in one run of pytest, in a process of its own.
"""

from __future__ import annotations

import re
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
import torch

from megacore.cli.new_plugin import render_plugin
from megacore.testing import faults
from megacore.weights.rules import Copy, SwappedHalves
from plugin_on_path import lay_out, run_pytest


class Fault:
    """What is broken, and how the kit is to say it.

    Attributes:
        check: fails.
        message: is matched by what that check says.
        changes: (file, what stands there in a good plugin, what does instead).
    """

    def __init__(self, check: str, message: str, *changes: tuple[str, str, str]) -> None:
        self.check = check
        self.message = message
        self.changes = changes


PROJECT = "pyproject.toml"
INIT, CONFIG, WEIGHTS, LAYER, TESTS = "__init__.py", "config.py", "weights.py", "layer.py", "tests/test_conformance.py"
LOGITS = "test_logits_are_those_of_the_reference"
TRANSPOSED = """
from megacore.checkpoint.matrix import LazyMatrix

class Transposed(Copy):
    def to_native(self, parts, order):
        class Columns(LazyMatrix):
            def read(self, rows, columns):
                return parts[0].read(columns, slice(0, parts[0].rows)).T[rows]
        return Columns(parts[0].rows, parts[0].columns, parts[0].dtype)

def hf_weight_map(config):"""
SHIFTED = """
class Shifted(Copy):
    def for_layer(self, layer):
        return Copy(self.native.replace("*", str(layer)), self.sources[0].replace("*", str((layer + 1) % 3)))

def hf_weight_map(config):"""

FAULTS = {
    "a transposed weight": Fault(
        LOGITS,
        r"They agree once\s+- model\.layers\.\*\.self_attn\.o_proj\.weight is transposed$",
        (
            WEIGHTS,
            'Copy("decoder.layers.*.self_attention.linear_proj',
            'Transposed("decoder.layers.*.self_attention.linear_proj',
        ),
        (WEIGHTS, "\ndef hf_weight_map(config):", TRANSPOSED),
    ),
    "keys and values swapped": Fault(
        LOGITS,
        r"They agree once\s+- the rows of keys and values \(weight\) are swapped$",
        (
            WEIGHTS,
            'k="model.layers.*.self_attn.k_proj.weight",\n            v="model.layers.*.self_attn.v_proj.weight"',
            'k="model.layers.*.self_attn.v_proj.weight",\n            v="model.layers.*.self_attn.k_proj.weight"',
        ),
    ),
    "biases of keys and values swapped": Fault(
        LOGITS,
        r"They agree once\s+- the rows of keys and values \(bias\) are swapped$",
        (
            WEIGHTS,
            'k="model.layers.*.self_attn.k_proj.bias",\n            v="model.layers.*.self_attn.v_proj.bias"',
            'k="model.layers.*.self_attn.v_proj.bias",\n            v="model.layers.*.self_attn.k_proj.bias"',
        ),
    ),
    "a rotary layout of pairs": Fault(
        LOGITS,
        r"They agree once\s+- the rows of each query and key head go from \w+( \w+)* to (halves|interleaved pairs)"
        r"\s+- qkv_permutation returns grouped_qkv_rows\(config\)$",
        (
            INIT,
            "    return grouped_qkv_rows(config)",
            "    pairs = [0, 2, 4, 1, 3, 5]\n"
            "    rows = grouped_qkv_rows(config)\n"
            "    return [row if row >= 36 + 18 else row // 6 * 6 + pairs[row % 6] for row in rows]",
        ),
    ),
    "no grouping of the heads": Fault(
        LOGITS,
        r"They agree once\s+- qkv_permutation returns grouped_qkv_rows\(config\)$",
        (INIT, "return grouped_qkv_rows(config)", "return range(len(grouped_qkv_rows(config)))"),
    ),
    "gate and up swapped": Fault(
        LOGITS,
        r"They agree once\s+- the two parts of the Stacked rules \(gate and up\) are swapped$",
        (
            WEIGHTS,
            'gate="model.layers.*.mlp.gate_proj.weight",\n            up="model.layers.*.mlp.up_proj.weight"',
            'up="model.layers.*.mlp.up_proj.weight",\n            gate="model.layers.*.mlp.gate_proj.weight"',
        ),
    ),
    "a norm of the next layer": Fault(
        LOGITS,
        r"They agree once\s+- \S+\.input_layernorm\.weight of each layer is taken from the previous layer$",
        (WEIGHTS, 'Copy("decoder.layers.*.input_layernorm', 'Shifted("decoder.layers.*.input_layernorm'),
        (WEIGHTS, "\ndef hf_weight_map(config):", SHIFTED),
    ),
    "the norms exchanged": Fault(
        LOGITS,
        r"They agree once\s+- \S+input_layernorm\.weight and \S+pre_mlp_layernorm\.weight change places$",
        (LAYER, "self.input_layernorm(hidden)", "self.other(hidden)"),
        (LAYER, "self.pre_mlp_layernorm(hidden)", "self.input_layernorm(hidden)"),
        (LAYER, "self.other(hidden)", "self.pre_mlp_layernorm(hidden)"),
    ),
    "another activation": Fault(
        LOGITS,
        r"They agree once\s+- build_layer is given the activation silu$",
        (CONFIG, "qkv_bias=True)", 'qkv_bias=True, activation="gelu")'),
    ),
    "eps under a wrong key": Fault(
        LOGITS,
        r"They agree once\s+- the whole model has the norm_eps 1e-06$",
        (CONFIG, "**published}", '**published, "rms_norm_eps": published["layer_norm_eps"]}'),
        (CONFIG, "    del pub", '    published["layer_norm_eps"] = published.pop("rms_norm_eps")\n    del pub'),
    ),
    "a parallel residual": Fault(
        LOGITS,
        r"No single change [\s\S]*at the first position already they differ: look at .* the order of the residuals",
        (LAYER, "        hidden = hidden + self.post", "        residual = hidden + self.post"),
        (LAYER, "return hidden + self.post", "return residual + self.post"),
    ),
    "a skipped bias": Fault(
        LOGITS,
        r"linear_qkv\.bias has no influence on our logits: does the layer's forward use it\?",
        (LAYER, "        self.mlp =", "        self.self_attention.linear_qkv.has_bias = False\n        self.mlp ="),
    ),
    "no positions": Fault(
        LOGITS,
        r"at the first position the logits agree: look at what depends on other positions, the rotary embedding",
        (LAYER, "(hidden), positions)", "(hidden), Positions())"),
        (LAYER, "HiddenDropout, RMSNorm", "HiddenDropout, Positions, RMSNorm"),
    ),
    "segments that see each other": Fault(
        "test_segments_of_a_row_do_not_see_each_other",
        r"packed into one row, the logits differ by up to \d",
        (LAYER, "(hidden), positions)", "(hidden), replace(positions, segments=None))"),
        (LAYER, "from torch import nn", "from dataclasses import replace\n\nfrom torch import nn"),
    ),
    "keys and values that nothing keeps": Fault(
        "test_tokens_that_come_one_by_one_have_the_logits_of_the_whole",
        r"layer 0 of [\w-]+ does not cache keys and values",
        (LAYER, "(hidden), positions)", "(hidden), replace(positions, cache=None))"),
        (LAYER, "from torch import nn", "from dataclasses import replace\n\nfrom torch import nn"),
    ),
    "a hard-coded eps": Fault(
        "test_a_wrong_eps_shows",
        r"no logit moves by 0\.0001 when norm_eps of the layers is 0\.002",
        # What the tiny configuration says too.
        (LAYER, "super().__init__()\n", "super().__init__()\n        config = replace(config, norm_eps=1e-3)\n"),
        (LAYER, "from torch import nn", "from dataclasses import replace\n\nfrom torch import nn"),
    ),
    "an eps too small to show": Fault(
        "test_a_wrong_eps_shows",
        r"no logit moves by 0\.0001 when norm_eps of the layers is 2e-08",
        (TESTS, '"norm_eps": 1e-3', '"norm_eps": 1e-8'),
    ),
    "a detached branch": Fault(
        "test_gradients_are_those_of_the_reference",
        r"other gradients than the reference's: model\.embed_tokens\.weight \(by ",
        (LAYER, "self.input_layernorm(hidden), ", "self.input_layernorm(hidden.detach()), "),
    ),
    "a norm that knows no ranks": Fault(
        "test_logits_and_gradients_at_tp_2",
        r"rank 0[\s\S]*mixed torch\.Tensor and DTensor",
        (
            LAYER,
            "self.pre_mlp_layernorm = RMSNorm(config, parallel)",
            "self.pre_mlp_layernorm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)",
        ),
    ),
    "a bias that is forgotten": Fault(
        "test_the_weight_map_accounts_for_every_tensor",
        r"not produced by any rule: decoder\.layers\.0\.self_attention\.linear_qkv\.bias",
        (
            WEIGHTS,
            "    if config.tie",
            '    rules = [rule for rule in rules if "bias" not in rule.native]\n    if config.tie',
        ),
    ),
    "a bias that is ignored": Fault(
        "test_the_weight_map_accounts_for_every_tensor",
        r"the reference learns what the weight map ignores: model\.layers\.0\.self_attn\.k_proj\.bias",
        (CONFIG, "qkv_bias=True", "qkv_bias=False"),
        (TESTS, '    "qkv_bias": True,\n', ""),
        (
            WEIGHTS,
            "    if config.tie",
            '    rules = [rule for rule in rules if "bias" not in rule.native]\n    if config.tie',
        ),
        (WEIGHTS, "aliases={", 'ignored=["*.bias"], aliases={'),
    ),
    "a tensor used twice": Fault(
        "test_the_weight_map_accounts_for_every_tensor",
        r"source tensors used by several rules: model\.layers\.0\.self_attn\.v_proj\.bias",
        (WEIGHTS, 'k="model.layers.*.self_attn.k_proj.bias"', 'k="model.layers.*.self_attn.v_proj.bias"'),
    ),
    "a misspelt tensor": Fault(
        "test_the_weight_map_accounts_for_every_tensor",
        r"missing: model\.layers\.0\.mlp\.down_projection\.weight[\s\S]*"
        r"unknown to the weight map: model\.layers\.0\.mlp\.down_proj\.weight",
        (WEIGHTS, "mlp.down_proj", "mlp.down_projection"),
    ),
    "a row twice in the permutation": Fault(
        "test_the_qkv_permutation_can_be_undone",
        r"qkv_permutation of 72 entries that is not a permutation of the 72 rows",
        (INIT, "return grouped_qkv_rows(config)", "return [0, *grouped_qkv_rows(config)[1:-1], 0]"),
    ),
    "a bias that is not permuted": Fault(
        "test_the_qkv_permutation_can_be_undone",
        r"FusedQKV must produce these, or qkv_permutation does not apply: decoder\.layers\.0\.\S+\.linear_qkv\.bias",
        (
            WEIGHTS,
            'FusedQKV(\n            "decoder.layers.*.self_attention.linear_qkv.bias"',
            'Stacked(\n            "decoder.layers.*.self_attention.linear_qkv.bias"',
        ),
        (TESTS, '"num_kv_heads": 3', '"num_kv_heads": 6'),
    ),
    "tied embeddings that are not written": Fault(
        "test_the_configuration_reads_both_ways",
        r"tie_embeddings[\s\S]*False instead of True",
        (CONFIG, "    del pub", '    del published["tie_word_embeddings"]\n    del pub'),
    ),
    "a rotary base that is not read": Fault(
        "test_the_configuration_reads_both_ways",
        r"rope_theta is lost on the way to the format and back",
        (CONFIG, "qkv_bias=True)", "qkv_bias=True, rope_theta=1234.5)"),
    ),
    "any activation will do": Fault(
        "test_a_wrong_configuration_is_refused",
        r"config_from_source reads \{'hidden_act': 'no-such-activation'\} without complaint",
        (CONFIG, "**published}", '**published, "hidden_act": "silu"}'),
    ),
    "an accident with a missing key": Fault(
        "test_a_wrong_configuration_is_refused",
        r"without 'num_attention_heads', config_from_source raises IndexError",
        (
            CONFIG,
            "**published}",
            '**published, "num_attention_heads": [n for n in [published.get("num_attention_heads")] if n][0]}',
        ),
    ),
    "a reference of random weights": Fault(
        "test_the_reference_is_independent_and_repeatable",
        r"the reference has other weights than the files: .*; does it load path\?",
        (INIT, "published, path, dtype", "published, None, dtype"),
    ),
    "torch at the top": Fault(
        "test_importing_the_plugin_is_light",
        r"layer\.py., line 3, in <module>\s+from torch import nn[\s\S]*torch is imported while the plugin loads",
        (INIT, "from megacore import ModelFamily", "from PACKAGE.layer import LAYER\nfrom megacore import ModelFamily"),
    ),
    "any source will do": Fault(
        "test_an_unsupported_source_is_refused",
        r"weight_map answers for the unknown format 'no-such-format' with <megacore\.weights",
        (INIT, "    if source !=", "    if False and source !="),
    ),
    "a source that nobody tests": Fault(
        "test_every_source_is_tested",
        r"no test class of family '[a-z0-9-]+' has meta among its sources",
        (INIT, "        ModelFamily(", '        ModelFamily(\n            sources=("hf", "meta"),'),
    ),
    "a hook that is missing": Fault(
        "test_the_plugin_is_found",
        r"is not available: megacore-[a-z0-9-]+ 0\.1\.0 lacks the hooks build_layer",
        (INIT, "@hookimpl\ndef build_layer", "def build_layer"),
    ),
    "another core": Fault(
        "test_the_plugin_is_found",
        r"is not available: megacore-[a-z0-9-]+ 0\.1\.0 needs megacore >=9, installed is",
        (PROJECT, "megacore>=0.1,<0.2", "megacore>=9"),
    ),
    "any core": Fault(
        "test_the_plugin_pins_the_core",
        r"megacore has no upper bound",
        (PROJECT, "megacore>=0.1,<0.2", "megacore"),
    ),
    "not installed": Fault(
        "test_the_plugin_is_found",
        r"no plugin for not-installed is installed; pip install megacore-not-installed",
        (
            PROJECT,
            "[project.entry-points.megacore]",
            '[project.entry-points.megacore]\nunrelated = "json"\n\n[project.entry-points.other]',
        ),
    ),
    "a check deleted": Fault(
        "test_the_kit_is_intact",
        r"deleted or overridden without @pytest\.mark\.xfail\(reason=\.\.\.\): test_logits_are_those_of_the_reference$",
        (TESTS, "    def tiny_configs", "    test_logits_are_those_of_the_reference = None\n\n    def tiny_configs"),
    ),
    "a check overridden": Fault(
        "test_the_kit_is_intact",
        r"deleted or overridden without @pytest\.mark\.xfail\(reason=\.\.\.\): test_the_round_trip_is_bit_exact$",
        (
            TESTS,
            "    def tiny_configs",
            "    def test_the_round_trip_is_bit_exact(self):\n        pass\n\n    def tiny_configs",
        ),
    ),
    "a helper overridden": Fault(
        "test_the_kit_is_intact",
        r"deleted or overridden without @pytest\.mark\.xfail\(reason=\.\.\.\): _check_visible$",
        (
            TESTS,
            "    def tiny_configs",
            "    def _check_visible(self, case, plant):\n        pass\n\n    def tiny_configs",
        ),
    ),
    "no formats": Fault(
        "test_the_kit_is_intact",
        r"sources names no format: nothing is tested",
        (TESTS, "    def tiny_configs", "    sources = ()\n\n    def tiny_configs"),
    ),
    "no configurations": Fault(
        "test_the_kit_is_intact",
        r"tiny_configs\(\) returns no configuration: nothing is tested",
        (TESTS, "    def tiny_configs", "    def tiny_configs(self):\n        return {}\n\n    def other_configs"),
    ),
    "a single layer": Fault(
        "test_the_configuration_can_show_a_fault",
        r"give the tiny configuration 2 layers or more",
        (TESTS, '"num_layers": 3', '"num_layers": 1'),
    ),
}


def family_of(fault: str) -> str:
    return re.sub("[^a-z]+", "-", fault.lower())


def broken_plugin(name: str, fault: Fault) -> dict[str, str]:
    """The files of a plugin with the fault in it; its package is called after the fault."""
    files = render_plugin(family_of(name))
    package = next(path for path in files if path.endswith("/__init__.py")).removesuffix("/__init__.py")
    layer = re.findall(r"class (\w+Layer)", files[f"{package}/layer.py"])[0]
    for file, old, new in fault.changes:
        path = file if file in files else f"{package}/{file}"
        assert old in files[path], f"{path} has no {old!r}"
        files[path] = files[path].replace(old, new.replace("PACKAGE", package).replace("LAYER", layer))
    files[f"tests/test_{package}.py"] = files.pop(TESTS)
    return files


@pytest.fixture(scope="module")
def said(tmp_path_factory) -> dict[str, str]:
    """What the check that has to fail said of each fault; nothing of a fault that it let pass."""
    site = tmp_path_factory.mktemp("broken")
    checks = []
    for name, fault in FAULTS.items():
        files = broken_plugin(name, fault)
        lay_out(files, site)
        tests = next(path for path in files if path.startswith("tests/"))
        test_class = re.findall(r"class (\w+)", files[tests])[0]
        checks.append(f"{tests}::{test_class}::{fault.check}")

    result = run_pytest(site, "--junitxml=report.xml", "--import-mode=importlib", "-k", "not untied", *checks)

    assert result.returncode == 1, result.stdout + result.stderr
    messages: dict[str, str] = {}
    by_module = {family_of(name).replace("-", "_"): name for name in FAULTS}
    for case in ElementTree.parse(site / "report.xml").iter("testcase"):
        module = case.attrib["classname"].split(".")[1].removeprefix("test_megacore_")
        for outcome in (*case.findall("failure"), *case.findall("error")):
            messages.setdefault(by_module[module], "\n".join(re.findall("(?m)^E +(.*)", outcome.text or "")))
    return messages


@pytest.mark.parametrize("name", FAULTS)
def test_the_check_that_is_there_for_it_says_what_is_wrong(said, name):
    assert name in said, f"{FAULTS[name].check} passes with {name}"
    assert re.search(FAULTS[name].message, said[name], re.MULTILINE), said[name]


def test_a_check_that_an_override_excuses_is_no_fault(tmp_path):
    files = render_plugin("excused")
    files[TESTS] = (
        "import pytest\n"
        + files[TESTS]
        + '\n    @pytest.mark.xfail(reason="the reference is a service")\n'
        + "    def test_gradients_are_those_of_the_reference(self, case):\n"
        + "        raise NotImplementedError\n"
    )
    lay_out(files, tmp_path)

    result = run_pytest(tmp_path, "-k", "intact or gradients_are", TESTS)

    assert result.returncode == 0, result.stdout
    assert "1 passed" in result.stdout
    assert "2 xfailed" in result.stdout


def test_the_check_that_watches_over_the_others_cannot_be_replaced():
    from megacore.testing import ModelFamilyTests

    with pytest.raises(TypeError, match="TestSly replaces test_the_kit_is_intact"):
        type("TestSly", (ModelFamilyTests,), {"test_the_kit_is_intact": None})


def test_a_gate_and_up_in_one_source_tensor_are_swapped_too():
    rules = {"fc1": SwappedHalves("fc1", "published"), "fc2": Copy("fc2", "other")}
    parameters = {"fc1": torch.arange(4.0).view(4, 1), "fc2": torch.zeros(2, 2)}
    case = SimpleNamespace(bound=SimpleNamespace(rules=rules), parameters=parameters, converted_config=None)

    (fault,) = faults.swapped_gate_and_up(case)

    assert fault.description == "the two parts of the SwappedHalves rules (gate and up) are swapped"
    assert fault.parameters["fc1"].flatten().tolist() == [2, 3, 0, 1]
