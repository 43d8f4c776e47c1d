"""``megacore export``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from megacore.cli.notes import print_note
from megacore.cli.options import DtypeType, checkpoint_argument, format_option, out_option, pp_option, tp_option
from megacore.cli.progress import bytes_progress

if TYPE_CHECKING:
    import torch


@click.command()
@checkpoint_argument
@out_option
@format_option
@click.option("--dtype", type=DtypeType(), help="Convert to this dtype.  [default: every tensor keeps its own]")
@tp_option
@pp_option
def export(checkpoint: Path, out: Path, format: str, dtype: torch.dtype | None, tp: int, pp: int) -> None:
    """Write CKPT in a published format: weights, index, config.json and tokenizer.

    \b
    megacore export ckpt/ --out exported/
    """
    from megacore.checkpoint import Checkpoint
    from megacore.weights import export

    with bytes_progress("exporting", Checkpoint(checkpoint).num_bytes) as advance:
        export(checkpoint, out, format=format, dtype=dtype, tp=tp, pp=pp, report=print_note, advance=advance)
    click.echo(f"Exported {checkpoint} to {out} ({format}).")
