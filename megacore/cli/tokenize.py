"""``megacore tokenize``: text files to a dataset of token ids."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import click

from megacore.cli.notes import print_note
from megacore.cli.progress import documents_progress


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


@click.command(cls=ManyInputs)
@click.option(
    "--input",
    "inputs",
    type=click.Path(path_type=Path),
    multiple=True,
    required=True,
    metavar="FILE...",
    help="Text to tokenize. A .jsonl or .json file holds one JSON object a line, each a document; "
    "any other file is plain text and one document as a whole. Files are taken in the order given.",
)
@click.option(
    "--tokenizer",
    type=click.Path(path_type=Path),
    required=True,
    metavar="PATH",
    help="tokenizer.json, tokenizer.model, or a directory with one of them "
    "(with both, tokenizer.json is used; name the file to choose).",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    required=True,
    metavar="PREFIX",
    help="Writes PREFIX.bin, PREFIX.idx and PREFIX.json. None of them may exist.",
)
@click.option(
    "--json-key",
    "json_keys",
    default=["text"],
    show_default=True,
    multiple=True,
    metavar="KEY",
    help="Where a JSON line or a row of a table has its text. Given several times: each makes a dataset, PREFIX_KEY.",
)
@click.option("--append-eod", is_flag=True, help="End every document with the end-of-document token.")
@click.option("--prepend-bos", is_flag=True, help="Begin every document with the tokenizer's begin token.")
@click.option(
    "--on-error",
    type=click.Choice(["stop", "skip"]),
    default="stop",
    show_default=True,
    help="What to do about a document that cannot be read.",
)
@click.option(
    "--workers", type=click.IntRange(min=1), metavar="N", help="Processes that encode.  [default: one a core]"
)
def tokenize(
    inputs: tuple[Path, ...],
    tokenizer: Path,
    out: Path,
    json_keys: tuple[str, ...],
    append_eod: bool,
    prepend_bos: bool,
    on_error: Literal["stop", "skip"],
    workers: int | None,
) -> None:
    """Turn text into a dataset of token ids for training and verification.

    Documents keep their order; those without a token are skipped and counted.

    \b
    megacore tokenize --input data/*.jsonl --tokenizer published/ --out data/train --append-eod
    """
    import megacore.data
    from megacore.data.documents import input_files

    files = input_files(inputs)
    total = sum(path.stat().st_size for path in files)
    prefixes = [out] if len(json_keys) == 1 else [Path(f"{out}_{json_key}") for json_key in json_keys]
    for json_key, prefix in zip(json_keys, prefixes, strict=True):
        with documents_progress("tokenizing", total) as advance:
            summary = megacore.data.tokenize(
                files,
                tokenizer=tokenizer,
                out=prefix,
                json_key=json_key,
                append_eod=append_eod,
                prepend_bos=prepend_bos,
                on_error=on_error,
                workers=workers,
                advance=advance,
                on_note=print_note,
            )
        skipped = {
            "empty document": summary.num_empty_documents,
            "document that cannot be read": summary.num_erroneous_documents,
        }
        told = " and ".join(_count(number, kind) for kind, number in skipped.items() if number)
        click.echo(
            f"{prefix}: {_count(summary.num_documents, 'document')}, {_count(summary.num_tokens, 'token')}, "
            f"{summary.num_text_bytes / summary.num_tokens:.2f} bytes a token{'; skipped ' if told else ''}{told}; "
            f"{summary.num_text_bytes / 1e6 / summary.seconds:,.1f} MB/s with {summary.engine}"
        )


def _count(number: int, noun: str) -> str:
    first, *rest = noun.split(" that ")
    return " that ".join([f"{number:,} {first}{'' if number == 1 else 's'}", *rest])
