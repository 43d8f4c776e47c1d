"""Words for people."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import click

from megacore.errors import ReaderGoneError


def print_note(note: str) -> None:
    """Print ``note`` to standard error, so that the output stays what it is."""
    with printing(err=True):
        click.echo(f"Note: {note}.", err=True)


@contextmanager
def printing(*, err: bool = False) -> Iterator[None]:
    """Print within the block; where that fails, what is printed from then on goes nowhere, and the work goes on.

    Who reads the output may be gone before a run that took days: Ctrl-C ends ``tee`` too. Or its disk is full.
    """
    try:
        yield
    except OSError as error:
        _print_nowhere(err=err)
        if not err:
            print_note(f"nothing more is printed, since the output cannot be written ({error.strerror})")


@contextmanager
def printing_for_a_reader() -> Iterator[None]:
    """Print within the block what all is done for: where its reader is gone, as ``head`` soon is, the work ends.

    Raises:
        ReaderGoneError: the reader is gone; what is printed from then on goes nowhere.
    """
    try:
        yield
    except BrokenPipeError as error:
        _print_nowhere()
        raise ReaderGoneError("nobody reads the output any more") from error


def _print_nowhere(*, err: bool = False) -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    # The file and not the stream, which still has what could not be written, and would fail at the end.
    os.dup2(nowhere, (sys.stderr if err else sys.stdout).fileno())
    os.close(nowhere)


def counted(number: int, noun: str) -> str:
    """``1 document``, ``2,000 documents``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
