"""What a person should know, beside the output."""

from __future__ import annotations

import click


def print_note(note: str) -> None:
    """Print ``note`` to standard error, so that the output stays what it is."""
    click.echo(f"Note: {note}.", err=True)
