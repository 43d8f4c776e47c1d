"""The published formats that megacore reads and writes, by name.

A format knows the files of a directory, not the model in them: start with ``published``, the interface that each
implements.
"""

from __future__ import annotations

from pathlib import Path

from megacore.errors import CheckpointError, UnsupportedSourceError
from megacore.hookspecs import ModelFamily
from megacore.weights.formats.hf import HuggingFaceFormat
from megacore.weights.formats.megatron_llm import MegatronLlmFormat
from megacore.weights.formats.meta import MetaFormat
from megacore.weights.formats.published import (
    CheckpointFormat as CheckpointFormat,
    Publication as Publication,
    PublishedCheckpoint as PublishedCheckpoint,
)

FORMATS: dict[str, CheckpointFormat] = {
    format.name: format for format in (HuggingFaceFormat(), MetaFormat(), MegatronLlmFormat())
}
"""The formats by name; a plugin lists some of the names in ``ModelFamily.sources``."""


def format_for(family: ModelFamily, name: str) -> CheckpointFormat:
    """Return the format called ``name``. Raises :class:`UnsupportedSourceError` if ``family`` does not have it."""
    if name not in family.sources or name not in FORMATS:
        raise UnsupportedSourceError(
            f"{family.name} is read and written in the formats {', '.join(family.sources)}, not {name!r}"
        )
    return FORMATS[name]


def recognise(directory: Path) -> str:
    """Return the name of the checkpoint's format. Raises :class:`CheckpointError` if there is none in a known one."""
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is not a directory with a checkpoint in it")
    for name, format in FORMATS.items():
        if (directory / format.marker_file).is_file():
            return name
    raise CheckpointError(f"{directory} holds no checkpoint in a known format ({', '.join(FORMATS)})")
