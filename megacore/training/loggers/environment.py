"""What runs, and on what: the versions, devices and revisions that a run's directory keeps."""

from __future__ import annotations

import os
import platform
import subprocess
from collections import Counter
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megacore.parallel import ParallelContext
from megacore.plugins import default_registry


def devices_of_all(parallel: ParallelContext) -> dict[str, int]:
    """How many processes compute on which device. For all ranks."""
    names = [_device_name(parallel.device)] * parallel.sizes.world
    if parallel.mesh is not None:
        dist.all_gather_object(names, _device_name(parallel.device))
    return dict(Counter(names))


def describe_versions() -> dict[str, Any]:
    """What runs here, as JSON.

    Nothing is taken from the environment, and of a git repository nothing but the revision, since the address of a
    remote may hold a password.
    """
    package = Path(__file__).parents[2]
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "megacore": version("megacore"),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "plugins": {record.distribution: record.version for record in default_registry().plugins if record.hooks},
        "git": {
            # Installed within somebody's repository it is no part of that.
            "megacore": _revision(package) if _git(package, "ls-files", "--error-unmatch", "__init__.py") else None,
            "working directory": _revision(Path.cwd()),
        },
        "working_directory": str(Path.cwd()),
    }


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_processor()} ({len(os.sched_getaffinity(0))} cores)"


def _processor() -> str:
    """What Linux calls the processor."""
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _revision(directory: Path) -> str | None:
    """The commit that ``directory`` is a part of, with ``-dirty`` where files were changed; ``None`` outside of git."""
    return _git(directory, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*") or None


def _git(directory: Path, *arguments: str) -> str:
    """What git says of ``directory``; empty where it is not there, or the answer is no."""
    command = ["git", "-C", str(directory), *arguments]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return told.stdout.strip() if told.returncode == 0 else ""
