"""``megacore tokenize``: text files to a dataset of token ids."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click

from megacore.cli.progress import bytes_progress


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
@click.option("--json-key", default="text", show_default=True, metavar="KEY", help="Where a JSON line has its text.")
@click.option("--append-eod", is_flag=True, help="End every document with the end-of-document token.")
def tokenize(inputs: tuple[Path, ...], tokenizer: Path, out: Path, json_key: str, append_eod: bool) -> None:
    """Turn text into a dataset of token ids for training and verification.

    Documents keep their order; those without a token are skipped and counted.

    \b
    megacore tokenize --input data/*.jsonl --tokenizer published/ --out data/train --append-eod
    """
    import megacore.data

    total = sum(path.stat().st_size for path in inputs if path.is_file())
    with bytes_progress("tokenizing", total) as advance:
        summary = megacore.data.tokenize(
            inputs, tokenizer=tokenizer, out=out, json_key=json_key, append_eod=append_eod, advance=advance
        )
    skipped = (
        f"; skipped {_count(summary.num_empty_documents, 'empty document')}" if summary.num_empty_documents else ""
    )
    click.echo(
        f"{out}: {_count(summary.num_documents, 'document')}, {_count(summary.num_tokens, 'token')}, "
        f"{summary.num_text_bytes / summary.num_tokens:.2f} bytes a token{skipped}"
    )


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
