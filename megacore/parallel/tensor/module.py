"""Modules that declare how their parameters are cut.

A parameter is declared once, with its whole shape and the axis that tensor parallelism cuts. Everything else (convert,
split, load, save, train) reads the cut from that declaration. Modules are built on the meta device, so that a model of
any size can be planned without memory; :func:`materialize` then gives each parameter its values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from megacore.parallel.context import ParallelContext
from megacore.parallel.tensor.collectives import sum_gradients, sum_shared_gradients
from megacore.parallel.tensor.sharding import ParameterSpec


class ParallelModule(nn.Module):
    """A module that declares its parameters by their whole shape.

    Attributes:
        compute_dtype: The dtype of the computation if it differs from that of the parameters: 16 bit for parameters in
            32 bit, whose gradients are in 32 bit too.
        caches_casts: True to cast a parameter once, for all micro-batches until :func:`clear_cast_cache`; otherwise
            each micro-batch keeps a copy of its own until its backward pass.
    """

    def __init__(self, parallel: ParallelContext) -> None:
        super().__init__()
        self.parallel = parallel
        self.specs: dict[str, ParameterSpec] = {}
        self.compute_dtype: torch.dtype | None = None
        self.caches_casts = False
        self.casts: dict[str, Tensor] = {}

    def declare(
        self,
        name: str,
        shape: tuple[int, ...],
        *,
        shard_dim: int | None = None,
        row_dims: int = 1,
        num_subunits: int = 1,
        num_shared: int = 0,
    ) -> None:
        """Create parameter ``name`` with this rank's part of ``shape``, without values. See :class:`ParameterSpec`."""
        spec = ParameterSpec(shape, shard_dim, row_dims, num_subunits, num_shared)
        self.specs[name] = spec
        local_shape = spec.local_shape(self.parallel.tp_size, self.parallel.tp_rank)
        self.register_parameter(name, nn.Parameter(torch.empty(local_shape, device="meta")))

    def local(self, name: str) -> Tensor:
        """Return this rank's part of parameter ``name`` as a plain tensor in the compute dtype.

        Gradients flow back to the parameter; those of entries that other ranks hold too are summed over these.
        """
        return self._cast(name, self.local_uncast(name))

    def local_uncast(self, name: str) -> Tensor:
        """Return what :meth:`local` returns, in the dtype of the parameter."""
        spec, local = self.specs[name], self._own_part(name)
        if spec.num_shared and spec.ranks_per_unit(self.parallel.tp_size) > 1:
            return sum_shared_gradients(local, spec, self.parallel)
        return local

    def _own_part(self, name: str) -> Tensor:
        parameter = getattr(self, name)
        return parameter.to_local() if isinstance(parameter, DTensor) else parameter

    def _cast(self, name: str, local: Tensor) -> Tensor:
        """Cast ``local``, this rank's part of parameter ``name``, to the compute dtype."""
        if not self.caches_casts or self.compute_dtype is None:
            return self._to_compute_dtype(local)
        if name not in self.casts:
            self.casts[name] = local.detach().to(self.compute_dtype)
        return _CachedCast.apply(local, self.casts[name])

    def _to_compute_dtype(self, tensor: Tensor) -> Tensor:
        return tensor if self.compute_dtype is None else tensor.to(self.compute_dtype)


class _CachedCast(torch.autograd.Function):
    """The cast of ``local`` whose result, ``cast``, was computed before."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, cast: Tensor) -> Tensor:
        ctx.dtype = local.dtype
        return cast.view_as(cast)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.to(ctx.dtype), None


def clear_cast_cache(model: nn.Module) -> None:
    """Free the casts of the parameters of ``model``, as must be done before the parameters change."""
    for module in model.modules():
        if isinstance(module, ParallelModule):
            module.casts.clear()


def local_tensor(tensor: Tensor) -> Tensor:
    """Return this process's part of a parameter or gradient: a plain tensor with the same memory and no graph."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


class ReplicatedModule(ParallelModule):
    """A module with parameters that every rank holds whole."""

    def replicated(self, name: str) -> Tensor:
        """Return parameter ``name`` for use between the parallel layers.

        Under sequence parallelism each rank sees a slice of the sequence, so the gradients are summed over the ranks;
        otherwise they are equal on all of them already.
        """
        whole = self._own_part(name)
        return self._cast(name, sum_gradients(whole, self.parallel) if self.parallel.sequence_parallel else whole)


def parameter_specs(model: nn.Module) -> dict[str, ParameterSpec]:
    """Return the specs of all parameters of ``model``, by their full names, in the order of the modules.

    A parameter that was not declared (of a plain ``torch.nn`` module in a plugin's layer) is not cut; such a module
    computes on plain tensors and works in a single process only.
    """
    specs = {}
    for prefix, module in model.named_modules():
        declared = module.specs if isinstance(module, ParallelModule) else {}
        for name, parameter in module.named_parameters(recurse=False):
            whole = ParameterSpec(shape=tuple(parameter.shape), shard_dim=None, row_dims=1)
            specs[f"{prefix}.{name}" if prefix else name] = declared.get(name, whole)
    return specs


def materialize(
    module: nn.Module,
    parallel: ParallelContext,
    values: Callable[[str, ParameterSpec], Tensor],
    *,
    prefix: str = "",
    done: str | None = None,
) -> None:
    """Set each parameter of ``module``, one at a time, to ``values(name, spec)``, which is this rank's part.

    ``prefix`` is put before the names of the parameters in ``module``. Names that begin with ``done`` are skipped: they
    have their values already.

    With tensor parallelism the new parameters are DTensors, cut as declared, so that gradient clipping, optimizer
    state and distributed checkpoints know what each rank holds.
    """
    for name, spec in parameter_specs(module).items():
        if done is not None and name.startswith(done):
            continue
        path, _, last = name.rpartition(".")
        owner = module.get_submodule(path)
        value = values(prefix + name, spec)
        expected = spec.local_shape(parallel.tp_size, parallel.tp_rank)
        assert tuple(value.shape) == expected, f"{name}: {tuple(value.shape)} is not {expected}"
        if parallel.tp_mesh is not None:
            value = DTensor.from_local(
                value,
                parallel.tp_mesh,
                [Replicate() if spec.shard_dim is None else Shard(spec.shard_dim)],
                run_check=False,
                shape=torch.Size(spec.global_shape(parallel.tp_size)),
                stride=torch.empty(spec.global_shape(parallel.tp_size), device="meta").stride(),
            )
        setattr(owner, last, nn.Parameter(value))
