"""``megacore convert``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from megacore.cli.notes import print_note
from megacore.cli.options import (
    DtypeType,
    FamilyType,
    cache_dir_option,
    out_option,
    pp_option,
    revision_option,
    tp_option,
)
from megacore.cli.progress import bytes_progress

if TYPE_CHECKING:
    import torch

    from megacore.plugins import Family


@click.command()
@click.option("--model", type=FamilyType(), required=True, help="Model family; `megacore plugins` lists them.")
@click.option(
    "--from",
    "origin",
    metavar="DIR_OR_HUB_ID",
    help="Checkpoint to convert: a directory, or owner/name on the Hugging Face hub.  [default: where --size is]",
)
@click.option(
    "--size",
    help="Published size to fetch from the hub; with --from, refuse a checkpoint that is not of this size.",
)
@cache_dir_option
@revision_option
@out_option
@click.option("--source", help="Format of the checkpoint to convert.  [default: recognised by its files]")
@click.option("--dtype", type=DtypeType(), help="Convert to this dtype.  [default: every tensor keeps its own]")
@tp_option
@pp_option
@click.option(
    "--true-vocab-size",
    type=click.IntRange(min=1),
    help="Rows of the vocabulary that are tokens, where a checkpoint pads it and does not say so.",
)
def convert(
    model: Family,
    origin: str | None,
    size: str | None,
    cache_dir: Path | None,
    revision: str | None,
    out: Path,
    source: str | None,
    dtype: torch.dtype | None,
    tp: int,
    pp: int,
    true_vocab_size: int | None,
) -> None:
    """Convert a published checkpoint to megacore's format, streaming from file to file.

    \b
    megacore convert --model mpt --from published/ --out ckpt/
    megacore convert --model mpt --size 7 --out ckpt/
    """
    if origin is None and size is None:
        raise click.UsageError("Give --from, or --size to fetch a published model.")
    from megacore.checkpoint.staging import reported_as_output_error, require_absent
    from megacore.parallel import describe_imbalance
    from megacore.weights import convert
    from megacore.weights.hub import fetch, locate, provenance, repository_of_size

    with reported_as_output_error(out):
        require_absent(out)  # said before a download, not after it
    if origin is not None:
        source_directory = locate(origin, cache_dir=cache_dir, revision=revision)
    else:
        assert size is not None
        source_directory = fetch(repository_of_size(model, size), cache_dir=cache_dir, revision=revision)
    if fetched := provenance(source_directory):
        print_note(f"{fetched['repository']} is at revision {fetched['revision']}")
    total = sum(path.stat().st_size for path in source_directory.glob("*.safetensors"))
    with bytes_progress("converting", total) as advance:
        manifest = convert(
            model,
            source_directory,
            out,
            source=source,
            size=size,
            dtype=dtype,
            tp=tp,
            pp=pp,
            true_vocab_size=true_vocab_size,
            report=print_note,
            advance=advance,
        )
    if imbalance := describe_imbalance(manifest.specs, tp):
        print_note(imbalance)
    click.echo(f"Converted {len(manifest.parameters)} parameters of {model.name} to {out} (tp {tp}, pp {pp}).")
