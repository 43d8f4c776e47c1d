"""The environment of a run: the versions, devices and revisions that its directory keeps."""

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
    """Count the processes on each kind of device. For all ranks."""
    names = [_device_name(parallel.device)] * parallel.sizes.world
    if parallel.mesh is not None:
        dist.all_gather_object(names, _device_name(parallel.device))
    return dict(Counter(names))


def describe_versions() -> dict[str, Any]:
    """Describe the software of this process, as JSON.

    Environment variables are left out, and a git repository is described by its revision alone, since the address of a
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
            # An installation inside another repository is no part of it.
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
    """Return the name that Linux has for the processor."""
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _revision(directory: Path) -> str | None:
    """Return the commit of ``directory``, with ``-dirty`` if files were changed; ``None`` outside of git."""
    return _git(directory, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*") or None


def _git(directory: Path, *arguments: str) -> str:
    """Return the output of git in ``directory``; empty if git is missing or fails."""
    command = ["git", "-C", str(directory), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
