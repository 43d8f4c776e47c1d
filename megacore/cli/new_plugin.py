"""``megacore new-plugin``: a model plugin to start from."""

from __future__ import annotations

import re
from pathlib import Path
from string import Template
from typing import Any

import click

_NAME = r"[a-z][a-z0-9]*([-_][a-z0-9]+)*"

_FILES = {
    "pyproject.toml": "pyproject.toml.template",
    "{package}/__init__.py": "init.py.template",
    "{package}/config.py": "config.py.template",
    "{package}/weights.py": "weights.py.template",
    "{package}/layer.py": "layer.py.template",
    "tests/test_conformance.py": "test_conformance.py.template",
}
"""Each file of a plugin, and the template beside this module that it is made from."""


class FamilyName(click.ParamType):
    """The name of a family that does not exist yet."""

    name = "name"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if not re.fullmatch(_NAME, value):
            self.fail(f"{value!r} is no name for a family: lower-case letters, digits, and - or _ between them", param)
        return value


@click.command("new-plugin")
@click.argument("name", type=FamilyName())
@click.option("--out", type=click.Path(path_type=Path), help="Directory to create.  [default: megacore-NAME]")
def new_plugin(name: str, out: Path | None) -> None:
    """Write a model plugin for a family called NAME. It works and passes the conformance kit: change it from there.

    docs/writing-a-plugin.md goes through it file by file.

    \b
    megacore new-plugin mpt --out megacore-mpt/
    """
    from megacore.atomic_output import staged_directory

    plugin = render_plugin(name)
    out = out or Path(_distribution(name))
    with staged_directory(out) as staging:
        for path, text in plugin.items():
            (staging / path).parent.mkdir(exist_ok=True)
            (staging / path).write_text(text, encoding="utf-8")
    click.echo(f"Wrote {len(plugin)} files to {out}. Next: pip install -e '{out}[test]' && pytest {out}")


def render_plugin(name: str) -> dict[str, str]:
    """The files of a plugin for a family called ``name``, by their paths."""
    from importlib.metadata import version
    from importlib.resources import files

    major, minor, *_ = version("megacore").split(".")
    package = _distribution(name).replace("-", "_")
    values = {
        "name": name,
        "distribution": _distribution(name),
        "package": package,
        "title": "".join(part.capitalize() for part in re.split("[-_]", name)),
        "core": f"{major}.{minor}",
        "next_core": f"{major}.{int(minor) + 1}",
    }
    templates = files("megacore.cli") / "plugin_template"
    return {
        path.format(package=package): Template((templates / template).read_text("utf-8")).substitute(values)
        for path, template in _FILES.items()
    }


def _distribution(name: str) -> str:
    return f"megacore-{name.replace('_', '-')}"
