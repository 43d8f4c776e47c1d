"""``megacore translate``: a published checkpoint to another published format."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from megacore.cli.notes import print_note
from megacore.cli.options import dtype_option, out_option, pp_option, tp_option
from megacore.cli.progress import bytes_progress, published_bytes
from megacore.cli.published_options import (
    cache_dir_option,
    find_published,
    format_option,
    from_option,
    model_option,
    revision_option,
    source_option,
    true_vocab_size_option,
)

if TYPE_CHECKING:
    from megacore.plugins import Family


@click.command()
@model_option
@from_option("translate")
@cache_dir_option
@revision_option
@out_option
@source_option
@format_option
@dtype_option
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
    **settings: Any,
) -> None:
    """Convert a published checkpoint to another format.

    Tensors are streamed from file to file; the model is never in memory as a whole.

    \b
    megacore translate --model mpt --from published/ --out translated/
    """
    from megacore.weights import translate

    source_directory = find_published(origin, out=out, cache_dir=cache_dir, revision=revision)
    with bytes_progress("translating", published_bytes(source_directory, source)) as advance:
        translate(
            model,
            source_directory,
            out,
            source=source,
            format=format,
            report=print_note,
            advance=advance,
            **settings,
        )
    click.echo(f"Translated {origin} to {out} ({format}).")
