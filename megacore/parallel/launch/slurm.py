"""The variables that SLURM's srun sets for a process, translated into those of torchrun.

They are those of srun(1), "OUTPUT ENVIRONMENT VARIABLES"; only a process of a step has those with ``STEP``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

_PORTS = range(10_000, 30_000)
"""Ports below those that Linux assigns to connections."""


def srun_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Return torchrun's variables for one of several tasks of a job step; empty for any other process.

    ``MASTER_ADDR`` and ``MASTER_PORT`` keep their values if they are set.
    """
    if int(environment.get("SLURM_STEP_NUM_TASKS", "1")) == 1:
        return {}
    tasks_per_node = expand_counts(environment["SLURM_STEP_TASKS_PER_NODE"])
    return {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": environment["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(tasks_per_node[int(environment["SLURM_NODEID"])]),
        "MASTER_ADDR": environment.get("MASTER_ADDR") or first_host(environment["SLURM_STEP_NODELIST"]),
        "MASTER_PORT": environment.get("MASTER_PORT")
        or step_port(int(environment["SLURM_JOB_ID"]), int(environment["SLURM_STEP_ID"])),
    }


def first_host(nodes: str) -> str:
    """Return the first of a list of hosts: ``"node01"`` of ``"node[01-03,07],login"``."""
    [first] = re.findall(r"^(?:[^,\[]|\[[^\]]*\])+", nodes)
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first)


def expand_counts(counts: str) -> list[int]:
    """Return one count per node: ``[2, 2, 1]`` of ``"2(x2),1"``."""
    found = re.findall(r"(\d+)(?:\(x(\d+)\))?", counts)
    return [int(count) for count, times in found for _ in range(int(times or 1))]


def step_port(job: int, step: int) -> str:
    """Return a port that is equal in all processes of a step and unlikely to be that of another step on the machine."""
    return str(_PORTS[(job * 31 + step) % len(_PORTS)])
