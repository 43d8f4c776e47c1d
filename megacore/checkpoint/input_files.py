"""Input files that another program may have written, moved or truncated: readable, JSON, digest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megacore.errors import CheckpointError, CorruptCheckpointError

_MAX_JSON_BYTES = 200_000_000
"""The index of the largest published models has a few megabytes."""

_BUFFER_BYTES = 4 << 20


def require_readable(path: Path) -> None:
    """Raise :class:`CheckpointError` if ``path`` is no file or may not be read, which libraries report as missing."""
    if not path.is_file():
        raise CheckpointError(f"{path} is missing")
    try:
        path.open("rb").close()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error


def read_json_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in ``path``. Raises :class:`CorruptCheckpointError` if it is none, or far too large."""
    if path.stat().st_size > _MAX_JSON_BYTES:
        raise CorruptCheckpointError(f"{path} has {path.stat().st_size} bytes, far more than any such file")
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CorruptCheckpointError(f"{path} is damaged: {error}") from error
    if not isinstance(document, dict):
        raise CorruptCheckpointError(f"{path} is damaged: it does not contain a JSON object")
    return document


def file_sha256(path: Path, *, advance: Callable[[int], None] = lambda num_bytes: None) -> str:
    """Return the SHA-256 of a file, in hexadecimal; ``advance`` receives the bytes read since its last call."""
    digest = hashlib.sha256()
    buffer = bytearray(_BUFFER_BYTES)
    view = memoryview(buffer)
    with path.open("rb", buffering=0) as file:
        while num_bytes := file.readinto(buffer):
            digest.update(view[:num_bytes])
            advance(num_bytes)
    return digest.hexdigest()
