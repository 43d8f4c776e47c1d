"""Export of a native checkpoint to a published format, and translation of a published one without a native one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from megacore.atomic_output import require_space, staged_directory
from megacore.checkpoint import Checkpoint
from megacore.checkpoint.matrix import LazyMatrix
from megacore.checkpoint.reading import check_in_background
from megacore.checkpoint.safetensors_file import DTYPES, MAX_FILE_BYTES, OutputTensor
from megacore.checkpoint.writing import Parameter
from megacore.model import read_config
from megacore.plugins import Family, get_family
from megacore.weights.binding import BoundMap, bind
from megacore.weights.conversion import open_published
from megacore.weights.formats import Publication, format_for


def export(
    checkpoint: Path | str,
    out: Path | str,
    *,
    format: str = "hf",
    dtype: torch.dtype | None = None,
    tp: int = 1,
    pp: int = 1,
    max_file_bytes: int = MAX_FILE_BYTES,
    report: Callable[[str], None] = lambda note: None,
    advance: Callable[[int], None] = lambda num_bytes: None,
) -> None:
    """Write ``checkpoint`` to directory ``out`` in a published format: weights, configuration, tokenizer.

    Args:
        checkpoint: A native checkpoint of any layout. Its digests are checked meanwhile.
        out: The directory to create; it must not exist.
        format: ``"hf"`` is a Hugging Face directory, ``"meta"`` Meta's own format, ``"megatron-llm"`` Megatron-LLM's.
            The family must have it among its sources.
        dtype: The dtype to convert to; by default every tensor keeps its own.
        tp: Number of tensor-parallel ranks to cut for, in a format that has ranks.
        pp: Number of pipeline stages to cut for, in a format that has stages.
        max_file_bytes: The largest size of a weight file, unless a single tensor is larger, in a format that allows it.
        report: Called with each note on the output, one sentence at a time.
        advance: Called with the number of bytes written, after every few megabytes.

    Raises:
        MegacoreError: a subclass for each reason; nothing is left in ``out``.
    """
    source = Checkpoint(checkpoint)
    manifest = source.manifest
    family = get_family(manifest.family)
    writer = format_for(family.family, format)
    config = read_config(family, source)
    bound = bind(family, config, format)
    source.check_parameters(bound.specs)
    parameters = {
        name: Parameter(entry.spec, source.matrix(name), DTYPES[entry.dtype])
        for name, entry in manifest.parameters.items()
    }
    publication = Publication(
        tensors=_published_tensors(bound, parameters, dtype),
        config=family.family.config_to_source(config, format),
        origin=manifest.origin if manifest.origin.get("source") == format else {},
        tokenizer_files=source.tokenizer_files(),
        tp=tp,
        pp=pp,
        max_file_bytes=max_file_bytes,
        report=report,
    )
    out = Path(out)
    with check_in_background(source) as wait_for_check, staged_directory(out) as staging:
        require_space(staging, publication.num_bytes, out)
        writer.write(staging, publication, advance=advance)
        wait_for_check()


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
    published files. The arguments are those of the two; ``tp`` and ``pp`` are those of :func:`export`.

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
        tensors=_published_tensors(target, opened.parameters, None),  # they have the requested dtype already
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


def _published_tensors(
    bound: BoundMap, parameters: Mapping[str, Parameter], dtype: torch.dtype | None
) -> list[OutputTensor]:
    """Return the tensors of a published format, extracted lazily from the native ``parameters``."""
    shapes = bound.source_shapes()
    tensors = []
    for native, rule in bound.rules.items():
        parameter = parameters[native]
        matrices: list[LazyMatrix] = rule.to_source(parameter.matrix, bound.order)
        for name, matrix in zip(rule.sources, matrices, strict=True):
            tensors.append(OutputTensor(name, shapes[name], dtype or parameter.dtype, matrix))
    return tensors
