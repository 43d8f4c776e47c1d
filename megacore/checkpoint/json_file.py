"""Reading JSON that somebody else may have written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megacore.errors import CorruptCheckpointError

_MAX_BYTES = 200_000_000
"""The index of the largest published models is a few megabytes."""


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``. Raises :class:`CorruptCheckpointError` if there is none, or it is far too large."""
    if path.stat().st_size > _MAX_BYTES:
        raise CorruptCheckpointError(f"{path} has {path.stat().st_size} bytes, far more than any such file")
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CorruptCheckpointError(f"{path} is damaged: {error}") from error
    if not isinstance(document, dict):
        raise CorruptCheckpointError(f"{path} is damaged: it holds no object")
    return document
