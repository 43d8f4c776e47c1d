"""Printing that survives an output which cannot be written, and notes to standard error."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import click

from megacore.errors import ReaderGoneError


def print_note(note: str) -> None:
    """Print ``note`` to standard error, so that it does not mix with the output."""
    with printing(err=True):
        click.echo(f"Note: {note}.", err=True)


@contextmanager
def printing(*, err: bool = False) -> Iterator[None]:
    """Print within the block without failing: if the output cannot be written, everything after is discarded.

    The reader of the output may exit before a run that takes days (Ctrl-C ends ``tee`` too), or its disk may be full.
    """
    try:
        yield
    except OSError as error:
        _discard_output(err=err)
        if not err:
            print_note(f"nothing more is printed, since the output cannot be written ({error.strerror})")


@contextmanager
def printing_result() -> Iterator[None]:
    """Print the result of the command within the block, and end the command if its reader has exited, as ``head`` does.

    Raises:
        ReaderGoneError: The reader has exited. Everything printed from then on is discarded.
    """
    try:
        yield
    except BrokenPipeError as error:
        _discard_output()
        raise ReaderGoneError("the reader of the output has exited") from error


def _discard_output(*, err: bool = False) -> None:
    devnull = os.open(os.devnull, os.O_WRONLY)
    # The descriptor is replaced, not the stream, whose buffer keeps what could not be written and is flushed at exit.
    os.dup2(devnull, (sys.stderr if err else sys.stdout).fileno())
    os.close(devnull)


def counted(number: int, noun: str) -> str:
    """Return a count with its noun: ``1 document``, ``2,000 documents``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
