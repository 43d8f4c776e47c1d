"""The options of ``tokenize`` and ``tokenize-chat``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import click

from megacore.cli.notes import counted, print_note
from megacore.cli.options import Command


class MultiInputCommand(click.Command):
    """A command whose ``--input`` takes several files, for ``--input data/*.jsonl``; an option of click takes one."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(ctx, list(_repeat_input(args)))


def _repeat_input(args: list[str]) -> Iterator[str]:
    """Rewrite ``--input a b`` as ``--input a --input b``, for a command without positional arguments."""
    current, num_values = "", 0
    for word in args:
        if word.startswith("-"):
            current, equals, _ = word.partition("=")
            num_values = len(equals)
        else:
            num_values += 1
            if current == "--input" and num_values > 1:
                yield current
        yield word


def inputs_option(description: str) -> Callable[[Command], Command]:
    """Return the option ``--input`` of a :class:`MultiInputCommand`."""
    return click.option(
        "--input",
        "inputs",
        type=click.Path(path_type=Path),
        multiple=True,
        required=True,
        metavar="FILE...",
        help=f"{description} JSON Lines and text may be compressed (.gz, .zst). Files are read in the given order; a "
        "quoted pattern ('data/*.jsonl') is expanded and sorted.",
    )


def tokenizer_option(help_: str) -> Callable[[Command], Command]:
    """Return the option ``--tokenizer``, a file or a directory."""
    return click.option("--tokenizer", type=click.Path(path_type=Path), required=True, metavar="PATH", help=help_)


def prefix_option(help_: str) -> Callable[[Command], Command]:
    """Return the option ``--out``, the prefix of all files that are written."""
    return click.option("--out", type=click.Path(path_type=Path), required=True, metavar="PREFIX", help=help_)


vocab_extra_ids_list_option = click.option(
    "--vocab-extra-ids-list",
    metavar="A,B",
    help="Add these tokens to the vocabulary.",
    callback=lambda ctx, param, value: value.split(",") if value else (),
)

on_error_option = click.option(
    "--on-error",
    type=click.Choice(["stop", "skip"]),
    default="stop",
    show_default=True,
    help="Stop at a malformed record, or skip and count it.",
)


def note_new_tokens(new_tokens: Mapping[str, int], directory: Path | None) -> None:
    """Print which tokens were added to the tokenizer, if any."""
    if directory is not None:
        tokens = ", ".join(f"{token} {number}" for token, number in new_tokens.items())
        print_note(
            f"added {counted(len(new_tokens), 'new token')} ({tokens}): the extended tokenizer is {directory}, and the "
            "model needs embedding rows for them (--add-tokens of convert and split)"
        )
