"""The page on writing a plugin, and the command that writes one: both are run, and say the same."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
from click.testing import CliRunner

import megacore.model
import megacore.weights
from megacore import hookspecs
from megacore.cli import cli
from megacore.cli.new_plugin import render_plugin
from megacore.hookspecs import FAMILY_HOOKS
from megacore.testing import ModelFamilyTests
from plugin_on_path import lay_out, run_pytest

GUIDE = (Path(__file__).parent.parent / "docs/writing-a-plugin.md").read_text()

FILES = dict(re.findall(r"^\*\*`(\S+)`\*\*\n\n```\w+\n(.*?)^```", GUIDE, re.DOTALL | re.MULTILINE))
"""The files that the page has, by their paths."""


def new_plugin(*arguments: str):
    return CliRunner().invoke(cli, ["new-plugin", *arguments])


def signature(function: object) -> str:
    """``name(argument, …)``, without ``self``."""
    assert callable(function)
    names = [name for name in inspect.signature(function).parameters if name != "self"]
    return f"{function.__name__}({', '.join(names)})"


def test_the_plugin_of_the_page_passes_the_kit(tmp_path):
    lay_out(FILES, tmp_path)

    result = run_pytest(tmp_path, "-rs")

    assert result.returncode == 0, result.stdout + result.stderr
    assert re.search(r"\d\d passed", result.stdout)
    assert "skipped" not in result.stdout, result.stdout


def test_the_page_and_the_command_have_the_same_plugin():
    assert render_plugin("qwen2") == FILES


def test_every_code_block_of_the_page_is_a_file_or_a_command_line_or_what_the_kit_says():
    others = re.sub(r"^\*\*`\S+`\*\*\n\n```\w+\n.*?^```", "", GUIDE, flags=re.DOTALL | re.MULTILINE)
    lines = [line for block in re.findall(r"```\w*\n(.*?)```", others, re.DOTALL) for line in block.splitlines()]

    assert all(re.match(r"megacore |pip install -e |pytest |Failed: |  - ", line) for line in lines), lines


def test_every_command_line_of_the_page_parses():
    blocks = re.findall(r"^```\w*\n(.*?)^```", GUIDE, re.DOTALL | re.MULTILINE)
    lines = re.findall(r"^megacore ([\w-]+)(.*)$", "".join(blocks), re.MULTILINE)
    assert len(lines) == 4
    for name, rest in lines:
        known = {option for parameter in cli.commands[name].params for option in parameter.opts}
        assert {word for word in rest.split() if word.startswith("--")} <= known, name


def test_the_page_has_every_hook_with_its_exact_arguments():
    [table] = re.findall(r"\| hook \| returns \|\n\| --- \| --- \|\n((?:\|.*\n)+)", GUIDE)
    documented = re.findall(r"^\| `([^`]+)` \|", table, re.MULTILINE)

    assert documented == [signature(getattr(hookspecs, hook)) for hook in ("model_families", *FAMILY_HOOKS)]


def test_the_page_has_the_methods_to_override_with_their_exact_arguments():
    [table] = re.findall(r"\| method \| by default .*\n\|.*\n((?:\|.*\n)+)", GUIDE)
    documented = re.findall(r"^\| `([^`]+)` \|", table, re.MULTILINE)

    methods = ("publish", "reference", "reference_parameters")
    assert documented == [signature(getattr(ModelFamilyTests, name)) for name in methods]


def test_the_rules_and_modules_that_the_page_lists_exist():
    [rules] = re.findall(r"\| rule \| for \|\n\|.*\n((?:\|.*\n)+)", GUIDE)
    [modules] = re.findall(r"\| module \| parameters .*\n\|.*\n((?:\|.*\n)+)", GUIDE)

    assert all(hasattr(megacore.weights, name) for name in re.findall(r"`(\w+)\(", rules))
    assert all(hasattr(megacore.model, name) for name in re.findall(r"`(\w+)\(config, parallel\)`", modules))


@pytest.mark.parametrize("name, package, title", [("mpt", "mpt", "Mpt"), ("my-model_2", "my_model_2", "MyModel2")])
def test_a_new_plugin_is_named_throughout_as_it_was_asked(name, package, title):
    files = render_plugin(name)
    project = tomllib.loads(files["pyproject.toml"])["project"]

    assert project["name"] == f"megacore-{package.replace('_', '-')}"
    assert project["entry-points"]["megacore"] == {name: f"megacore_{package}"}
    assert f"class {title}Layer" in files[f"megacore_{package}/layer.py"]
    assert not any("qwen2" in re.sub('model_type="qwen2"', "", text) for text in files.values())
    for path, text in files.items():
        if path.endswith(".py"):
            compile(text, path, "exec")


def test_a_new_plugin_needs_the_megacore_that_wrote_it():
    dependencies = tomllib.loads(render_plugin("mpt")["pyproject.toml"])["project"]["dependencies"]
    major, minor, *_ = map(int, version("megacore").split("."))

    assert f"megacore>={major}.{minor},<{major}.{minor + 1}" in dependencies


def test_the_command_writes_the_files_and_says_what_is_next(tmp_path):
    result = new_plugin("mpt", "--out", str(tmp_path / "here"))

    assert result.exit_code == 0, result.output
    assert "pip install -e" in result.output
    written = {str(path.relative_to(tmp_path / "here")) for path in (tmp_path / "here").rglob("*") if path.is_file()}
    assert written == set(render_plugin("mpt"))


def test_the_command_writes_beside_the_caller_by_default(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    assert new_plugin("mpt").exit_code == 0
    assert (tmp_path / "megacore-mpt/megacore_mpt/__init__.py").is_file()


def test_the_command_overwrites_nothing(tmp_path):
    (tmp_path / "here").mkdir()

    result = new_plugin("mpt", "--out", str(tmp_path / "here"))

    assert result.exit_code == 2
    assert "exists already" in result.output
    assert list((tmp_path / "here").iterdir()) == []


@pytest.mark.parametrize("name", ["", "Mpt", "7b", "my model", "../mpt", "mpt-", "mpt.py"])
def test_a_name_that_no_package_can_have_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    result = new_plugin(name)

    assert result.exit_code == 2
    assert "is not a family name" in result.output
    assert list(tmp_path.iterdir()) == []


def test_what_the_command_writes_is_linted(tmp_path):
    root = Path(__file__).parent.parent
    for path, text in render_plugin("mpt").items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(text)

    for check in (["check"], ["format", "--check"]):
        ruff = [sys.executable, "-m", "ruff", *check, "--config", str(root / "pyproject.toml"), str(tmp_path)]
        result = subprocess.run(ruff, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr
