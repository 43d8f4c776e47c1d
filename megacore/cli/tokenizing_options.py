"""What ``tokenize`` and ``tokenize-chat`` share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import click

from megacore.cli.notes import counted, print_note
from megacore.cli.options import Command


class ManyInputs(click.Command):
    """Lets one ``--input`` take several files, as a shell writes ``--input data/*.jsonl``; click's options take one."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(ctx, list(_repeat_option("--input", args)))


def _repeat_option(option: str, args: list[str]) -> Iterator[str]:
    """``--input a b`` as ``--input a --input b``; nothing else is touched, since the command takes no bare words."""
    current, num_values = "", 0
    for word in args:
        if word.startswith("-"):
            current, equals, _ = word.partition("=")
            num_values = len(equals)
        else:
            num_values += 1
            if current == option and num_values > 1:
                yield option
        yield word


def inputs_option(what: str) -> Callable[[Command], Command]:
    """``--input``, which takes several files, of a :class:`ManyInputs`; ``what`` they hold."""
    return click.option(
        "--input",
        "inputs",
        type=click.Path(path_type=Path),
        multiple=True,
        required=True,
        metavar="FILE...",
        help=f"{what} Lines and text may be compressed (.gz, .zst). Files are taken in the order given; a quoted "
        "pattern ('data/*.jsonl') stands for its files, sorted.",
    )


def tokenizer_option(help_: str) -> Callable[[Command], Command]:
    """``--tokenizer``, a file or a directory."""
    return click.option("--tokenizer", type=click.Path(path_type=Path), required=True, metavar="PATH", help=help_)


def prefix_option(help_: str) -> Callable[[Command], Command]:
    """``--out``, what the names of all files that are written begin with."""
    return click.option("--out", type=click.Path(path_type=Path), required=True, metavar="PREFIX", help=help_)


vocab_extra_ids_list_option = click.option(
    "--vocab-extra-ids-list", default="", metavar="A,B", help="Add these tokens to the vocabulary."
)

on_error_option = click.option(
    "--on-error",
    type=click.Choice(["stop", "skip"]),
    default="stop",
    show_default=True,
    help="What to do about a record that cannot be used.",
)


def note_new_tokens(new_tokens: Mapping[str, int], directory: Path | None) -> None:
    """Say which tokens were added, and what a model needs for them."""
    if directory is not None:
        tokens = ", ".join(f"{token} {number}" for token, number in new_tokens.items())
        print_note(
            f"{counted(len(new_tokens), 'new token')} ({tokens}): the tokenizer that has them is {directory}, and the "
            "model needs rows for them"
        )
