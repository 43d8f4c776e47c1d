"""``megacore convert``: a published checkpoint to a native one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from megacore.cli.notes import print_note
from megacore.cli.options import add_tokens_option, dtype_option, out_option, pp_option, tp_option
from megacore.cli.progress import bytes_progress, published_bytes
from megacore.cli.published_options import (
    cache_dir_option,
    find_published,
    from_option,
    model_option,
    revision_option,
    source_option,
    true_vocab_size_option,
)

if TYPE_CHECKING:
    from megacore.plugins import Family


@click.command()
@model_option
@from_option("convert", default="the repository of --size")
@click.option(
    "--size",
    help="Published size to download from the hub. With --from, refuse a checkpoint of another size.",
)
@cache_dir_option
@revision_option
@out_option
@source_option
@dtype_option
@tp_option
@pp_option
@true_vocab_size_option
@add_tokens_option
def convert(
    model: Family,
    origin: str | None,
    size: str | None,
    cache_dir: Path | None,
    revision: str | None,
    out: Path,
    source: str | None,
    **settings: Any,
) -> None:
    """Convert a published checkpoint to the native format.

    Tensors are streamed from file to file; the model is never in memory as a whole.

    \b
    megacore convert --model mpt --from published/ --out ckpt/
    megacore convert --model mpt --size 7 --out ckpt/
    """
    if origin is None and size is None:
        raise click.UsageError("Give --from, or --size to fetch a published model.")
    from megacore.parallel import describe_imbalance
    from megacore.weights import convert
    from megacore.weights.hub import repository_of_size

    is_on_hub = origin is None
    if origin is None:
        assert size is not None
        origin = repository_of_size(model, size)
    source_directory = find_published(origin, out=out, cache_dir=cache_dir, revision=revision, is_on_hub=is_on_hub)
    with bytes_progress("converting", published_bytes(source_directory, source)) as advance:
        manifest = convert(
            model,
            source_directory,
            out,
            source=source,
            size=size,
            report=print_note,
            advance=advance,
            **settings,
        )
    if imbalance := describe_imbalance(manifest.specs, settings["tp"]):
        print_note(imbalance)
    layout = f"tp {settings['tp']}, pp {settings['pp']}"
    click.echo(f"Converted {len(manifest.parameters)} parameters of {model.name} to {out} ({layout}).")
