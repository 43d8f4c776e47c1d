"""``megacore tokenize``: text files to a dataset of token ids."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from megacore.cli.notes import counted, print_note
from megacore.cli.progress import documents_progress
from megacore.cli.tokenizing_options import (
    ManyInputs,
    inputs_option,
    note_new_tokens,
    on_error_option,
    prefix_option,
    tokenizer_option,
    vocab_extra_ids_list_option,
)

if TYPE_CHECKING:
    from megacore.data import TokenizeSummary


@click.command(cls=ManyInputs)
@inputs_option(
    "Text to tokenize. A .jsonl or .json file holds one JSON object a line, each a document; a .parquet file has them "
    "in a column; any other file is plain text and one document as a whole."
)
@tokenizer_option(
    "tokenizer.json, tokenizer.model, or a directory with one of them (with both, tokenizer.json is used; name the "
    "file to choose)."
)
@prefix_option(
    "Writes PREFIX.bin, PREFIX.idx and PREFIX.json, none of which may exist, and where tokens are new the tokenizer "
    "that has them, PREFIX-tokenizer/."
)
@click.option(
    "--json-key",
    "json_keys",
    default=("text",),
    show_default="text",
    multiple=True,
    metavar="KEY",
    help="Where a JSON line has its text, or a parquet file its column. Of several, each makes a dataset PREFIX_KEY.",
)
@click.option("--append-eod", is_flag=True, help="End every document with the end-of-document token.")
@click.option("--prepend-bos", is_flag=True, help="Begin every document with the tokenizer's begin token.")
@click.option(
    "--no-new-tokens",
    is_flag=True,
    help="Leave the vocabulary as it is. By default <CLS> <SEP> <EOD> <MASK> <PAD> are added to it (<PAD> where there "
    "is no padding token), and the model needs rows for them.",
)
@click.option("--vocab-extra-ids", default=0, metavar="N", help="Add N tokens <extra_id_0>, <extra_id_1>…")
@vocab_extra_ids_list_option
@on_error_option
@click.option(
    "--workers", type=click.IntRange(min=1), metavar="N", help="Processes to spread the work over.  [default: cores]"
)
def tokenize(
    inputs: tuple[Path, ...],
    tokenizer: Path,
    out: Path,
    json_keys: tuple[str, ...],
    append_eod: bool,
    prepend_bos: bool,
    no_new_tokens: bool,
    vocab_extra_ids: int,
    vocab_extra_ids_list: str,
    on_error: Literal["stop", "skip"],
    workers: int | None,
) -> None:
    """Turn text into a dataset of token ids for training and verification.

    Documents keep their order; those without a token are skipped and counted.

    \b
    megacore tokenize --input 'data/*.jsonl' --tokenizer published/ --out data/train --append-eod --no-new-tokens
    """
    import megacore.data
    from megacore.data.preprocess.readers import expand, total_size

    total = total_size(expand(inputs))
    with documents_progress("tokenizing", total) as (advance, advance_documents):
        summary = megacore.data.tokenize(
            inputs,
            tokenizer=tokenizer,
            out=out,
            json_key=json_keys,
            append_eod=append_eod,
            prepend_bos=prepend_bos,
            new_tokens=not no_new_tokens,
            vocab_extra_ids=vocab_extra_ids,
            vocab_extra_ids_list=vocab_extra_ids_list.split(",") if vocab_extra_ids_list else (),
            on_error=on_error,
            workers=workers,
            report=print_note,
            advance=advance,
            advance_documents=advance_documents,
        )
    for error in summary.first_errors:
        print_note(f"skipped {error}")
    note_new_tokens(summary.new_tokens, summary.tokenizer_directory)
    click.echo(_told(summary))


def _told(summary: TokenizeSummary) -> str:
    skipped = [
        counted(number, noun)
        for number, noun in (
            (summary.num_empty_documents, "empty document"),
            (summary.num_erroneous_documents, "malformed document"),
        )
        if number
    ]
    return (
        f"{', '.join(map(str, summary.prefixes))}: {counted(summary.num_documents, 'document')}, "
        f"{counted(summary.num_tokens, 'token')}, {summary.num_text_bytes / summary.num_tokens:.2f} bytes a token"
        + (f"; skipped {' and '.join(skipped)}" if skipped else "")
        + f"; {summary.seconds:.1f} s with {summary.engine}"
    )
