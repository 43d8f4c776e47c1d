"""``megacore tokenize``: text to an indexed dataset of token ids."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from megacore.cli.notes import counted, print_note
from megacore.cli.progress import documents_progress
from megacore.cli.tokenizing_options import (
    MultiInputCommand,
    inputs_option,
    note_new_tokens,
    on_error_option,
    prefix_option,
    tokenizer_option,
    vocab_extra_ids_list_option,
)

if TYPE_CHECKING:
    from megacore.data import TokenizeSummary


@click.command(cls=MultiInputCommand)
@inputs_option(
    "Text to tokenize. A .jsonl or .json file has one JSON object per line, each a document; a .parquet file has one "
    "document per row; any other file is plain text and a single document."
)
@tokenizer_option(
    "A tokenizer.json, a tokenizer.model, or a directory with one of them. If it has both, tokenizer.json is used."
)
@prefix_option(
    "Prefix of the output: PREFIX.bin, PREFIX.idx and PREFIX.json and, if tokens are added, the extended tokenizer "
    "PREFIX-tokenizer/. None of them may exist."
)
@click.option(
    "--json-key",
    "json_keys",
    default=("text",),
    show_default="text",
    multiple=True,
    metavar="KEY",
    help="Key of the text in a JSON object, or column of a parquet file. Repeatable: each of several keys makes a "
    "dataset PREFIX_KEY.",
)
@click.option("--append-eod", is_flag=True, help="Append the end-of-document token to every document.")
@click.option("--prepend-bos", is_flag=True, help="Prepend the tokenizer's BOS token to every document.")
@click.option(
    "--no-new-tokens",
    is_flag=True,
    help="Keep the vocabulary. By default <CLS> <SEP> <EOD> <MASK> are added to it, and <PAD> if it has no padding "
    "token; the model then needs embedding rows for them.",
)
@click.option(
    "--vocab-extra-ids", default=0, metavar="N", help="Add N tokens <extra_id_0>, <extra_id_1>, … to the vocabulary."
)
@vocab_extra_ids_list_option
@on_error_option
@click.option(
    "--workers", type=click.IntRange(min=1), metavar="N", help="Number of processes.  [default: number of cores]"
)
def tokenize(
    inputs: tuple[Path, ...],
    tokenizer: Path,
    out: Path,
    json_keys: tuple[str, ...],
    no_new_tokens: bool,
    **settings: Any,
) -> None:
    """Tokenize text into an indexed dataset.

    Documents keep their order. Documents without a token are skipped and counted.

    \b
    megacore tokenize --input 'data/*.jsonl' --tokenizer published/ --out data/train --append-eod --no-new-tokens
    """
    import megacore.data
    from megacore.data.preprocess.readers import expand, total_size

    with documents_progress("tokenizing", total_size(expand(inputs))) as (advance, advance_documents):
        summary = megacore.data.tokenize(
            inputs,
            tokenizer=tokenizer,
            out=out,
            json_key=json_keys,
            new_tokens=not no_new_tokens,
            report=print_note,
            advance=advance,
            advance_documents=advance_documents,
            **settings,
        )
    for error in summary.first_errors:
        print_note(f"skipped {error}")
    note_new_tokens(summary.new_tokens, summary.tokenizer_directory)
    click.echo(_format_summary(summary))


def _format_summary(summary: TokenizeSummary) -> str:
    numbers = {"empty": summary.num_empty_documents, "malformed": summary.num_erroneous_documents}
    skipped = [counted(number, f"{kind} document") for kind, number in numbers.items() if number]
    return (
        f"{', '.join(map(str, summary.prefixes))}: {counted(summary.num_documents, 'document')}, "
        f"{counted(summary.num_tokens, 'token')}, {summary.num_text_bytes / summary.num_tokens:.2f} bytes a token"
        + (f"; skipped {' and '.join(skipped)}" if skipped else "")
        + f"; {summary.seconds:.1f} s with {summary.engine}"
    )
