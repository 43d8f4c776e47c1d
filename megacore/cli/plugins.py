"""``megacore plugins``: which plugins are installed, whether each can be used, and what it provides."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from megacore.plugins import LoadedPlugin


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list, one object a plugin.")
def plugins(as_json: bool) -> None:
    """List the installed model plugins and their families.

    One line a plugin: distribution, version, active, failed or disabled, and the families it provides or the reason
    why it cannot be used. Set MEGACORE_DISABLE_PLUGINS=<distribution>[,<distribution>] to switch plugins off.
    """
    from megacore.plugins import default_registry

    found = default_registry().plugins
    if as_json:
        click.echo(json.dumps([_as_object(plugin) for plugin in found], indent=2))
    elif found:
        _echo_columns([(plugin.distribution, plugin.version, plugin.status, _remark(plugin)) for plugin in found])
    else:
        click.echo("No model plugin is installed. Each is a package of its own: pip install megacore-<family>")


def _as_object(plugin: LoadedPlugin) -> dict[str, Any]:
    return {
        "distribution": plugin.distribution,
        "version": plugin.version,
        "entry_point": plugin.entry_point,
        "status": plugin.status,
        "families": [family.name for family in plugin.families],
        "hooks": list(plugin.hooks),
        "error": str(plugin.error) if plugin.error else None,
    }


def _remark(plugin: LoadedPlugin) -> str:
    if plugin.error:
        return str(plugin.error)
    if plugin.families:
        return ", ".join(family.name for family in plugin.families)
    return f"(wraps {', '.join(plugin.hooks)})"


def _echo_columns(rows: Sequence[tuple[str, ...]]) -> None:
    """Print ``rows`` with aligned columns; the last one is as long as it is."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)][:-1]
    for *cells, last in rows:
        padded = (cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
        click.echo("  ".join([*padded, last]))
