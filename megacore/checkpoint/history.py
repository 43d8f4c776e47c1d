"""The entries of a checkpoint's history: which command made it, when, with which version, from what."""

from __future__ import annotations

from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any


def history_entry(command: str, **details: Any) -> dict[str, Any]:
    """One entry, for ``command`` with ``details`` that are plain JSON values."""
    return {
        "command": command,
        "megacore": version("megacore"),
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        **details,
    }
