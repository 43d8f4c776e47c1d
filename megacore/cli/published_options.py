"""The options about published checkpoints, and finding such a checkpoint on the disk or on the hub."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import click

from megacore.cli.notes import print_note
from megacore.cli.options import Command, FamilyType

FORMAT_NAMES = ("hf", "meta", "megatron-llm")
"""The names in :data:`megacore.weights.formats.FORMATS`, whose import needs torch."""


def from_option(verb: str, *, default: str | None = None) -> Callable[[Command], Command]:
    """Return the option ``--from``, which is required unless there is a ``default``."""
    return click.option(
        "--from",
        "origin",
        metavar="DIR_OR_HUB_ID",
        required=default is None,
        help=f"Checkpoint to {verb}: a directory, or OWNER/NAME on the Hugging Face hub."
        + (f"  [default: {default}]" if default else ""),
    )


model_option = click.option(
    "--model", type=FamilyType(), required=True, help="Model family. `megacore plugins` lists them."
)
source_option = click.option(
    "--source", help=f"Format of the published checkpoint: {', '.join(FORMAT_NAMES)}.  [default: detected]"
)
format_option = click.option(
    "--format", default="hf", show_default=True, help=f"Format to write: {', '.join(FORMAT_NAMES)}."
)
cache_dir_option = click.option(
    "--cache-dir",
    type=click.Path(file_okay=False, path_type=Path),
    help="Cache directory for downloads.  [default: the cache of huggingface_hub]",
)
revision_option = click.option("--revision", help="Branch, tag or commit to download.  [default: main]")
true_vocab_size_option = click.option(
    "--true-vocab-size",
    type=click.IntRange(min=1),
    help="Vocabulary size without padding, for a checkpoint that pads its vocabulary and does not record by how much.",
)


def find_published(
    origin: str, *, out: Path, cache_dir: Path | None, revision: str | None, is_on_hub: bool = False
) -> Path:
    """Return the directory of the checkpoint ``origin``, a directory or a repository, which is downloaded if necessary.

    With ``is_on_hub`` it is a repository even where a directory of that name exists.

    Raises:
        MegacoreError: The checkpoint is not available, or ``out`` exists, which is checked before any download.
    """
    from megacore.atomic_output import output_errors, require_absent
    from megacore.weights.hub import fetch, locate, provenance

    with output_errors(out):
        require_absent(out)
    find = fetch if is_on_hub else locate
    directory = find(origin, cache_dir=cache_dir, revision=revision)
    if fetched := provenance(directory):
        print_note(f"{fetched['repository']} is at revision {fetched['revision']}")
    return directory
