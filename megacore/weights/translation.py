"""Translation of a published checkpoint to another published format, without a native one in between."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from megacore.atomic_output import require_space, staged_directory
from megacore.checkpoint.safetensors_file import MAX_FILE_BYTES
from megacore.plugins import Family, get_family
from megacore.weights.binding import bind
from megacore.weights.conversion import open_published
from megacore.weights.exporting import published_tensors
from megacore.weights.formats import Publication, format_for


def translate(
    model: str | Family,
    source_directory: Path | str,
    out: Path | str,
    *,
    source: str | None = None,
    format: str = "hf",
    dtype: torch.dtype | None = None,
    tp: int = 1,
    pp: int = 1,
    true_vocab_size: int | None = None,
    max_file_bytes: int = MAX_FILE_BYTES,
    report: Callable[[str], None] = lambda note: None,
    advance: Callable[[int], None] = lambda num_bytes: None,
) -> None:
    """Write the checkpoint in ``source_directory`` to ``out`` in another published format.

    The result is that of :func:`convert` followed by :func:`export`, but tensors stream from published files to
    published files.

    Args:
        model: The family, or its name.
        source_directory: A published checkpoint.
        out: The directory to create; it must not exist.
        source: The format of the checkpoint; by default recognised by its files.
        format: The format to write.
        dtype: The dtype to convert to; by default every tensor keeps its own.
        tp: Number of tensor-parallel ranks to cut for, in a format that has ranks.
        pp: Number of pipeline stages to cut for, in a format that has stages.
        true_vocab_size: Number of vocabulary rows that are tokens, in a format that pads without recording it.
        max_file_bytes: The largest size of a weight file, unless a single tensor is larger, in a format that allows it.
        report: Called with each note on assumptions, omissions and additions, one sentence at a time.
        advance: Called with the number of bytes written, after every few megabytes.

    Raises:
        MegacoreError: a subclass for each reason; nothing is left in ``out``.
    """
    family = get_family(model) if isinstance(model, str) else model
    out = Path(out)
    writer = format_for(family.family, format)
    opened = open_published(
        family, Path(source_directory), source=source, dtype=dtype, true_vocab_size=true_vocab_size, report=report
    )
    target = bind(family, opened.config, format)
    publication = Publication(
        tensors=published_tensors(target, opened.parameters, None),  # they have the requested dtype already
        config=family.family.config_to_source(opened.config, format),
        origin=opened.published.origin() if opened.source == format else {},
        tokenizer_files=opened.published.tokenizer_files(),
        tp=tp,
        pp=pp,
        max_file_bytes=max_file_bytes,
        report=report,
    )
    with staged_directory(out) as staging:
        require_space(staging, publication.num_bytes, out)
        writer.write(staging, publication, advance=advance)
