"""``megacore data``: inspect, print and merge datasets."""

from __future__ import annotations

import json
from pathlib import Path

import click

from megacore.cli.progress import bytes_progress

prefix_argument = click.argument("prefix", type=click.Path(path_type=Path))


@click.group()
def data() -> None:
    """Inspect, print and merge datasets of token ids."""


@data.command()
@prefix_argument
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
def inspect(prefix: Path, as_json: bool) -> None:
    """Describe the dataset PREFIX: documents or conversations, tokens, lengths, and the tokenizer that made it.

    A dataset that is truncated, damaged or of another format is refused.
    """
    from megacore.data.datasets.inspection import inspect_dataset

    found = inspect_dataset(prefix)
    if as_json:
        click.echo(json.dumps({"prefix": str(prefix), **found}, indent=2))
        return
    description = found["description"]
    rows = {"documents": "", "conversations": "", "tokens": f"{found['tokens']:,}, as {found['dtype']}"}
    if "conversations" in found:
        rows["conversations"] = f"{found['conversations']:,}"
        rows["tokens"] += f", {found['assistant_tokens'] / max(1, found['tokens']):.1%} of them the assistant's"
    else:
        rows["documents"] = f"{found['documents']:,}"
        if found["sequences"] != found["documents"]:
            rows["documents"] += f" in {found['sequences']:,} sequences"
    rows["lengths"] = ", ".join(f"{label} {length:,}" for label, length in found["lengths"].items())
    if description is None:
        rows["made by"] = "unknown: the dataset has no description"
    else:
        rows["tokenizer"] = (
            f"{description['tokenizer_file']}, vocabulary {description['vocab_size']}, sha256 "
            f"{description['tokenizer_sha256']}"
        )
        rows["documents"] += f", each ends with id {description['eod_id']}" if description.get("append_eod") else ""
        rows["made by"] = f"megacore {description['megacore_version']}"
        if "markup" in description:
            rows["made by"] += f", with the markup {description['markup']}"
    for label, value in rows.items():
        if value:
            click.echo(f"{label:<15}{value}")


@data.command()
@click.argument("prefixes", metavar="PREFIX...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    required=True,
    metavar="PREFIX",
    help="Prefix of the output: PREFIX.bin, PREFIX.idx and, if all inputs have a description, PREFIX.json. None may "
    "exist.",
)
def merge(prefixes: tuple[Path, ...], out: Path) -> None:
    """Concatenate datasets in the given order. They must have been made with the same tokenizer, as far as is recorded.

    \b
    megacore data merge data/part1 data/part2 --out data/all
    """
    from megacore.data import merge_datasets
    from megacore.data.datasets.inspection import has_conversations
    from megacore.errors import DataError

    for prefix in filter(has_conversations, prefixes):
        raise DataError(f"{prefix}: holds conversations; train on several such datasets as a mixture (data.prefix)")
    paths = [Path(f"{prefix}.bin") for prefix in prefixes]
    with bytes_progress("merging", sum(path.stat().st_size for path in paths if path.is_file())) as advance:
        merged = merge_datasets(prefixes, out=out, advance=advance)
    click.echo(f"{out}: {merged.num_documents:,} documents, {merged.num_tokens:,} tokens, as {merged.dtype.name}")


@data.command()
@prefix_argument
@click.option(
    "-n",
    "num_documents",
    type=click.IntRange(min=1),
    default=3,
    show_default=True,
    help="Number of documents to print.",
)
@click.option(
    "--tokenizer",
    type=click.Path(path_type=Path),
    metavar="PATH",
    help="A tokenizer.json, a tokenizer.model, or a directory with one of them, to print text instead of ids.  "
    "[default: the tokenizer that `megacore tokenize` wrote beside the dataset, if it added tokens]",
)
def head(prefix: Path, num_documents: int, tokenizer: Path | None) -> None:
    """Print the first documents of the dataset PREFIX, as text if the tokenizer is known, else as ids.

    Conversations are printed with the role of each turn.
    """
    from megacore.data.datasets.inspection import DatasetReader, has_conversations

    reader = DatasetReader(prefix, tokenizer)
    if has_conversations(prefix):
        for number, (length, turns) in enumerate(reader.conversations(num_documents)):
            click.echo(f"--- conversation {number}, {length:,} tokens")
            for role, text in turns:
                click.echo(f"[{role.name.lower()}] {text}")
    else:
        for number, (length, text) in enumerate(reader.documents(num_documents)):
            click.echo(f"--- document {number}, {length:,} tokens\n{text}")
