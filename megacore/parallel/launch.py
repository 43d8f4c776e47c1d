"""Running a function on several processes of this machine, through torch's elastic launcher."""

from __future__ import annotations

import contextlib
import logging
import os
import uuid
from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from megacore import errors
from megacore.errors import MegacoreError, WorkerError
from megacore.parallel.context import ParallelContext, local_device, process_group


def on_ranks(function: Callable[..., Any], *arguments: Any, tp: int, sequence_parallel: bool = False) -> Any:
    """Call ``function(parallel, *arguments)`` on every rank and return what rank 0 returned.

    One rank is this process. Several are started by torch's elastic launcher, unless this process was itself started
    by torchrun (``RANK`` is set): then it joins the others. ``function`` and ``arguments`` are pickled.

    Raises:
        MegacoreError: what the first rank to fail raised, in its own kind.
        WorkerError: when a rank died of something else.
    """
    if "RANK" in os.environ:
        return _on_this_rank(function, arguments, tp, sequence_parallel)
    if tp == 1:
        return function(ParallelContext.single(local_device()), *arguments)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=tp,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
    )
    # The launcher logs a worker's error, and warns of its own cleaning up; the error reaches the user below.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        return elastic_launch(config, _on_this_rank)(function, arguments, tp, sequence_parallel)[0]
    except ChildFailedError as failed:
        raise _as_megacore_error(failed) from failed


def _on_this_rank(function: Callable[..., Any], arguments: tuple[Any, ...], tp: int, sequence_parallel: bool) -> Any:
    device = local_device()
    if device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks_here))
    with process_group(device):
        parallel = ParallelContext.of_world(tp=tp, device=device, sequence_parallel=sequence_parallel)
        return function(parallel, *arguments)


def _as_megacore_error(failed: ChildFailedError) -> MegacoreError:
    rank, failure = failed.get_first_failure()
    message = failure.message if isinstance(failure.message, str) else str(failure.message["message"])
    with contextlib.suppress(AttributeError, KeyError, TypeError):
        message = failure.error_file_data["message"]["message"]
    kind, _, text = message.partition(": ")
    error = getattr(errors, kind, None)
    if isinstance(error, type) and issubclass(error, MegacoreError):
        return error(text)
    return WorkerError(f"rank {rank} died (exit code {failure.exitcode}): {message}")
