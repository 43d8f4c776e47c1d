"""Option types that several commands share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

from megacore.errors import PluginError

if TYPE_CHECKING:
    from megacore.plugins import Family


class FamilyType(click.ParamType):
    """The name of a model family, converted to its :class:`~megacore.plugins.Family`.

    Not :class:`click.Choice`, which would load every plugin while the command line is being defined.
    """

    name = "family"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Family:
        """Return the family called ``value``. Raises :class:`click.BadParameter` with the plugin error's message."""
        from megacore.plugins import Family, get_family

        if isinstance(value, Family):  # click converts a default that is converted already
            return value
        try:
            return get_family(value)
        except PluginError as error:
            self.fail(str(error), param, ctx)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        from megacore.plugins import list_families

        return [CompletionItem(name) for name in list_families() if name.startswith(incomplete)]
