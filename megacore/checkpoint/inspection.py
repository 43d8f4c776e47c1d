"""``inspect``: the contents of a checkpoint as plain JSON values, for a person or a program."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megacore.checkpoint.reading import Checkpoint
from megacore.parallel import describe_imbalance


def inspect(
    checkpoint: Path | str, *, check: bool = False, advance: Callable[[int], None] = lambda num_bytes: None
) -> dict[str, Any]:
    """Describe ``checkpoint`` in plain JSON values. With ``check``, first read all files and compare their digests.

    Raises:
        CheckpointError: when there is no checkpoint.
        CorruptCheckpointError: when it is incomplete or, with ``check``, damaged.
    """
    source = Checkpoint(checkpoint)
    if check:
        source.check(advance=advance)
    manifest = source.manifest
    return {
        "path": str(source.path),
        "family": manifest.family,
        "parameters": sum(math.prod(spec.shape) for spec in manifest.specs.values()),
        "tensors": len(manifest.parameters),
        "dtypes": sorted({entry.dtype for entry in manifest.parameters.values()}),
        "bytes": source.num_bytes,
        "tp": manifest.layout.tp,
        "pp": manifest.layout.pp,
        "stages": [list(stage) for stage in manifest.layout.stages],
        "imbalance": describe_imbalance(manifest.specs, manifest.layout.tp),
        "config": manifest.config,
        "rotary_layout": manifest.rotary_layout,
        "tokenizer": sorted(manifest.tokenizer),
        "files": {
            name: {"bytes": file.record.num_bytes, "sha256": file.record.sha256}
            for name, file in manifest.files.items()
        },
        "history": list(manifest.history),
        "checked": check,
    }
