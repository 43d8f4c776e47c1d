"""``megacore translate``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from megacore.cli.notes import print_note
from megacore.cli.options import DtypeType, FamilyType, out_option, pp_option, tp_option
from megacore.cli.progress import bytes_progress

if TYPE_CHECKING:
    import torch

    from megacore.plugins import Family


@click.command()
@click.option("--model", type=FamilyType(), required=True, help="Model family; `megacore plugins` lists them.")
@click.option(
    "--from", "source_directory", type=click.Path(path_type=Path), required=True, help="Checkpoint to translate."
)
@out_option
@click.option("--source", help="Format of the checkpoint to translate.  [default: recognised by its files]")
@click.option("--format", default="hf", show_default=True, help="Format to write.")
@click.option("--dtype", type=DtypeType(), help="Convert to this dtype.  [default: every tensor keeps its own]")
@tp_option
@pp_option
def translate(
    model: Family,
    source_directory: Path,
    out: Path,
    source: str | None,
    format: str,
    dtype: torch.dtype | None,
    tp: int,
    pp: int,
) -> None:
    """Write a published checkpoint in another published format, streaming from file to file.

    \b
    megacore translate --model mpt --from published/ --out translated/
    """
    from megacore.weights import translate

    total = sum(
        path.stat().st_size for kind in ("safetensors", "pth", "pt") for path in source_directory.rglob(f"*.{kind}")
    )
    with bytes_progress("translating", total) as advance:
        translate(
            model,
            source_directory,
            out,
            source=source,
            format=format,
            dtype=dtype,
            tp=tp,
            pp=pp,
            report=print_note,
            advance=advance,
        )
    click.echo(f"Translated {source_directory} to {out} ({format}).")
