"""Translating a published checkpoint from one published format to another, with no native one in between."""

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

    The same as :func:`convert` followed by :func:`export`, without the native files: tensors stream from the published
    ones to the published ones.

    Args:
        model: the family, or its name.
        source_directory: a published checkpoint.
        out: is created; must not exist.
        source: the format of the checkpoint, by default recognised by its files.
        format: to write.
        dtype: to convert to; by default every tensor keeps its own.
        tp: ranks to cut for, in a format that is cut.
        pp: pipeline stages to cut for, in a format that is cut so.
        true_vocab_size: rows of the vocabulary that are tokens, in a format that pads it without recording that.
        max_file_bytes: no weight file is larger, unless a single tensor is, in a format that lets files be split.
        report: is told what was assumed, left behind or added, a sentence at a time.
        advance: is told of every few bytes written.

    Raises:
        MegacoreError: in one of its kinds, for whatever does not fit; nothing is left in ``out``.
    """
    family = get_family(model) if isinstance(model, str) else model
    out = Path(out)
    writer = format_for(family.family, format)
    opened = open_published(
        family, Path(source_directory), source=source, dtype=dtype, true_vocab_size=true_vocab_size, report=report
    )
    target = bind(family, opened.config, format)
    publication = Publication(
        tensors=published_tensors(target, opened.parameters, None),  # they are in the dtype that was asked for already
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
