"""Words for people."""

from __future__ import annotations

import click


def print_note(note: str) -> None:
    """Print ``note`` to standard error, so that the output stays what it is."""
    click.echo(f"Note: {note}.", err=True)


def counted(number: int, noun: str) -> str:
    """``1 document``, ``2,000 documents``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
