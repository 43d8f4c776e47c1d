"""Options that ``tokenize`` and ``tokenize-chat`` share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import click

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
            current, num_values = word, 0
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


on_error_option = click.option(
    "--on-error",
    type=click.Choice(["stop", "skip"]),
    default="stop",
    show_default=True,
    help="What to do about a record that cannot be used.",
)
