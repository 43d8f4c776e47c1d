"""``megacore export``: a native checkpoint to a published format."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from megacore.cli.notes import print_note
from megacore.cli.options import checkpoint_argument, dtype_option, out_option, pp_option, tp_option
from megacore.cli.progress import bytes_progress
from megacore.cli.published_options import format_option

if TYPE_CHECKING:
    import torch


@click.command()
@checkpoint_argument
@out_option
@format_option
@dtype_option
@tp_option
@pp_option
def export(checkpoint: Path, out: Path, format: str, dtype: torch.dtype | None, tp: int, pp: int) -> None:
    """Export CKPT to a published format.

    The output has the weights, their index, the configuration and the tokenizer.

    \b
    megacore export ckpt/ --out exported/
    """
    from megacore.checkpoint import Checkpoint
    from megacore.weights import export

    with bytes_progress("exporting", Checkpoint(checkpoint).num_bytes) as advance:
        export(checkpoint, out, format=format, dtype=dtype, tp=tp, pp=pp, report=print_note, advance=advance)
    click.echo(f"Exported {checkpoint} to {out} ({format}).")
