"""``megacore split``."""

from __future__ import annotations

from pathlib import Path

import click

from megacore.cli.notes import print_note
from megacore.cli.options import add_tokens_option, checkpoint_argument, out_option, parallel_size_option
from megacore.cli.progress import bytes_progress


@click.command()
@checkpoint_argument
@out_option
@parallel_size_option("--tp", "Tensor-parallel size to cut for; 1 merges.")
@parallel_size_option("--pp", "Pipeline-parallel size to cut for; 1 merges.")
@add_tokens_option
def split(checkpoint: Path, out: Path, tp: int, pp: int, add_tokens: Path | None) -> None:
    """Cut CKPT for other parallel sizes, or merge it. Training and verification load any layout; this saves them time.

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
