"""Whether all processes of a run work on the same: a path may lead to another file on another machine."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megacore.checkpoint import Checkpoint
from megacore.errors import ConfigError
from megacore.parallel import ParallelContext

_SAMPLED = 2**20
"""Bytes at the beginning and at the end of a dataset that are compared."""


def require_agreement(checkpoint: Checkpoint, datasets: Mapping[str, Path], parallel: ParallelContext) -> None:
    """Refuse to train where processes see different weights or data under the run's paths. For all ranks.

    Of the weights, the digests in the manifests are compared; of a dataset's two files, the lengths and both ends.

    Args:
        datasets: the prefix of each, by the key of the run file that names it.

    Raises:
        ConfigError: names what differs, and a rank that has it otherwise than rank 0.
    """
    if parallel.mesh is None:
        return
    own = {
        "megacore and torch": f"{version('megacore')}, {torch.__version__}",
        f"the weights in {checkpoint.path}": _digest_of_weights(checkpoint),
    } | {f"{key} {prefix}": digest_of_dataset(prefix) for key, prefix in datasets.items()}
    of_all: list[dict[str, str]] = [{} for _ in range(parallel.sizes.world)]
    dist.all_gather_object(of_all, own)
    for rank, theirs in enumerate(of_all):
        pairs = zip(of_all[0].items(), theirs.values(), strict=True)  # by place, since paths may be named otherwise
        differing = [name for (name, first), other in pairs if first != other]
        if differing:
            raise ConfigError(
                f"rank {rank} does not see the same as rank 0 in {', '.join(differing)}: all processes must read the "
                "same weights and data, with the same software; put them on a file system that all share, or copy them"
            )


def _digest_of_weights(checkpoint: Checkpoint) -> str:
    manifest = checkpoint.manifest
    told: dict[str, Any] = {
        "family": manifest.family,
        "config": manifest.config,
        "files": {name: file.record.sha256 for name, file in manifest.files.items()},
    }
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def digest_of_dataset(prefix: Path) -> str:
    """Of the lengths of a dataset's two files, and of both their ends."""
    digest = hashlib.sha256()
    for suffix in (".idx", ".bin"):
        path = Path(f"{prefix}{suffix}")
        size = path.stat().st_size
        digest.update(size.to_bytes(8, "little"))
        with path.open("rb") as file:
            digest.update(file.read(_SAMPLED))
            file.seek(max(0, size - _SAMPLED))
            digest.update(file.read(_SAMPLED))
    return digest.hexdigest()
