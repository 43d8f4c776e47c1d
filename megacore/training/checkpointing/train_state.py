"""The state of a run as tensors by name: weights, optimizer state, random number generators; cut as they are held."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from megacore.checkpoint import Checkpoint
from megacore.parallel import ParallelContext, local_boxes, local_tensor, set_failed_rank
from megacore.training.checkpointing.storage import (
    PlacedLoadPlanner,
    PlacedSavePlanner,
    PlacedTensor,
    SafetensorsReader,
    SafetensorsWriter,
)
from megacore.training.engine import Engine
from megacore.training.optimizer import ApexAdamW, Optimizer

_SINGLE_PROCESS_WARNING = "torch.distributed is disabled"
"""The beginning of torch's warning about a checkpoint of a single process."""


def state_tensors(engine: Engine) -> dict[str, PlacedTensor]:
    """Return the part of the run's state that this process saves. The tensors are the live ones, not copies."""
    tensors: dict[str, PlacedTensor] = {}
    for name, parameter in engine.parameters.items():
        tensors[f"model.{name}"] = _placed(parameter, parameter, name, engine)
        for kind, value in _optimizer_state(engine.optimizer, parameter).items():
            tensors[f"optimizer.{kind}.{name}"] = _placed(value, parameter, name, engine)
    tensors = _share_of_replica(tensors, engine.parallel)
    for device, state in _random_states(engine.parallel):
        tensors[_random_name(device, engine.parallel)] = PlacedTensor.whole(state)
    return tensors


def _share_of_replica(tensors: dict[str, PlacedTensor], parallel: ParallelContext) -> dict[str, PlacedTensor]:
    """Return the tensors that this data-parallel replica saves: an equal share of those that all replicas hold.

    torch would let one of them write each tensor, but decides which one only after all have copied what they hold. The
    shares follow from the sizes, in the same order on each replica.
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
    """Restore the optimizer and, at the ``same_layout``, torch's random number generators. For all ranks.

    The engine has the weights of the ``checkpoint`` already.
    """
    training = checkpoint.manifest.training
    assert training is not None
    wanted: dict[str, PlacedTensor] = {}
    states: list[tuple[nn.Parameter, str, dict[str, Tensor]]] = []
    kinds = dict.fromkeys(name.split(".")[1] for name in training.tensors if name.startswith("optimizer."))
    if training.state["settings"]["optimizer.kind"] != engine.run.optimizer.kind:
        kinds = {}  # the state of one optimizer is of no use to another, which starts afresh
    for name, parameter in engine.optimized_parameters():
        stored = {kind: f"optimizer.{kind}.{name}" for kind in kinds if f"optimizer.{kind}.{name}" in training.tensors}
        shapes = {kind: training.tensors[full_name].shape for kind, full_name in stored.items()}
        state = _empty_state(parameter, shapes)
        states.append((parameter, name, state))
        for kind, full_name in stored.items():
            wanted.setdefault(full_name, _placed(state[kind], parameter, name, engine))
    if same_layout:
        for device, own in _random_states(engine.parallel):
            if (name := _random_name(device, engine.parallel)) in training.tensors:
                wanted[name] = PlacedTensor.whole(own)
    _load(wanted, checkpoint, engine.parallel)
    for parameter, name, state in states:
        for kind, value in state.items():  # of a tied embedding, one copy was read
            read = wanted[f"optimizer.{kind}.{name}"].part
            if local_tensor(value).data_ptr() != read.data_ptr():
                local_tensor(value).copy_(read)
        if state:
            _set_optimizer_state(engine.optimizer, parameter, state)
    for device, _ in _random_states(engine.parallel):
        if (name := _random_name(device, engine.parallel)) in wanted:
            _set_random_state(device, wanted[name].part, engine.parallel)


def write_tensors(
    tensors: dict[str, PlacedTensor],
    writer: SafetensorsWriter,
    parallel: ParallelContext,
    group: dist.ProcessGroup | None,
) -> None:
    """Save ``tensors`` as one checkpoint. For all ranks, with a process ``group`` for this purpose.

    Raises:
        BaseException: on every rank, the error of the first rank that failed, with its ``rank``.
    """
    is_alone = parallel.mesh is None
    warnings.filterwarnings("ignore", message=_SINGLE_PROCESS_WARNING)
    try:
        save(tensors, storage_writer=writer, planner=PlacedSavePlanner(), process_group=group, no_dist=is_alone)
    except CheckpointException as failed:
        error = _cause(failed)
        writer.abandon(error)
        raise error from None
    except BaseException as error:
        writer.abandon(error)
        raise


def _load(tensors: dict[str, PlacedTensor], checkpoint: Checkpoint, parallel: ParallelContext) -> None:
    is_alone = parallel.mesh is None
    warnings.filterwarnings("ignore", message=_SINGLE_PROCESS_WARNING)
    try:
        load(tensors, storage_reader=SafetensorsReader(checkpoint), planner=PlacedLoadPlanner(), no_dist=is_alone)
    except CheckpointException as failed:
        raise _cause(failed) from None


def _cause(failed: CheckpointException) -> BaseException:
    """Return the error of the first rank that failed."""
    rank = min(failed.failures)
    error, _ = failed.failures[rank]
    set_failed_rank(error, rank)
    return error


def _placed(value: Tensor, parameter: Tensor, name: str, engine: Engine) -> PlacedTensor:
    """Place ``value``, which is a number or cut like ``parameter``."""
    if value.dim() == 0:
        return PlacedTensor.whole(local_tensor(value))
    spec = engine.specs[name]
    return PlacedTensor(spec.shape, local_boxes(parameter, spec, engine.parallel), local_tensor(value))


def _random_name(device: str, parallel: ParallelContext) -> str:
    return f"random.{device}.{parallel.rank:05d}"


def _random_states(parallel: ParallelContext) -> Iterator[tuple[str, Tensor]]:
    """Yield the state of each generator that a layer might draw from."""
    yield "cpu", torch.get_rng_state()
    if parallel.device.type == "cuda":
        yield "cuda", torch.cuda.get_rng_state(parallel.device)


def _set_random_state(device: str, state: Tensor, parallel: ParallelContext) -> None:
    if device == "cuda":
        torch.cuda.set_rng_state(state, parallel.device)
    else:
        torch.set_rng_state(state)


def _optimizer_state(optimizer: Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
    """Return the optimizer's tensors for ``parameter``, cut like it, and its numbers; empty before the first step."""
    if isinstance(optimizer, ApexAdamW):
        return optimizer.state_of(parameter)
    assert isinstance(optimizer, torch.optim.Optimizer)
    # optimizer.state[parameter] would create an entry.
    return {kind: value for kind, value in optimizer.state.get(parameter, {}).items() if value is not None}


def _empty_state(parameter: nn.Parameter, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Allocate a state to read into; ``shapes`` are those of the whole tensors, ``()`` of a number."""
    return {
        kind: torch.zeros_like(parameter, requires_grad=False)
        if shape
        else torch.zeros((), dtype=torch.float32, device=parameter.device)
        for kind, shape in shapes.items()
    }


def _set_optimizer_state(optimizer: Optimizer, parameter: nn.Parameter, state: dict[str, Tensor]) -> None:
    """Let the next step continue from ``state``."""
    if isinstance(optimizer, ApexAdamW):
        optimizer.set_state(parameter, state)
    else:
        assert isinstance(optimizer, torch.optim.Optimizer)
        optimizer.state[parameter] = state
