"""Finding the published checkpoint that a command reads."""

from __future__ import annotations

from pathlib import Path

from megacore.cli.notes import print_note


def published_directory(
    origin: str, *, out: Path, cache_dir: Path | None, revision: str | None, is_on_hub: bool = False
) -> Path:
    """The directory of the checkpoint ``origin``, which may be on the hub; with ``is_on_hub``, it is there.

    Raises:
        MegacoreError: when it cannot be had, or, before anything is fetched, when ``out`` exists.
    """
    from megacore.atomic_output import output_errors, require_absent
    from megacore.weights.hub import fetch, locate, provenance

    with output_errors(out):
        require_absent(out)  # said before a download, not after it
    find = fetch if is_on_hub else locate
    directory = find(origin, cache_dir=cache_dir, revision=revision)
    if fetched := provenance(directory):
        print_note(f"{fetched['repository']} is at revision {fetched['revision']}")
    return directory
