"""``megacore data``: looking at datasets and joining them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from megacore.cli.progress import bytes_progress

if TYPE_CHECKING:
    from numpy.typing import NDArray

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
    """Say what the dataset PREFIX holds: documents or conversations, tokens, how long they are, and what made it.

    A dataset that is truncated, damaged or of another format is refused.
    """
    found = _conversations(prefix) if _has_conversations(prefix) else _text(prefix)
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
    rows["lengths"] = ", ".join(f"{name} {length:,}" for name, length in found["lengths"].items())
    if description is None:
        rows["made by"] = "not known: there is no description beside it"
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


def _text(prefix: Path) -> dict[str, Any]:
    from megacore.data import DatasetDescription, IndexedDataset

    dataset, description = IndexedDataset(prefix), DatasetDescription.read(prefix)
    return {
        "documents": dataset.num_documents,
        "sequences": len(dataset),
        "tokens": dataset.num_tokens,
        "dtype": dataset.dtype.name,
        "lengths": _quantiles(dataset.document_lengths()),
        "description": None if description is None else dataclasses.asdict(description),
    }


def _conversations(prefix: Path) -> dict[str, Any]:
    import numpy as np

    from megacore.data import InstructionDataset, InstructionDescription
    from megacore.data.datasets.instruction import Role

    dataset, description = InstructionDataset(prefix), InstructionDescription.read(prefix)
    of_assistant = (np.count_nonzero(dataset[number][1] == Role.ASSISTANT) for number in range(len(dataset)))
    return {
        "conversations": len(dataset),
        "tokens": dataset.text.num_tokens,
        "assistant_tokens": int(sum(of_assistant)) if description is None else description.num_assistant_tokens,
        "dtype": dataset.text.dtype.name,
        "lengths": _quantiles(dataset.lengths),
        "description": None if description is None else dataclasses.asdict(description),
    }


def _quantiles(lengths: NDArray[Any]) -> dict[str, int]:
    import numpy as np

    # Lengths that there are, and none in between.
    return {
        name: int(np.quantile(lengths, share, method="lower")) if len(lengths) else 0
        for name, share in QUANTILES.items()
    }


def _has_conversations(prefix: Path) -> bool:
    """Whether instruction data is at ``prefix``, which is two datasets, and no dataset of text."""
    return Path(f"{prefix}-text.idx").is_file() and not Path(f"{prefix}.idx").is_file()


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
    from megacore.errors import DataError

    for prefix in filter(_has_conversations, prefixes):
        raise DataError(f"{prefix}: holds conversations; train on several such datasets as a mixture (data.prefix)")
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
    """Print what the dataset PREFIX begins with: its text where the tokenizer is known, else its ids.

    Of conversations, who speaks is said too.
    """
    from itertools import groupby, islice

    import numpy as np

    from megacore.data import (
        DatasetDescription,
        IndexedDataset,
        InstructionDataset,
        InstructionDescription,
        load_tokenizer,
    )
    from megacore.data.datasets.instruction import Role
    from megacore.errors import DataError

    has_conversations = _has_conversations(prefix)
    description = (InstructionDescription if has_conversations else DatasetDescription).read(prefix)
    if tokenizer is None and description is not None and description.tokenizer_directory is not None:
        tokenizer = prefix.with_name(description.tokenizer_directory)
    decoder = None if tokenizer is None else load_tokenizer(tokenizer)
    if decoder is not None and description is not None and decoder.sha256 != description.tokenizer_sha256:
        raise DataError(
            f"{prefix} was made with another tokenizer ({description.tokenizer_file}, sha256 "
            f"{description.tokenizer_sha256}) than {decoder.file}, which would print another text"
        )

    def shown(ids: list[int]) -> str:
        if decoder is None:
            return " ".join(map(str, ids))
        # A dataset need not say which tokenizer made it.
        if ids and not 0 <= min(ids) <= max(ids) < decoder.vocab_size:
            stranger = next(number for number in ids if not 0 <= number < decoder.vocab_size)
            raise DataError(
                f"{prefix} has token id {stranger}, and the vocabulary of {decoder.file} is 0 to "
                f"{decoder.vocab_size - 1}: give the tokenizer that made the dataset"
            )
        return decoder.decode(ids)

    if has_conversations:
        conversations = InstructionDataset(prefix)
        for number in range(min(num_documents, len(conversations))):
            of_text, of_roles = conversations[number]
            click.echo(f"--- conversation {number}, {len(of_text):,} tokens")
            turns = groupby(zip(of_text.tolist(), of_roles.tolist(), strict=True), key=lambda token: token[1])
            for role, tokens in turns:
                click.echo(f"[{Role(role).name.lower()}] {shown([token for token, _ in tokens])}")
        return
    for number, sequences in enumerate(islice(IndexedDataset(prefix).documents(), num_documents)):
        ids = np.concatenate(sequences).tolist() if sequences else []
        click.echo(f"--- document {number}, {len(ids):,} tokens")
        click.echo(shown(ids))
