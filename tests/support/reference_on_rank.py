"""What a rank does in tests of a reference: only the first one has it, while all are in a process group."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megacore.parallel import ParallelContext
from megacore.plugins import get_family


def logits_on_the_first_rank(
    parallel: ParallelContext, family_name: str, directory: Path, params: dict[str, Any], input_ids: Tensor
) -> Tensor | None:
    """Load the reference and call it twice on rank 0, and nothing on the others; then all meet."""
    logits = None
    if parallel.tp_rank == 0:
        family = get_family(family_name)
        config = family.family.config_from_source(params, "meta")
        reference = family.load_reference(config, directory, torch.float32, torch.device("cpu"))
        reference(input_ids[:1])
        logits = reference(input_ids).clone()
    total = torch.ones(1)
    dist.all_reduce(total)
    assert total == parallel.tp_size
    return logits
