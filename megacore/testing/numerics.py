"""The computations of the conformance kit, and the bounds within which two results are equal."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from megacore.checkpoint import Checkpoint
from megacore.model import DecoderModel, KeyValueCache, load_model
from megacore.parallel import ParallelContext, ParameterSpec, join_parts, parameter_specs, vocab_parallel_logits
from megacore.verification.comparison import gather_logits

RTOL = 1.3e-6
ATOL = 1e-5
"""Bounds of float32, for numbers of order 1."""

VISIBLE = 10 * ATOL  # minimum change of some logit by a planted fault

_SMALLEST_SCALE = 0.01
"""Smallest unit of a gradient, as a share of the largest gradient. Gradients are compared in units of their own largest
entry, but some are zero up to rounding, for example that of a bias on the keys."""


def agree(ours: Tensor, theirs: Tensor) -> bool:
    """Return whether two results are equal within the bounds of float32."""
    return ours.shape == theirs.shape and torch.allclose(ours, theirs, rtol=RTOL, atol=ATOL)


def largest_difference(ours: Tensor, theirs: Tensor) -> float:
    return (ours - theirs).abs().max().item()


def logits_token_by_token(model: DecoderModel, input_ids: Tensor, starts: list[int]) -> list[Tensor]:
    """Return the logits of each row of ``input_ids`` from its position in ``starts``, ``[tokens, vocabulary]``.

    The tokens before it pass the layers as a prompt, packed with those of the other rows; then one token of every row
    at a time, until the first row ends.

    Raises:
        PluginError: when a layer does not cache keys and values.
    """
    length = input_ids.shape[1]
    cache = KeyValueCache(model.config, model.parallel, max_length=length, device=input_ids.device, dtype=torch.float32)
    with torch.no_grad():
        packed = torch.cat([row[:start] for row, start in zip(input_ids, starts, strict=True)]).unsqueeze(0)
        model.decoder(model.embedding(packed, None), cache.add_prompts(starts))
        cache.check_used_by(model.decoder.layers)
        steps = []
        for step in range(length - max(starts)):
            next_ids = torch.stack([row[start + step] for row, start in zip(input_ids, starts, strict=True)])
            hidden = model.decoder(model.embedding(next_ids.unsqueeze(-1), None), cache.add_tokens())
            steps.append(vocab_parallel_logits(hidden, model.head.local("weight"), model.parallel))
    return list(torch.cat(steps, dim=1))


def logits_and_gradients(
    parallel: ParallelContext, checkpoint: Path, input_ids: Tensor, targets: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the logits of a native checkpoint, and the gradients of the summed loss by native name, on every rank.

    Raises:
        RuntimeError: names the parameters that the model does not use.
    """
    model = load_model(Checkpoint(checkpoint), parallel, dtype=torch.float32)
    logits = model(input_ids).detach()  # with autograd: without it torch accepts plain tensors mixed with DTensors
    model(input_ids, targets=targets, token_weights=torch.ones_like(targets, dtype=torch.float32)).sum().backward()
    specs = parameter_specs(model)
    gradients = {
        name: gather_tensor(parameter.grad, specs[name], parallel)
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    if unused := [name for name in specs if name not in gradients]:
        raise RuntimeError(f"no gradient reaches {', '.join(unused)}: does the layer's forward use them?")
    return gather_logits(logits, model.config.vocab_size, parallel), gradients


def differing_gradients(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> list[str]:
    """Return the gradients that differ, each with its difference; both are by the names of the published tensors."""
    largest = max(gradient.abs().max().item() for gradient in theirs.values())
    problems = []
    for name, expected in theirs.items():
        scale = max(expected.abs().max().item(), _SMALLEST_SCALE * largest)
        if not agree(ours[name] / scale, expected / scale):
            difference = largest_difference(ours[name], expected) / scale
            problems.append(f"{name} (by {difference:.2g} of its largest entry)")
    return problems


def gather_tensor(tensor: Tensor, spec: ParameterSpec, parallel: ParallelContext) -> Tensor:
    """Return a whole parameter or gradient, on every rank that holds a part of it.

    Raises:
        RuntimeError: when two ranks hold different values of the same entries.
    """
    if parallel.tp_mesh is None:
        return tensor
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    parts: list[Tensor] = [local] * parallel.tp_size
    dist.all_gather_object(parts, local.detach(), group=parallel.tp_group)
    whole = join_parts(parts, spec)
    for rank, part in enumerate(parts):
        rows, columns = spec.block(parallel.tp_size, rank)
        if not torch.equal(whole.view(spec.matrix_shape)[rows, columns].reshape(part.shape), part):
            raise RuntimeError(f"rank {rank} and another rank hold different values of the same entries")
    return whole
