"""``megacore new-plugin``: a working model plugin to start from."""

from __future__ import annotations

import re
from pathlib import Path
from string import Template

import click

_FILES = {
    "pyproject.toml": "pyproject.toml.template",
    "{package}/__init__.py": "init.py.template",
    "{package}/config.py": "config.py.template",
    "{package}/weights.py": "weights.py.template",
    "{package}/layer.py": "layer.py.template",
    "tests/test_conformance.py": "test_conformance.py.template",
}
"""The files of a plugin and the templates in ``plugin_template/`` that they are rendered from."""


def _check_name(ctx: click.Context, param: click.Parameter, value: str) -> str:
    """Refuse a name that a family, a distribution and a package cannot have."""
    if not re.fullmatch(r"[a-z][a-z0-9]*([-_][a-z0-9]+)*", value):
        raise click.BadParameter(
            f"{value!r} is not a family name: use lower-case letters, digits, and - or _ between them"
        )
    return value


@click.command("new-plugin")
@click.argument("name", callback=_check_name)
@click.option("--out", type=click.Path(path_type=Path), help="Directory to create.  [default: megacore-NAME]")
def new_plugin(name: str, out: Path | None) -> None:
    """Write a model plugin for a new family called NAME.

    The plugin works as it is and passes the conformance tests. docs/writing-a-plugin.md explains it file by file.

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
    """Return the contents of the files of a plugin for a family called ``name``, by path."""
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
