"""``megacore plugins``: the installed plugins, their status and their families."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from megacore.plugins import LoadedPlugin


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list with one object per plugin.")
def plugins(as_json: bool) -> None:
    """List the installed model plugins and their families.

    Each line has a distribution, its version, its status (active, failed or disabled), and its families or the reason
    why it cannot be used. Set MEGACORE_DISABLE_PLUGINS=<distribution>[,<distribution>] to disable plugins.
    """
    from megacore.plugins import default_registry

    found = default_registry().plugins
    if as_json:
        click.echo(json.dumps([_to_json(plugin) for plugin in found], indent=2))
    elif found:
        _echo_columns(
            [(plugin.distribution, plugin.version, plugin.status, _families_or_error(plugin)) for plugin in found]
        )
    else:
        click.echo("No model plugin is installed. Each is a package of its own: pip install megacore-<family>")


def _to_json(plugin: LoadedPlugin) -> dict[str, Any]:
    return {
        "distribution": plugin.distribution,
        "version": plugin.version,
        "entry_point": plugin.entry_point,
        "status": plugin.status,
        "families": [family.name for family in plugin.families],
        "hooks": list(plugin.hooks),
        "error": str(plugin.error) if plugin.error else None,
    }


def _families_or_error(plugin: LoadedPlugin) -> str:
    if plugin.error:
        return str(plugin.error)
    if plugin.families:
        return ", ".join(family.name for family in plugin.families)
    return f"(wraps {', '.join(plugin.hooks)})"


def _echo_columns(rows: Sequence[tuple[str, ...]]) -> None:
    """Print ``rows`` with aligned columns, the last of which is not padded."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)][:-1]
    for *cells, last in rows:
        padded = (cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
        click.echo("  ".join([*padded, last]))
