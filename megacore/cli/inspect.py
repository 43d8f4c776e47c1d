"""``megacore inspect``: the contents of a native checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import click

from megacore.cli.options import checkpoint_argument
from megacore.cli.progress import bytes_progress


@click.command()
@checkpoint_argument
@click.option(
    "--check", is_flag=True, help="Compare every file with its SHA-256 digest. Exit with code 1 if one differs."
)
@click.option("--json", "as_json", is_flag=True, help="Print the whole description as JSON.")
def inspect(checkpoint: Path, check: bool, as_json: bool) -> None:
    """Describe the contents and the layout of CKPT. With --check, verify the digests of its files."""
    from megacore.checkpoint import Checkpoint, inspect

    with bytes_progress("checking", Checkpoint(checkpoint).num_bytes if check else 0) as advance:
        found = inspect(checkpoint, check=check, advance=advance)
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    config = found["config"]
    rows = {
        "family": found["family"],
        "parameters": f"{found['parameters']:,} in {found['tensors']} tensors ({', '.join(found['dtypes'])})",
        "layers": config["num_layers"],
        "hidden": f"{config['hidden_size']}, ffn {config['ffn_hidden_size']}",
        "heads": f"{config['num_attention_heads']} of {config['head_dim']}, {config['num_kv_heads']} key-value",
        "vocabulary": f"{config['vocab_size']}{', tied head' if config['tie_embeddings'] else ''}",
        "layout": f"tp {found['tp']}, pp {found['pp']}" + (f" ({found['imbalance']})" if found["imbalance"] else ""),
        "stages": ", ".join(f"layers {start} to {stop - 1}" for start, stop in found["stages"]),
        "files": f"{len(found['files'])}, {found['bytes'] / 1e9:.2f} GB",
        "tokenizer": ", ".join(found["tokenizer"]) or "none",
        "made by": ", then ".join(f"{entry['command']} ({entry['at']})" for entry in found["history"]),
    }
    for label, value in rows.items():
        click.echo(f"{label:<12}{value}")
    if check:
        click.echo("Every file matches its digest.")
