"""``megacore translate``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from megacore.cli.notes import print_note
from megacore.cli.options import (
    DtypeType,
    FamilyType,
    cache_dir_option,
    format_option,
    from_option,
    out_option,
    pp_option,
    revision_option,
    source_option,
    tp_option,
    true_vocab_size_option,
)
from megacore.cli.origin import published_directory
from megacore.cli.progress import bytes_progress, published_bytes

if TYPE_CHECKING:
    import torch

    from megacore.plugins import Family


@click.command()
@click.option("--model", type=FamilyType(), required=True, help="Model family; `megacore plugins` lists them.")
@from_option("translate")
@cache_dir_option
@revision_option
@out_option
@source_option
@format_option
@click.option("--dtype", type=DtypeType(), help="Convert to this dtype.  [default: every tensor keeps its own]")
@tp_option
@pp_option
@true_vocab_size_option
def translate(
    model: Family,
    origin: str,
    cache_dir: Path | None,
    revision: str | None,
    out: Path,
    source: str | None,
    format: str,
    dtype: torch.dtype | None,
    tp: int,
    pp: int,
    true_vocab_size: int | None,
) -> None:
    """Write a published checkpoint in another published format, streaming from file to file.

    \b
    megacore translate --model mpt --from published/ --out translated/
    """
    from megacore.weights import translate

    source_directory = published_directory(origin, out=out, cache_dir=cache_dir, revision=revision)
    with bytes_progress("translating", published_bytes(source_directory, source)) as advance:
        translate(
            model,
            source_directory,
            out,
            source=source,
            format=format,
            dtype=dtype,
            tp=tp,
            pp=pp,
            true_vocab_size=true_vocab_size,
            report=print_note,
            advance=advance,
        )
    click.echo(f"Translated {origin} to {out} ({format}).")
