"""What the tests of the parallel layers run on each rank; in a module of its own, so that the ranks can import it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Shard, distribute_tensor

from megacore import ModelConfig
from megacore.model import Positions, SelfAttention
from megacore.model.attention import AttentionOptions
from megacore.parallel import ParallelContext, ParameterSpec, linear_cross_entropy, materialize
from megacore.parallel.tensor import loss


@dataclass
class Outcome:
    """What a rank saw of a module's forward and backward."""

    output: Tensor
    output_type: type
    input_gradient: Tensor | None
    gradients: dict[str, Tensor]
    placements: dict[str, tuple[Placement, ...]]
    """Of the parameters; of those that are plain tensors, nothing."""


def run_module(
    parallel: ParallelContext,
    build: Callable[..., nn.Module],
    values: dict[str, Tensor],
    inputs: list[Tensor],
    output_gradients: list[Tensor],
) -> Outcome:
    """Forward and backward of ``build(parallel=parallel)``; ``values`` are whole, lists have an item a rank."""
    module = build(parallel=parallel)
    rank, size = parallel.tp_rank, parallel.tp_size
    materialize(module, parallel, lambda name, spec: part_of(values[name], spec, size, rank))
    given = inputs[rank].requires_grad_(inputs[rank].is_floating_point())
    output = module(given)
    output.backward(output_gradients[rank])
    parameters = dict(module.named_parameters())
    return Outcome(
        output=output.detach(),
        output_type=type(output),
        input_gradient=given.grad,
        gradients={
            name: parameter.grad.to_local() if isinstance(parameter, DTensor) else parameter.grad
            for name, parameter in parameters.items()
        },
        placements={name: p.placements for name, p in parameters.items() if isinstance(p, DTensor)},
    )


def part_of(whole: Tensor, spec: ParameterSpec, size: int, rank: int) -> Tensor:
    """What a rank holds of a parameter."""
    if spec.ranks_per_unit(size) == 1:
        return whole if spec.shard_dim is None else whole.chunk(size, spec.shard_dim)[rank]
    assert spec.shard_dim is not None
    unit, part = divmod(rank, spec.ranks_per_unit(size))
    own, shared = whole.narrow(spec.shard_dim, unit, 1).split(
        [whole.shape[spec.shard_dim + 1] - spec.num_shared, spec.num_shared], dim=spec.shard_dim + 1
    )
    dealt = own.chunk(spec.ranks_per_unit(size), dim=spec.shard_dim + 1)[part]
    return torch.cat([dealt, shared], dim=spec.shard_dim + 1)


def run_cross_entropy(
    parallel: ParallelContext,
    hidden: list[Tensor],
    weights: list[Tensor],
    targets: Tensor,
    token_weights: Tensor,
    vocab_size: int,
    chunk_bytes: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, and the gradients of what this rank holds of hidden states and head."""
    loss.CHUNK_BYTES = {"cpu": chunk_bytes}
    own_hidden, own_weight = hidden[parallel.tp_rank].requires_grad_(), weights[parallel.tp_rank].requires_grad_()
    result = linear_cross_entropy(
        own_hidden, own_weight, targets, token_weights, vocab_size=vocab_size, parallel=parallel
    )
    result.backward()
    assert own_hidden.grad is not None
    assert own_weight.grad is not None
    return result.detach(), own_hidden.grad, own_weight.grad


def run_collective(
    parallel: ParallelContext,
    collective: Callable[[Tensor, ParallelContext], Tensor],
    inputs: list[Tensor],
    output_gradients: list[Tensor],
) -> tuple[Tensor, Tensor]:
    """The output and the gradient of the input; neither the input nor the output's gradient is changed in passing."""
    given, gradient = inputs[parallel.tp_rank].requires_grad_(), output_gradients[parallel.tp_rank]
    before = given.detach().clone(), gradient.clone()
    output = collective(given, parallel)
    output.backward(gradient)
    assert torch.equal(given, before[0])
    assert torch.equal(gradient, before[1])
    assert given.grad is not None
    return output.detach(), given.grad


def rank_and_size(parallel: ParallelContext) -> tuple[int, int]:
    return parallel.tp_rank, parallel.tp_size


def multiply_over_a_mesh(parallel: ParallelContext, name: str) -> int:
    """A product of tensors that are cut over a mesh of its own; return how many threads the process has then."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=(name,))
    matrix = distribute_tensor(torch.ones(4, 4), mesh, [Shard(0)])
    (matrix @ matrix.T).full_tensor()
    return len(list(Path("/proc/self/task").iterdir()))


def fail_on(parallel: ParallelContext, rank: int) -> str:
    """Fail on one rank while the others wait for it."""
    if parallel.tp_rank == rank:
        raise ValueError(f"there is something wrong with rank {rank}")
    dist.barrier()
    return "done"


def wait_forever_on(parallel: ParallelContext, rank: int) -> None:
    """Wait on one rank for a collective that the others do not take part in."""
    if parallel.tp_rank == rank:
        dist.barrier()


def attended_heads(parallel: ParallelContext, config: ModelConfig, options: AttentionOptions) -> list[Tensor]:
    """What attention gives each of this rank's heads, ``[batch, sequence, head_dim]``, where all have the same weights.

    The numbers of the samples are 3 and 4.
    """
    attention = SelfAttention(config, parallel)
    attention.options = options
    head = torch.randn(config.head_dim, config.hidden_size, generator=torch.Generator().manual_seed(0))

    def same_heads(name: str, spec: ParameterSpec) -> Tensor:
        shape = spec.local_shape(parallel.tp_size, parallel.tp_rank)
        if "qkv" not in name:
            return torch.zeros(shape)
        return head.repeat(shape[1] // config.head_dim, 1).expand(shape).contiguous()

    materialize(attention, parallel, same_heads)
    hidden = torch.randn(2, 6, config.hidden_size, generator=torch.Generator().manual_seed(1))
    positions = Positions(sample_ids=torch.tensor([3, 4]))
    heads = attention.attend(attention.linear_qkv(hidden), positions)
    return list(heads.detach().unflatten(-1, (-1, config.head_dim)).unbind(dim=2))
