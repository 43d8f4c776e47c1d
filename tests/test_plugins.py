"""Plugins from the outside: distributions that lie on ``sys.path``, good ones and each way of being broken."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
from importlib.metadata import entry_points, version
from types import ModuleType

import click
import pytest
from click.testing import CliRunner
from packaging.requirements import Requirement

import megacore.plugins
from megacore import hookimpl
from megacore.cli.options import FamilyType
from megacore.cli.plugins import plugins as plugins_command
from megacore.errors import ConfigError, PluginError, UnsupportedSourceError
from megacore.plugins import PluginRegistry

REALLY_INSTALLED = [entry_point.dist for entry_point in entry_points(group="megacore")]

PREAMBLE = """
from megacore import ModelConfig, ModelFamily, hookimpl

SIZE = dict(
    num_layers=1, hidden_size=4, ffn_hidden_size=8, num_attention_heads=2, num_kv_heads=2, head_dim=2, vocab_size=7,
    max_position_embeddings=16, norm_eps=1e-5,
)

def model_family(name, *architectures):
    return ModelFamily(
        name=name,
        architectures=architectures,
        config_from_source=lambda published, source: ModelConfig(family=name, **SIZE),
        config_to_source=lambda config, source: {},
        presets={"7b": SIZE, "30b": {**SIZE, "num_layers": 2}},
    )
"""

HOOKS = {
    "model_families": """
@hookimpl
def model_families():
    return [model_family("FAMILY")]
""",
    "weight_map": """
@hookimpl
def weight_map(config, source):
    return ("FAMILY map", config, source)
""",
    "qkv_permutation": """
@hookimpl
def qkv_permutation(config):
    return [1, 0]
""",
    "load_reference": """
@hookimpl
def load_reference(config, path, dtype, device):
    return ("reference", config, path, dtype, device)
""",
    "build_layer": """
@hookimpl
def build_layer(layer_index, parallel):
    return ("layer", layer_index, parallel)
""",
}


def plugin_source(family: str = "mpt", **changed: str | None) -> str:
    """The text of a plugin for ``family``. A hook that is given takes the place of the usual one, ``None`` of none."""
    hooks = {**HOOKS, **changed}
    return PREAMBLE + "\n".join(text.replace("FAMILY", family) for text in hooks.values() if text)


def plugin_in_memory(source: str) -> ModuleType:
    module = ModuleType("in_memory")
    exec(source, vars(module))
    return module


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Puts a distribution, version 1.0, on ``sys.path``: ``install("megacore-mpt", plugin_source("mpt"))``.

    What is really installed is switched off, so that messages name the fake distributions only.
    """
    monkeypatch.syspath_prepend(tmp_path)
    switch_off(monkeypatch)
    modules = set(sys.modules)

    def write(distribution, source, *, entry_point=None, requires="megacore", attribute=""):
        module = distribution.replace("-", "_")
        (tmp_path / f"{module}.py").write_text(source)
        metadata = tmp_path / f"{module}-1.0.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\nRequires-Dist: {requires}\n"
        )
        name = entry_point or distribution.removeprefix("megacore-")
        (metadata / "entry_points.txt").write_text(f"[megacore]\n{name} = {module}{attribute}\n")

    yield write
    for module in set(sys.modules) - modules:
        if getattr(sys.modules[module], "__file__", None) == str(tmp_path / f"{module}.py"):
            del sys.modules[module]


def switch_off(monkeypatch, *distributions):
    names = [*(distribution.name for distribution in REALLY_INSTALLED), *distributions]
    monkeypatch.setenv("MEGACORE_DISABLE_PLUGINS", ",".join(names))


def load() -> PluginRegistry:
    """A registry of what was installed so far, without the distributions that are really there."""
    registry = PluginRegistry()
    registry.load_entry_points()
    real = {distribution.name for distribution in REALLY_INSTALLED}
    registry.plugins = [plugin for plugin in registry.plugins if plugin.distribution not in real]
    return registry


def message(call, *arguments, of=PluginError) -> str:
    with pytest.raises(of) as caught:
        call(*arguments)
    return str(caught.value)


def why_not_available(family: str = "mpt") -> str:
    """What a user is told who asks for a family of the one plugin, megacore-mpt, that is installed and broken."""
    told = message(load().get_family, family)
    beginning = f"model family '{family}' is not available: megacore-mpt 1.0 "
    assert told.startswith(beginning)
    return told.removeprefix(beginning)


# A plugin that works


def test_the_four_hooks_of_a_family_are_asked_of_its_plugin(install):
    install("megacore-mpt", plugin_source("mpt"))

    family = load().get_family("mpt")

    assert family.weight_map("config", "hf") == ("mpt map", "config", "hf")
    assert family.qkv_permutation("config", "hf") == [1, 0]
    assert family.load_reference("config", "path", "dtype", "cpu") == ("reference", "config", "path", "dtype", "cpu")
    assert family.build_layer("config", 3, "parallel") == ("layer", 3, "parallel")


def test_a_family_knows_its_name_its_declaration_and_who_provides_it(install):
    install("megacore-mpt", plugin_source("mpt"))

    family = load().get_family("mpt")

    assert (family.name, family.family.name, family.label) == ("mpt", "mpt", "megacore-mpt 1.0")
    assert (family.plugin.distribution, family.plugin.version, family.plugin.status) == (
        "megacore-mpt",
        "1.0",
        "active",
    )


def test_only_the_owner_of_a_family_is_asked(install):
    for name in ("bloom", "mpt", "opt"):
        install(f"megacore-{name}", plugin_source(name))

    registry = load()

    assert registry.list_families() == ["bloom", "mpt", "opt"]
    assert [registry.get_family(name).weight_map("config", "hf")[0] for name in ("opt", "bloom", "mpt")] == [
        "opt map",
        "bloom map",
        "mpt map",
    ]


def test_one_plugin_may_provide_several_families(install):
    two = """
@hookimpl
def model_families():
    yield model_family("mpt")
    yield model_family("mpt-chat")
"""
    install("megacore-mpt", plugin_source(model_families=two))

    registry = load()

    assert registry.list_families() == ["mpt", "mpt-chat"]
    assert registry.get_family("mpt-chat").label == "megacore-mpt 1.0"


def test_what_a_hook_raises_reaches_the_caller_as_it_is(install):
    raises = """
from megacore.errors import UnsupportedSourceError

@hookimpl
def weight_map(source):
    raise UnsupportedSourceError(f"mpt is not published in the format {source}")
"""
    install("megacore-mpt", plugin_source(weight_map=raises))

    family = load().get_family("mpt")

    told = message(family.weight_map, "config", "meta", of=UnsupportedSourceError)
    assert told == "mpt is not published in the format meta"


def test_a_plugin_without_families_may_wrap_the_hooks_of_all_families(install):
    traces = """
@hookimpl(wrapper=True)
def weight_map(source):
    answer = yield
    return ("traced", source, answer[0])
"""
    install("megacore-mpt", plugin_source("mpt"))
    install("megacore-trace", PREAMBLE + traces)

    assert load().get_family("mpt").weight_map("config", "hf") == ("traced", "hf", "mpt map")


def test_an_instance_is_a_plugin_and_its_properties_are_not_evaluated():
    class TracingPlugin:
        @property
        def connection(self):
            raise ConnectionError("evaluated while loading")

        @hookimpl(wrapper=True)
        def build_layer(self, layer_index):
            return ("traced", layer_index, (yield))

    registry = PluginRegistry()
    registry.register(plugin_in_memory(plugin_source("mpt")), distribution="megacore-mpt")
    registry.register(TracingPlugin(), distribution="megacore-trace")

    assert registry.get_family("mpt").build_layer("config", 0, "p") == ("traced", 0, ("layer", 0, "p"))


def test_a_lazy_module_stays_lazy(install):
    lazy = """
def __getattr__(name):
    raise AssertionError(f"{name} was looked up while loading")

def __dir__():
    return [*globals(), "HeavyModel"]
"""
    install("megacore-mpt", plugin_source("mpt") + lazy)

    assert load().list_families() == ["mpt"]


def test_a_plugin_in_memory_is_registered_under_the_name_of_a_distribution():
    registry = PluginRegistry()

    record = registry.register(plugin_in_memory(plugin_source("mpt")), distribution="megacore-mpt", version="2.0")

    assert (record.label, record.status, record.entry_point) == ("megacore-mpt 2.0", "active", "megacore-mpt")
    assert registry.get_family("mpt").qkv_permutation("config", "hf") == [1, 0]


def test_a_new_registry_is_empty():
    assert PluginRegistry().plugins == []


def test_architectures_lead_to_the_families_that_read_them(install):
    for name, architectures in {"mpt": ["MPTForCausalLM"], "mpt2": ["MPTForCausalLM", "MPT2ForCausalLM"]}.items():
        reads = f"@hookimpl\ndef model_families():\n    return [model_family({name!r}, *{architectures})]\n"
        install(f"megacore-{name}", plugin_source(name, model_families=reads))

    registry = load()

    assert registry.families_for_architecture("MPTForCausalLM") == ["mpt", "mpt2"]
    assert registry.families_for_architecture("MPT2ForCausalLM") == ["mpt2"]
    assert registry.families_for_architecture("GPT2LMHeadModel") == []


def test_a_preset_is_the_configuration_of_a_published_size(install):
    install("megacore-mpt", plugin_source("mpt"))

    config = load().get_family("mpt").preset("30b")

    assert (config.family, config.num_layers, config.hidden_size) == ("mpt", 2, 4)


def test_an_unknown_size_is_answered_with_the_known_ones(install):
    install("megacore-mpt", plugin_source("mpt"))

    told = message(load().get_family("mpt").preset, "3b", of=ConfigError)

    assert told == "model family 'mpt' has no size '3b'. Known sizes: 7b, 30b."


# A family that is not there


@pytest.mark.parametrize("asked", ["mtp", "MPT"])
def test_a_misspelt_family_is_answered_with_the_nearest_one(install, asked):
    install("megacore-mpt", plugin_source("mpt"))
    install("megacore-bloom", plugin_source("bloom"))

    told = message(load().get_family, asked)

    assert told == f"no plugin for {asked} is installed. Did you mean 'mpt'? Installed: bloom, mpt."


def test_a_family_that_nothing_installed_resembles_is_answered_with_how_to_install_it(install):
    install("megacore-mpt", plugin_source("mpt"))

    told = message(load().get_family, "bloom")

    assert told == "no plugin for bloom is installed; pip install megacore-bloom. Installed: mpt."


def test_without_any_plugin_the_answer_says_so(install):
    told = message(load().get_family, "mpt")

    assert told == "no plugin for mpt is installed; pip install megacore-mpt. Installed: none."


def test_a_path_in_the_place_of_a_family_is_no_package_to_install(install):
    install("megacore-mpt", plugin_source("mpt"))

    assert message(load().get_family, "org/model-7b") == "no plugin for 'org/model-7b' is installed. Installed: mpt."


def test_an_unknown_family_may_belong_to_a_plugin_that_was_not_loaded(install):
    install("megacore-mosaic", "import mosaic_missing")

    told = message(load().get_family, "mpt")

    assert told == (
        "no plugin for mpt is installed; pip install megacore-mpt. Installed: none.\n"
        "Not loaded: megacore-mosaic 1.0; `megacore plugins` says why."
    )


# Plugins that get in each other's way


def test_a_family_that_two_plugins_provide_is_refused_with_both_names_and_the_remedy(install):
    install("megacore-mpt", plugin_source("mpt"))
    install("acme-mpt", plugin_source("mpt"), entry_point="mpt")
    install("megacore-opt", plugin_source("opt"))

    registry = load()

    assert message(registry.get_family, "mpt") == (
        "model family 'mpt' is provided by 2 plugins:\n"
        "  - acme-mpt 1.0\n"
        "  - megacore-mpt 1.0\n"
        "Uninstall all but one, or set MEGACORE_DISABLE_PLUGINS=<distribution>[,<distribution>]."
    )
    assert registry.get_family("opt").label == "megacore-opt 1.0"


@pytest.mark.parametrize("spelling", ["acme-mpt", "Acme_MPT", " acme.mpt"])
def test_switching_one_of_two_plugins_off_leaves_the_family_to_the_other(install, monkeypatch, spelling):
    install("megacore-mpt", plugin_source("mpt"))
    install("acme-mpt", plugin_source("mpt"), entry_point="mpt")

    switch_off(monkeypatch, spelling)
    registry = load()

    assert registry.get_family("mpt").label == "megacore-mpt 1.0"
    assert [plugin.status for plugin in registry.plugins] == ["disabled", "active"]


def test_a_family_that_was_switched_off_is_not_called_missing(install, monkeypatch):
    install("megacore-mpt", "raise AssertionError('a plugin that is switched off is not imported')")

    switch_off(monkeypatch, "megacore-mpt")

    assert why_not_available() == "is disabled by MEGACORE_DISABLE_PLUGINS"


def test_a_working_plugin_serves_a_family_whose_other_plugin_is_broken(install):
    install("megacore-mpt", plugin_source("mpt"))
    install("acme-mpt", "import mosaic_missing", entry_point="mpt")

    assert load().get_family("mpt").label == "megacore-mpt 1.0"


def test_two_entry_points_to_one_module_are_one_plugin(install, tmp_path):
    install("megacore-mpt", plugin_source("mpt"))
    listing = tmp_path / "megacore_mpt-1.0.dist-info" / "entry_points.txt"
    listing.write_text(listing.read_text() + "mpt-chat = megacore_mpt\n")

    registry = load()

    assert registry.get_family("mpt").label == "megacore-mpt 1.0"
    assert message(registry.get_family, "mpt-chat") == (
        "model family 'mpt-chat' is not available: "
        "megacore-mpt 1.0 is loaded already, by entry point 'mpt' of megacore-mpt 1.0"
    )


# Plugins that cannot be loaded


@pytest.mark.parametrize(
    ("statement", "reason"),
    [
        ("import mosaic_missing", "ModuleNotFoundError: No module named 'mosaic_missing'"),
        ("raise RuntimeError('two\\n  lines')", "RuntimeError: two lines"),
        ("raise ValueError", "ValueError"),
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("def broken(:", "SyntaxError: invalid syntax (megacore_mpt.py, line 1)"),
    ],
)
def test_an_import_that_fails_is_told_with_its_exception(install, statement, reason):
    install("megacore-mpt", statement)

    assert why_not_available() == f"could not be imported: {reason}"


def test_a_missing_attribute_is_told_like_a_failed_import(install):
    install("megacore-mpt", plugin_source("mpt"), attribute=":plugin")

    assert why_not_available() == (
        "could not be imported: AttributeError: module 'megacore_mpt' has no attribute 'plugin'"
    )


def test_ctrl_c_while_loading_is_not_a_defect_of_the_plugin(install):
    install("megacore-mpt", "raise KeyboardInterrupt")

    with pytest.raises(KeyboardInterrupt):
        load()


def test_a_pin_that_excludes_this_megacore_is_told_with_both_versions(install):
    install("megacore-mpt", "raise AssertionError('not imported')", requires="Megacore<0.1,>=0.0.2")

    assert why_not_available() == f"needs megacore <0.1,>=0.0.2, installed is {version('megacore')}"


def test_a_pin_on_another_package_or_another_platform_does_not_matter(install):
    install("megacore-mpt", plugin_source("mpt"), requires="megacore-extras<0.1")
    install("megacore-opt", plugin_source("opt"), requires="megacore<0.1; sys_platform == 'plan9'")

    assert load().list_families() == ["mpt", "opt"]


def test_requirements_that_cannot_be_read_are_a_defect_of_the_plugin(install):
    install("megacore-mpt", plugin_source("mpt"), requires="megacore=>0.1")

    assert why_not_available().startswith("has unreadable requirements: InvalidRequirement: ")


def test_a_distribution_without_metadata_is_not_installed(install, tmp_path):
    install("megacore-mpt", plugin_source("mpt"))
    install("megacore-opt", plugin_source("opt"))
    (tmp_path / "megacore_mpt-1.0.dist-info" / "METADATA").unlink()

    assert load().list_families() == ["opt"]


# Plugins that implement the hooks wrongly


def test_missing_hooks_are_listed(install):
    install("megacore-mpt", plugin_source(qkv_permutation=None, build_layer=None))

    assert why_not_available() == "lacks the hooks qkv_permutation, build_layer"


def test_a_misspelt_hook_is_answered_with_the_nearest_one(install):
    misspelt = "@hookimpl\ndef wieght_map(config):\n    return 'map'\n"
    install("megacore-mpt", plugin_source(weight_map=misspelt))

    assert why_not_available() == (
        "implements an unknown hook 'wieght_map' (did you mean 'weight_map'?); lacks the hooks weight_map"
    )


def test_a_hook_that_a_plugin_marks_as_optional_may_be_unknown(install):
    future = "@hookimpl(optionalhook=True)\ndef from_a_later_megacore(anything):\n    return 1\n"
    install("megacore-mpt", plugin_source("mpt") + future)

    assert load().list_families() == ["mpt"]


def test_all_that_is_wrong_with_the_hooks_is_told_at_once(install):
    unknown = "@hookimpl\ndef weight_map(config, sorce):\n    return 'map'\n"
    keyword = "@hookimpl\ndef qkv_permutation(config, *, source: str):\n    return [0]\n"
    default = "@hookimpl\ndef build_layer(config, layer_index=0):\n    return 'layer'\n"
    install("megacore-mpt", plugin_source(weight_map=unknown, qkv_permutation=keyword, build_layer=default))

    assert why_not_available() == (
        "gives 'layer_index' a default in build_layer, which would replace the value: remove it; "
        "takes source in qkv_permutation, which is never passed: name the arguments it uses, without * or **; "
        "takes an unknown argument 'sorce' in weight_map; it has config, source"
    )


def test_an_unknown_argument_of_a_hook_that_has_none_is_refused(install):
    takes_config = "@hookimpl\ndef model_families(config):\n    return [model_family('mpt')]\n"
    install("megacore-mpt", plugin_source(model_families=takes_config))

    assert why_not_available() == "takes an unknown argument 'config' in model_families; it has none"


@pytest.mark.parametrize("parameter", ["*arguments", "**options"])
def test_a_hook_that_takes_whatever_comes_is_refused_since_nothing_would_come(install, parameter):
    install("megacore-mpt", plugin_source(weight_map=f"@hookimpl\ndef weight_map({parameter}):\n    return 'map'\n"))

    assert why_not_available() == (
        f"takes {parameter} in weight_map, which is never passed: name the arguments it uses, without * or **"
    )


def test_a_hook_under_another_name_is_refused(install):
    renamed = "@hookimpl(specname='weight_map')\ndef my_map(config):\n    return 'map'\n"
    install("megacore-mpt", plugin_source("mpt") + renamed)

    assert why_not_available() == "implements weight_map as my_map: name the function after the hook, without specname"


def test_a_class_is_refused(install):
    install("megacore-mpt", "class Plugin: pass", attribute=":Plugin")

    assert why_not_available() == "registers the class Plugin, not an instance of it"


def test_an_object_that_cannot_be_hashed_is_refused(install):
    unhashable = """
import dataclasses, megacore

@dataclasses.dataclass
class Plugin:
    @megacore.hookimpl(wrapper=True)
    def weight_map(self):
        return (yield)

plugin = Plugin()
"""
    install("megacore-mpt", unhashable, attribute=":plugin")

    assert why_not_available() == "registers an unhashable Plugin object"


@pytest.mark.parametrize("source", ["", "def model_families():\n    return []\n", "plugin = None"])
def test_a_plugin_without_any_hook_is_refused(install, source):
    install("megacore-mpt", source, attribute=":plugin" if "plugin =" in source else "")

    assert why_not_available() == "implements no hook; are its functions marked with @hookimpl?"


def test_hooks_without_a_family_are_refused(install):
    install("megacore-mpt", plugin_source(model_families=None, load_reference=None, build_layer=None))

    assert why_not_available() == (
        "implements weight_map, qkv_permutation without declaring a family in model_families"
    )


def test_the_families_of_others_cannot_be_wrapped(install):
    install("megacore-mpt", PREAMBLE + "@hookimpl(wrapper=True)\ndef model_families():\n    return (yield)\n")

    assert why_not_available() == "wraps model_families, which a plugin implements for itself only"


def test_a_generator_that_is_not_marked_as_a_wrapper_is_refused(install):
    install("megacore-mpt", plugin_source(weight_map="@hookimpl\ndef weight_map():\n    return (yield)\n"))

    assert why_not_available() == "yields in weight_map: return the result, or wrap with @hookimpl(wrapper=True)"


def test_a_wrapper_that_does_not_yield_is_refused_and_its_other_hooks_do_not_answer(install):
    install("megacore-opt", plugin_source("opt"))
    install(
        "megacore-mpt",
        PREAMBLE
        + "@hookimpl(wrapper=True)\ndef build_layer():\n    return 'wrapped: ' + (yield)\n"
        + "@hookimpl(wrapper=True)\ndef weight_map():\n    return 'no yield'\n",
    )

    reason = why_not_available()

    assert reason.startswith("was refused: PluginValidationError: ")
    assert "Declared as wrapper=True or hookwrapper=True but function is not a generator function" in reason
    assert load().get_family("opt").build_layer("config", 0, "parallel") == ("layer", 0, "parallel")


# Plugins that answer wrongly


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("raise KeyError('sizes')", "could not declare its families: KeyError: 'sizes'"),
        ("yield 1 / 0", "could not declare its families: ZeroDivisionError: division by zero"),
        ("return 7", "could not declare its families: TypeError: 'int' object is not iterable"),
        ("return [model_family('mpt'), 'mpt2']", "returned 'mpt2' from model_families, which is not a ModelFamily"),
        ("return None", "returned no family from model_families"),
        ("return []", "returned no family from model_families"),
        ("return [model_family('mpt')] * 2", "declares more than once: mpt"),
    ],
)
def test_families_that_are_not_declared_properly_are_refused(install, body, reason):
    install("megacore-mpt", plugin_source(model_families=f"@hookimpl\ndef model_families():\n    {body}\n"))

    assert why_not_available() == reason


def test_a_plugin_that_fails_to_declare_its_families_does_not_answer_for_others(install):
    fails = "@hookimpl\ndef model_families():\n    raise ValueError\n"
    install("megacore-mpt", plugin_source("mpt"))
    install("megacore-opt", plugin_source("opt", model_families=fails))  # loaded last, it would be asked first

    assert load().get_family("mpt").weight_map("config", "hf")[0] == "mpt map"


def test_none_is_not_an_answer(install):
    install("megacore-mpt", plugin_source(weight_map="@hookimpl\ndef weight_map():\n    pass\n"))

    family = load().get_family("mpt")

    told = message(family.weight_map, "config", "hf")
    assert told == "weight_map of model family 'mpt' returned None, from megacore-mpt 1.0."


def test_a_wrapper_that_loses_the_answer_is_named(install):
    install("megacore-mpt", plugin_source("mpt"))
    install("megacore-trace", PREAMBLE + "@hookimpl(wrapper=True)\ndef weight_map():\n    yield\n")

    family = load().get_family("mpt")

    assert message(family.weight_map, "config", "hf") == (
        "weight_map of model family 'mpt' returned None, from megacore-mpt 1.0. "
        "It is wrapped by megacore-trace 1.0: does each wrapper return its result?"
    )


def test_a_broken_plugin_in_memory_is_refused_at_once_and_leaves_nothing_behind():
    registry = PluginRegistry()

    told = message(lambda: registry.register(plugin_in_memory(plugin_source(weight_map=None)), distribution="acme-mpt"))

    assert told == "acme-mpt 0 lacks the hooks weight_map"
    assert registry.plugins == []


def test_broken_plugins_disturb_nobody_who_did_not_ask_for_them(install, capfd, caplog):
    install("megacore-mpt", "import mosaic_missing")
    install("megacore-bloom", plugin_source(weight_map=None))
    install("megacore-opt", plugin_source("opt"))

    with caplog.at_level(logging.INFO):
        registry = load()

    assert registry.list_families() == ["opt"]
    assert registry.get_family("opt").weight_map("config", "hf")[0] == "opt map"
    assert capfd.readouterr() == ("", "")
    assert caplog.records == []


# megacore plugins, and --model


@pytest.fixture
def as_default(monkeypatch):
    """Makes a registry the one that commands use."""
    return lambda registry: monkeypatch.setattr(megacore.plugins, "default_registry", lambda: registry)


def test_the_plugins_command_prints_a_line_for_each_plugin(install, as_default, monkeypatch):
    install("megacore-mpt", plugin_source("mpt"))
    install("megacore-bloom", "import mosaic_missing")
    install("acme-opt", plugin_source("opt"))
    install("megacore-trace", PREAMBLE + "@hookimpl(wrapper=True)\ndef weight_map():\n    return (yield)\n")
    switch_off(monkeypatch, "acme-opt")
    as_default(load())

    result = CliRunner().invoke(plugins_command)

    assert result.output == (
        "acme-opt        1.0  disabled  is disabled by MEGACORE_DISABLE_PLUGINS\n"
        "megacore-bloom  1.0  failed    could not be imported: ModuleNotFoundError: No module named 'mosaic_missing'\n"
        "megacore-mpt    1.0  active    mpt\n"
        "megacore-trace  1.0  active    (wraps weight_map)\n"
    )
    assert result.exit_code == 0


def test_the_plugins_command_prints_json(install, as_default):
    install("megacore-mpt", plugin_source("mpt"))
    install("megacore-bloom", "import mosaic_missing")
    as_default(load())

    result = CliRunner().invoke(plugins_command, ["--json"])

    assert json.loads(result.output) == [
        {
            "distribution": "megacore-bloom",
            "version": "1.0",
            "entry_point": "bloom",
            "status": "failed",
            "families": [],
            "hooks": [],
            "error": "could not be imported: ModuleNotFoundError: No module named 'mosaic_missing'",
        },
        {
            "distribution": "megacore-mpt",
            "version": "1.0",
            "entry_point": "mpt",
            "status": "active",
            "families": ["mpt"],
            "hooks": ["build_layer", "load_reference", "model_families", "qkv_permutation", "weight_map"],
            "error": None,
        },
    ]
    assert result.exit_code == 0


def test_the_plugins_command_says_when_there_are_none(as_default):
    as_default(PluginRegistry())

    result = CliRunner().invoke(plugins_command)
    as_json = CliRunner().invoke(plugins_command, ["--json"])

    assert result.output == (
        "No model plugin is installed. Each is a package of its own: pip install megacore-<family>\n"
    )
    assert (result.exit_code, as_json.exit_code, json.loads(as_json.output)) == (0, 0, [])


@click.command()
@click.option("--model", type=FamilyType(), required=True)
def command_with_a_model(model):
    click.echo(f"{model.name} of {model.label}")


def test_the_model_option_is_converted_to_a_family(install, as_default):
    install("megacore-mpt", plugin_source("mpt"))
    as_default(load())

    result = CliRunner().invoke(command_with_a_model, ["--model", "mpt"])

    assert (result.output, result.exit_code) == ("mpt of megacore-mpt 1.0\n", 0)


def test_the_model_option_fails_as_a_mistake_in_the_call(install, as_default):
    install("megacore-mpt", plugin_source("mpt"))
    as_default(load())

    result = CliRunner().invoke(command_with_a_model, ["--model", "mtp"])

    assert result.output.endswith(
        "Error: Invalid value for '--model': no plugin for mtp is installed. Did you mean 'mpt'? Installed: mpt.\n"
    )
    assert result.exit_code == 2


def test_the_model_option_completes_the_installed_families(install, as_default):
    for name in ("bloom", "mpt", "mpt-chat"):
        install(f"megacore-{name}", plugin_source(name))
    as_default(load())
    [option] = command_with_a_model.params

    completions = option.shell_complete(click.Context(command_with_a_model), "mp")

    assert [completion.value for completion in completions] == ["mpt", "mpt-chat"]


# The program, in a process of its own


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, **environment},
    )


@pytest.mark.parametrize("arguments", [["--help"], ["plugins"], ["plugins", "--json"]], ids=" ".join)
def test_a_quick_command_imports_nothing_heavy(arguments):
    report = run("-X", "importtime", "-m", "megacore", *arguments).stderr

    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in report.splitlines()}
    assert "click" in imported
    assert imported.isdisjoint({"torch", "transformers", "numpy", "rich"})


def test_importing_megacore_loads_no_plugin(install, tmp_path):
    install("megacore-mpt", "raise AssertionError('loaded')")
    search = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))

    listing = "import sys, megacore.plugins, megacore.cli, megacore.cli.options; print(*sys.modules)"
    modules = run("-c", listing, PYTHONPATH=search).stdout.split()

    assert "megacore.plugins" in modules
    assert "megacore_mpt" not in modules


def test_help_takes_less_than_three_tenths_of_a_second():
    def seconds() -> float:
        start = time.perf_counter()
        run("-m", "megacore", "--help")
        return time.perf_counter() - start

    assert min(seconds() for _ in range(5)) < 0.3


def test_a_broken_plugin_stops_no_command(install, tmp_path):
    install("megacore-mpt", "import mosaic_missing")
    search = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))

    result = run("-m", "megacore", "plugins", "--json", PYTHONPATH=search)

    [plugin] = [plugin for plugin in json.loads(result.stdout) if plugin["distribution"] == "megacore-mpt"]
    assert plugin["error"] == "could not be imported: ModuleNotFoundError: No module named 'mosaic_missing'"
    assert result.stderr == ""


@pytest.mark.parametrize("distribution", REALLY_INSTALLED, ids=lambda distribution: distribution.name)
def test_the_pin_of_an_installed_plugin_admits_this_megacore(distribution):
    pins = [pin for pin in map(Requirement, distribution.requires or ()) if pin.name == "megacore"]

    assert pins, f"{distribution.name} does not say which versions of megacore it works with"
    assert all(pin.specifier.contains(version("megacore"), prereleases=True) for pin in pins)
