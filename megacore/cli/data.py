"""``megacore data``: looking at datasets and joining them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import click

from megacore.cli.progress import bytes_progress

QUANTILES = {"shortest": 0.0, "10 %": 0.1, "median": 0.5, "90 %": 0.9, "99 %": 0.99, "longest": 1.0}
"""Of the lengths of the documents, by the name they are printed under."""

prefix_argument = click.argument("prefix", type=click.Path(path_type=Path))


@click.group()
def data() -> None:
    """Look at datasets of token ids, and join them."""


@data.command()
@prefix_argument
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON.")
def inspect(prefix: Path, as_json: bool) -> None:
    """Say what the dataset PREFIX holds: documents, tokens, how long they are, and what made it.

    A dataset that is truncated, damaged or of another format is refused.
    """
    import numpy as np

    from megacore.data import DatasetDescription, IndexedDataset

    dataset, description = IndexedDataset(prefix), DatasetDescription.read(prefix)
    lengths = dataset.document_lengths()
    # Lengths that documents have, and none in between.
    quantiles = {
        name: int(np.quantile(lengths, share, method="lower")) if len(lengths) else 0
        for name, share in QUANTILES.items()
    }
    if as_json:
        found = {
            "prefix": str(prefix),
            "documents": dataset.num_documents,
            "sequences": len(dataset),
            "tokens": dataset.num_tokens,
            "dtype": dataset.dtype.name,
            "document_lengths": quantiles,
            "description": None if description is None else dataclasses.asdict(description),
        }
        click.echo(json.dumps(found, indent=2))
        return
    rows = {
        "documents": f"{dataset.num_documents:,}",
        "tokens": f"{dataset.num_tokens:,}, as {dataset.dtype.name}",
        "lengths": ", ".join(f"{name} {length:,}" for name, length in quantiles.items()),
    }
    if len(dataset) != dataset.num_documents:
        rows["documents"] += f" in {len(dataset):,} sequences"
    if description is None:
        rows["made by"] = "not known: there is no description beside it"
    else:
        rows["tokenizer"] = (
            f"{description.tokenizer_file}, vocabulary {description.vocab_size}, sha256 {description.tokenizer_sha256}"
        )
        rows["documents"] += f", each ends with id {description.eod_id}" if description.append_eod else ""
        rows["made by"] = f"megacore {description.megacore_version}"
    for label, value in rows.items():
        click.echo(f"{label:<12}{value}")


@data.command()
@click.argument("prefixes", metavar="PREFIX...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    required=True,
    metavar="PREFIX",
    help="Writes PREFIX.bin, PREFIX.idx and, where all inputs are described, PREFIX.json. None of them may exist.",
)
def merge(prefixes: tuple[Path, ...], out: Path) -> None:
    """Join datasets, in the order given. They must come from the same tokenizer, where they say from which.

    \b
    megacore data merge data/part1 data/part2 --out data/all
    """
    from megacore.data import merge_datasets

    paths = [Path(f"{prefix}.bin") for prefix in prefixes]
    with bytes_progress("merging", sum(path.stat().st_size for path in paths if path.is_file())) as advance:
        merged = merge_datasets(prefixes, out=out, advance=advance)
    click.echo(f"{out}: {merged.num_documents:,} documents, {merged.num_tokens:,} tokens, as {merged.dtype.name}")


@data.command()
@prefix_argument
@click.option(
    "-n", "num_documents", type=click.IntRange(min=1), default=3, show_default=True, help="How many documents."
)
@click.option(
    "--tokenizer",
    type=click.Path(path_type=Path),
    metavar="PATH",
    help="tokenizer.json, tokenizer.model, or a directory with one of them: prints text instead of ids.  [default: the "
    "one that `megacore tokenize` wrote beside the dataset, if it added tokens]",
)
def head(prefix: Path, num_documents: int, tokenizer: Path | None) -> None:
    """Print the first documents of the dataset PREFIX: their text where the tokenizer is known, else their ids."""
    from itertools import islice

    import numpy as np

    from megacore.data import DatasetDescription, IndexedDataset, load_tokenizer
    from megacore.errors import DataError

    dataset, description = IndexedDataset(prefix), DatasetDescription.read(prefix)
    if tokenizer is None and description is not None and description.tokenizer_directory is not None:
        tokenizer = prefix.with_name(description.tokenizer_directory)
    decoder = None if tokenizer is None else load_tokenizer(tokenizer)
    if decoder is not None and description is not None and decoder.sha256 != description.tokenizer_sha256:
        raise DataError(
            f"{prefix} was made with another tokenizer ({description.tokenizer_file}, sha256 "
            f"{description.tokenizer_sha256}) than {decoder.file}, which would print another text"
        )
    for number, sequences in enumerate(islice(dataset.documents(), num_documents)):
        ids = np.concatenate(sequences).tolist() if sequences else []
        click.echo(f"--- document {number}, {len(ids):,} tokens")
        click.echo(decoder.decode(ids) if decoder is not None else " ".join(map(str, ids)))
