"""The state of a run as tensors by name: weights, what the optimizer keeps, random numbers; cut as they are held."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

from megacore.checkpoint import Checkpoint
from megacore.parallel import ParallelContext, local_boxes, local_tensor, set_failed_rank
from megacore.training.checkpointing.placed_tensors import LoadPlanner, PlacedTensor, SavePlanner
from megacore.training.checkpointing.storage import SafetensorsReader, SafetensorsWriter
from megacore.training.engine import Engine
from megacore.training.optimizer_state import new_state, set_state, state_of

ANY_PROCESS = "torch.distributed is disabled"
"""How torch's warning begins that a checkpoint is of a single process."""


def state_tensors(engine: Engine) -> dict[str, PlacedTensor]:
    """What this process saves of the run's state. The tensors are those that training goes on with, not copies."""
    tensors: dict[str, PlacedTensor] = {}
    for name, parameter in engine.parameters.items():
        tensors[f"model.{name}"] = _placed(parameter, parameter, name, engine)
        for kind, value in state_of(engine.optimizer, parameter).items():
            tensors[f"optimizer.{kind}.{name}"] = _placed(value, parameter, name, engine)
    tensors = _share_of_replica(tensors, engine.parallel)
    for device, state in _random_states(engine.parallel):
        tensors[_random_name(device, engine.parallel)] = PlacedTensor.whole(state)
    return tensors


def _share_of_replica(tensors: dict[str, PlacedTensor], parallel: ParallelContext) -> dict[str, PlacedTensor]:
    """Of tensors that all replicas of data parallelism hold alike, those that this one saves: about as much as each.

    torch would let one of them write each tensor, but only decides which when all have copied what they hold. Who saves
    which follows from the sizes, in the same order on each replica.
    """
    num_bytes = [0] * parallel.sizes.dp_replicate
    own = {}
    for name, tensor in tensors.items():
        replica = num_bytes.index(min(num_bytes))
        num_bytes[replica] += tensor.part.nbytes
        if replica == parallel.dp_replicate_rank:
            own[name] = tensor
    return own


def restore_tensors(engine: Engine, checkpoint: Checkpoint, *, same_layout: bool) -> None:
    """Let the optimizer, and torch's random numbers at the ``same_layout``, go on from ``checkpoint``. For all ranks.

    The engine has the checkpoint's weights already.
    """
    training = checkpoint.manifest.training
    assert training is not None
    wanted: dict[str, PlacedTensor] = {}
    states: list[tuple[nn.Parameter, str, dict[str, Tensor]]] = []
    kinds = dict.fromkeys(name.split(".")[1] for name in training.tensors if name.startswith("optimizer."))
    if training.state["settings"]["optimizer.kind"] != engine.run.optimizer.kind:
        kinds = {}  # what one optimizer keeps is of no use to another, which begins anew
    for name, parameter in engine.optimized_parameters():
        stored = {kind: f"optimizer.{kind}.{name}" for kind in kinds if f"optimizer.{kind}.{name}" in training.tensors}
        shapes = {kind: training.tensors[full_name].shape for kind, full_name in stored.items()}
        state = new_state(parameter, shapes)
        states.append((parameter, name, state))
        for kind, full_name in stored.items():
            wanted.setdefault(full_name, _placed(state[kind], parameter, name, engine))
    if same_layout:
        for device, own in _random_states(engine.parallel):
            if (name := _random_name(device, engine.parallel)) in training.tensors:
                wanted[name] = PlacedTensor.whole(own)
    _load(wanted, checkpoint, engine.parallel)
    for parameter, name, state in states:
        for kind, value in state.items():  # where the head is a copy of the embedding, one was read
            read = wanted[f"optimizer.{kind}.{name}"].part
            if local_tensor(value).data_ptr() != read.data_ptr():
                local_tensor(value).copy_(read)
        if state:
            set_state(engine.optimizer, parameter, state)
    for device, _ in _random_states(engine.parallel):
        if (name := _random_name(device, engine.parallel)) in wanted:
            _set_random_state(device, wanted[name].part, engine.parallel)


def write_tensors(
    tensors: dict[str, PlacedTensor],
    writer: SafetensorsWriter,
    parallel: ParallelContext,
    group: dist.ProcessGroup | None,
) -> None:
    """Save ``tensors`` as one checkpoint. For all ranks, with a ``group`` of their own.

    Raises:
        BaseException: on every rank, what the first one that failed raised, with its ``rank``.
    """
    is_alone = parallel.mesh is None
    warnings.filterwarnings("ignore", message=ANY_PROCESS)
    try:
        dcp.save(tensors, storage_writer=writer, planner=SavePlanner(), process_group=group, no_dist=is_alone)
    except dcp.CheckpointException as failed:
        error = _cause(failed)
        writer.abandon(error)
        raise error from None
    except BaseException as error:
        writer.abandon(error)
        raise


def _load(tensors: dict[str, PlacedTensor], checkpoint: Checkpoint, parallel: ParallelContext) -> None:
    is_alone = parallel.mesh is None
    warnings.filterwarnings("ignore", message=ANY_PROCESS)
    try:
        dcp.load(tensors, storage_reader=SafetensorsReader(checkpoint), planner=LoadPlanner(), no_dist=is_alone)
    except dcp.CheckpointException as failed:
        raise _cause(failed) from None


def _cause(failed: dcp.CheckpointException) -> BaseException:
    """What the first rank that failed raised."""
    rank = min(failed.failures)
    error, _ = failed.failures[rank]
    set_failed_rank(error, rank)
    return error


def _placed(value: Tensor, parameter: Tensor, name: str, engine: Engine) -> PlacedTensor:
    """``value``, which is cut as ``parameter`` is, or a number of it."""
    if value.dim() == 0:
        return PlacedTensor.whole(local_tensor(value))
    spec = engine.specs[name]
    return PlacedTensor(spec.shape, local_boxes(parameter, spec, engine.parallel), local_tensor(value))


def _random_name(device: str, parallel: ParallelContext) -> str:
    return f"random.{device}.{parallel.rank:05d}"


def _random_states(parallel: ParallelContext) -> Iterator[tuple[str, Tensor]]:
    """The state of each generator that a layer might draw from."""
    yield "cpu", torch.get_rng_state()
    if parallel.device.type == "cuda":
        yield "cuda", torch.cuda.get_rng_state(parallel.device)


def _set_random_state(device: str, state: Tensor, parallel: ParallelContext) -> None:
    if device == "cuda":
        torch.cuda.set_rng_state(state, parallel.device)
    else:
        torch.set_rng_state(state)
