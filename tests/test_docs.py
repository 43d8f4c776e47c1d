"""The documentation says what the program does."""

import ast
import json
import re
from pathlib import Path
from typing import Any

import click
import pytest
from pydantic_core import PydanticUndefined

from megacore.cli import cli
from megacore.data import MessageKeys, QuestionKeys
from megacore.training import RunConfig, Step, read_run_config
from megacore.training.loggers import LoggedRun, Logger
from megacore.training.loggers.dispatch import values_of

ROOT = Path(__file__).parent.parent


def documented_keys() -> dict[str, dict[str, tuple[str, str]]]:
    """Section to key to (default, meaning), as docs/training.md has them."""
    sections: dict[str, dict[str, tuple[str, str]]] = {}
    for line in (ROOT / "docs/training.md").read_text().splitlines():
        if heading := re.fullmatch(r"## \[(\w+)\]", line):
            section = sections.setdefault(heading[1], {})
        elif row := re.fullmatch(r"\| `(\w+)` \| (.+?) \| (.+) \|", line):
            section[row[1]] = (row[2], row[3])
    return sections


def test_the_page_on_training_lists_every_key_with_its_default_and_meaning() -> None:
    defined = {}
    for section, field in RunConfig.model_fields.items():
        defined[section] = {
            key: (
                "required" if entry.default is PydanticUndefined else f"`{json.dumps(entry.default)}`",
                entry.description,
            )
            for key, entry in field.annotation.model_fields.items()  # type: ignore[union-attr]
        }
    assert documented_keys() == defined


def test_the_run_file_of_the_demo_is_valid() -> None:
    assert read_run_config(ROOT / "examples/smollm2.toml").training.train_iters == 20


def test_the_recipe_of_the_fine_tuning_script_is_valid() -> None:
    assert read_run_config(ROOT / "examples/finetune.toml").optimizer.eps == 1e-5


def test_the_run_file_in_the_readme_is_valid(tmp_path: Path) -> None:
    [toml] = re.findall(r"```toml\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (tmp_path / "run.toml").write_text(toml)
    assert read_run_config(tmp_path / "run.toml").parallel.tensor_parallel == 2


@pytest.mark.parametrize("name", sorted(cli.commands))
def test_the_readme_mentions_every_command(name: str) -> None:
    assert f"| `{name}` |" in (ROOT / "README.md").read_text()


def test_every_command_line_in_the_readme_and_the_demo_parses() -> None:
    script = (ROOT / "examples/demo.sh").read_text().replace("\\\n", " ")
    lines = re.findall(r"\bmegacore (\w+) +(\S.*)", (ROOT / "README.md").read_text() + script)
    assert len(lines) > 10
    for name, rest in lines:
        if name == "COMMAND":
            continue
        assert name in cli.commands
        words = rest.split("#")[0].split()
        known = {option for parameter in cli.commands[name].params for option in parameter.opts}
        unknown = [word for word in words if word.startswith("--") and word.rstrip(",.;`") not in known | {"--help"}]
        assert not unknown, f"megacore {name} has no {unknown}"


def test_the_page_on_data_lists_every_option_of_the_command_for_conversations() -> None:
    [table] = re.findall(r"### Records\n(.*?)\n### ", (ROOT / "docs/data.md").read_text(), re.DOTALL)
    documented = {option for row in re.findall(r"^\| (`--.+?) \|", table, re.MULTILINE) for option in row.split(", ")}
    options = {option for parameter in cli.commands["tokenize-chat"].params for option in parameter.opts}
    assert documented == {f"`{option}`" for option in options - {"--input", "--tokenizer", "--out"}}


def test_the_records_in_the_page_on_data_can_be_read() -> None:
    pattern = r"```json\n(.*)\n(.*)\n(.*)\n```"
    [messages, sharegpt, question] = re.findall(pattern, (ROOT / "docs/data.md").read_text())[0]
    assert MessageKeys().read(json.loads(messages))[0][1]["content"] == "Hello."
    of_sharegpt = MessageKeys(messages="conversations").read(json.loads(sharegpt))
    assert of_sharegpt == MessageKeys().read(json.loads(messages))
    assert len(QuestionKeys(system="system").read(json.loads(question))[0]) == 3


def test_every_command_line_in_the_page_on_data_parses() -> None:
    for name, rest in re.findall(r"^megacore ([\w-]+) +(\S.*)", (ROOT / "docs/data.md").read_text(), re.MULTILINE):
        command, words = cli.commands[name], rest.split("#")[0].split()
        if isinstance(command, click.Group):
            command = command.commands[words[0]]
        known = {option for parameter in command.params for option in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= known


def test_the_page_on_generating_says_the_defaults_of_the_options_that_it_lists_and_its_command_lines_parse() -> None:
    page = (ROOT / "docs/generating.md").read_text()
    options = {name: parameter for parameter in cli.commands["generate"].params for name in parameter.opts}
    rows = re.findall(r"^\| `(--[\w-]+)` \| (.+?) \|", page, re.MULTILINE)
    assert [name for name, _ in rows] == ["--temperature", "--top-k", "--top-p", "--seed"]
    for name, told in rows:
        default = options[name].default
        assert told == f"`{default}`" if isinstance(default, float) else not told.startswith("`")
    for rest in re.findall(r"^megacore generate +(\S.*)", page, re.MULTILINE):
        assert {word for word in rest.split() if word.startswith("--")} <= options.keys()
    assert f"tokens ({options['--max-new-tokens'].default})" in page


def test_the_page_on_seeing_a_run_lists_every_key_of_the_metrics() -> None:
    page = (ROOT / "docs/logging.md").read_text()
    step = Step(1, 1, 1.0, 1.0, 1.0, 1.0, loss_scale=1.0, flops_per_second=1.0, peak_flops_per_second=1.0)
    documented = {key for line, key in re.findall(r"^\| (.+?) \| `(\w+)` \|", page, re.MULTILINE) if "step" in line}
    assert documented == {"iteration", *values_of(step)}


def test_the_logger_in_the_page_on_seeing_a_run_is_one(tmp_path: Path) -> None:
    [code] = re.findall(r"```python\n(.*?)```", (ROOT / "docs/logging.md").read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)
    run = LoggedRun(project="p", name="n", directory=tmp_path, settings={}, iteration=0)
    logger: Logger = names["PostcardLogger"](run)
    logger.log({"train/loss": 2.5}, iteration=3)
    logger.close()
    assert (tmp_path / "postcards").read_text() == "3 {'train/loss': 2.5}\n"


def defined_names(path: Path) -> set[str]:
    """Return the names of the classes and functions of a module, those of methods after their class."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            names.add(node.name)
            names |= {f"{node.name}.{child.name}" for child in ast.walk(node) if isinstance(child, ast.FunctionDef)}
    return names


def test_the_page_on_architecture_names_files_and_functions_that_exist() -> None:
    page = (ROOT / "docs/architecture.md").read_text()
    named = re.findall(r"`((?:megacore|plugins)/[\w/.]*)(?:: ([\w.]+))?`", page)
    assert len(named) > 60
    missing = [f"{path}: {name}" for path, name in named if not (ROOT / path).exists()]
    missing += [
        f"{path}: {name}"
        for path, name in named
        if name and (ROOT / path).is_file() and name not in defined_names(ROOT / path)
    ]
    assert not missing


def test_the_page_on_architecture_names_every_package() -> None:
    page = (ROOT / "docs/architecture.md").read_text()
    packages = {path.parent.name for path in (ROOT / "megacore").glob("*/__init__.py")}
    assert set(re.findall(r"^\| `megacore/(\w+)/` \|", page, re.MULTILINE)) == packages
