"""``megacore permute-qkv``: an old Megatron-LLM checkpoint to the current rotary layout."""

from __future__ import annotations

from pathlib import Path

import click

from megacore.cli.notes import print_note
from megacore.cli.progress import bytes_progress, published_bytes


@click.command("permute-qkv")
@click.option("--input-dir", type=click.Path(path_type=Path), required=True, help="Checkpoint to update.")
@click.option("--output-dir", type=click.Path(path_type=Path), required=True, help="Directory to create.")
@click.option(
    "--layout",
    type=click.Choice(["halves"]),
    help="Rotary layout of the input. Required unless its files record it.",
)
def permute_qkv(input_dir: Path, output_dir: Path, layout: str | None) -> None:
    """Update the rotary layout of an old Megatron-LLM checkpoint.

    Checkpoints of its commit 332cf3c or earlier have another order of query and key rows. Sharded
    checkpoints are updated rank by rank and keep their sharding. The output records its rotary layout and is refused
    as an input.

    \b
    megacore permute-qkv --input-dir old/ --output-dir new/ --layout halves
    """
    from megacore.weights.formats.megatron_llm.rotary_update import permute_qkv

    with bytes_progress("permuting", published_bytes(input_dir, "megatron-llm")) as advance:
        num_permuted = permute_qkv(input_dir, output_dir, layout=layout, report=print_note, advance=advance)
    click.echo(f"Permuted {num_permuted} QKV projections of {input_dir} to interleaved rotary pairs in {output_dir}.")
