"""``megacore convert``."""

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
    "--from", "source_directory", type=click.Path(path_type=Path), required=True, help="Checkpoint to convert."
)
@out_option
@click.option("--source", help="Format of the checkpoint to convert.  [default: recognised by its files]")
@click.option("--dtype", type=DtypeType(), help="Convert to this dtype.  [default: every tensor keeps its own]")
@tp_option
@pp_option
def convert(
    model: Family, source_directory: Path, out: Path, source: str | None, dtype: torch.dtype | None, tp: int, pp: int
) -> None:
    """Convert a published checkpoint to megacore's format, streaming from file to file.

    \b
    megacore convert --model mpt --from published/ --out ckpt/
    """
    from megacore.parallel import describe_imbalance
    from megacore.weights import convert

    total = sum(path.stat().st_size for path in source_directory.glob("*.safetensors"))
    with bytes_progress("converting", total) as advance:
        manifest = convert(model, source_directory, out, source=source, dtype=dtype, tp=tp, pp=pp, advance=advance)
    if imbalance := describe_imbalance(manifest.specs, tp):
        print_note(imbalance)
    click.echo(f"Converted {len(manifest.parameters)} parameters of {model.name} to {out} (tp {tp}, pp {pp}).")
