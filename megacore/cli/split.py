"""``megacore split``: a native checkpoint to another parallel layout."""

from __future__ import annotations

from pathlib import Path

import click

from megacore.cli.notes import print_note
from megacore.cli.options import add_tokens_option, checkpoint_argument, out_option, pp_option, tp_option
from megacore.cli.progress import bytes_progress


@click.command()
@checkpoint_argument
@out_option
@tp_option
@pp_option
@add_tokens_option
def split(checkpoint: Path, out: Path, tp: int, pp: int, add_tokens: Path | None) -> None:
    """Reshard CKPT to another TP × PP size. Without --tp and --pp it is merged into one shard.

    Every command loads a checkpoint of any layout; a checkpoint in the right one loads faster.

    \b
    megacore split ckpt/ --out ckpt-tp2/ --tp 2
    """
    from megacore.checkpoint import Checkpoint, split
    from megacore.parallel import describe_imbalance

    with bytes_progress("splitting", Checkpoint(checkpoint).num_bytes) as advance:
        manifest = split(checkpoint, out, tp=tp, pp=pp, add_tokens=add_tokens, advance=advance)
    if imbalance := describe_imbalance(manifest.specs, tp):
        print_note(imbalance)
    click.echo(f"Wrote {len(manifest.files)} files to {out} (tp {tp}, pp {pp}).")
