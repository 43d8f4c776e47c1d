"""The table of kernels: what can compute attention, norms and the optimizer's step, and what each asks for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from importlib.util import find_spec
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from torch.nn.attention import SDPBackend, sdpa_kernel

from megacore.errors import ConfigError
from megacore.model.nvidia_apex import apex_problem
from megacore.model.segments import Segments

EVERY_DTYPE = ("fp32", "fp64", "bf16", "fp16")
SIXTEEN_BIT = ("bf16", "fp16")


@dataclass(frozen=True)
class Kernel:
    """What an implementation asks for.

    Attributes:
        told_as: what a person is told of it.
        dtypes: what it computes in, as ``model.dtype`` of a run file names it, by type of device.
        masks_on: the types of device on which it adds a mask to the scores, which linear biases are.
        dropout_on: the types of device on which it drops attention weights.
        package_problem: says why the package that it is in cannot be used, if so.
    """

    told_as: str
    dtypes: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: {"cpu": EVERY_DTYPE, "cuda": EVERY_DTYPE})
    masks_on: tuple[str, ...] = ("cpu", "cuda")
    dropout_on: tuple[str, ...] = ("cpu", "cuda")
    package_problem: Callable[[], str | None] = lambda: None


def _flash_attn_problem() -> str | None:
    return None if find_spec("flash_attn") else "the package flash-attn is not installed: pip install flash-attn"


KERNELS: dict[str, dict[str, Kernel]] = {
    "attention": {
        "auto": Kernel("torch (auto)"),
        "math": Kernel("torch math"),
        "flash": Kernel(
            "torch flash", {"cpu": EVERY_DTYPE, "cuda": SIXTEEN_BIT}, masks_on=("cpu",), dropout_on=("cuda",)
        ),
        "efficient": Kernel("torch memory-efficient", {"cuda": ("fp32", *SIXTEEN_BIT)}),
        "flash-attn": Kernel(
            "flash-attn",
            {"cuda": SIXTEEN_BIT},
            masks_on=(),
            dropout_on=("cuda",),
            package_problem=_flash_attn_problem,
        ),
    },
    "norm": {
        "auto": Kernel("torch"),
        "torch": Kernel("torch"),
        "apex": Kernel(
            "NVIDIA apex", {"cuda": EVERY_DTYPE}, package_problem=partial(apex_problem, "fused_layer_norm_cuda")
        ),
    },
    "optimizer": {
        "auto": Kernel("torch fused AdamW"),
        "torch": Kernel("torch fused AdamW"),
        "apex": Kernel(
            "NVIDIA apex FusedAdam",
            {"cuda": ("fp32", *SIXTEEN_BIT)},
            package_problem=partial(apex_problem, "amp_C"),
        ),
    },
}
"""By what they compute, and by the name that a run file has for them."""


def check_kernels(
    chosen: Mapping[str, str], *, device_type: str, dtype: str, has_mask: bool, drops_attention: bool
) -> None:
    """Refuse kernels that cannot do here what they would have to.

    Args:
        chosen: a name for each entry of :data:`KERNELS`.
        device_type: ``"cpu"`` or ``"cuda"``.
        dtype: what is computed in, as ``model.dtype`` of a run file names it.
        has_mask: whether the model adds a mask to the scores of attention.
        drops_attention: whether there is dropout of the attention weights.

    Raises:
        ConfigError: with everything that is in the way.
    """
    refusals = []
    for kind, name in chosen.items():
        kernel = KERNELS[kind][name]
        problems = [*_problems(kernel, device_type, dtype)]
        if kind == "attention" and has_mask and device_type not in kernel.masks_on:
            problems.append("it takes no mask, and the model has linear biases (ALiBi), which are one")
        if kind == "attention" and drops_attention and device_type not in kernel.dropout_on:
            problems.append(f"it has no dropout on {_PLACES[device_type]}, and dropout.attention is not 0")
        if problems:
            listed = "\n".join(f"  {problem}" for problem in problems)
            refusals.append(
                f'kernels.{kind} is "{name}", which cannot be used here:\n{listed}\n'
                f'Change that, or set kernels.{kind} to "auto"'
            )
    if refusals:
        raise ConfigError("\n".join(refusals))


_PLACES = {"cpu": "a CPU", "cuda": "a GPU"}


def _problems(kernel: Kernel, device_type: str, dtype: str) -> Iterator[str]:
    if device_type not in kernel.dtypes:
        [needed] = kernel.dtypes
        yield f"it computes on {_PLACES[needed]} only, and there is none"
        device_type = needed
    dtypes = kernel.dtypes[device_type]
    if dtype not in dtypes:
        bits = "in 16 bit only" if dtypes == SIXTEEN_BIT else "in no such dtype"
        yield f"it computes {bits} on {_PLACES[device_type]}, and model.dtype is {dtype}: set it to {_or(dtypes)}"
    if problem := kernel.package_problem():
        yield problem


def _or(names: tuple[str, ...]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"


def describe_kernels(chosen: Mapping[str, str], *, is_compiled: bool) -> str:
    """What is computed by what, in a line."""
    told = [f"{kind} {KERNELS[kind][name].told_as}" for kind, name in chosen.items()]
    return f"kernels: {', '.join(told)}" + (", each layer compiled by torch" if is_compiled else "")


_Attention = Callable[[Tensor, Tensor, Tensor, Tensor | None, float], Tensor]
"""``attend(query, key, value, mask, dropout)``, as :class:`AttentionKernel`, of rows that are one segment each."""


class AttentionKernel(Protocol):
    """What computes the heads' outputs, in one of the ways of :data:`KERNELS`."""

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        dropout: float,
        segments: Segments | None = None,
    ) -> Tensor:
        """Attend to what is in the same segment and not in the future.

        Args:
            query: ``[batch, sequence, heads, head_dim]``.
            key: likewise, of fewer heads where several queries share them.
            value: likewise.
            mask: what is added to the scores, no future included, ``[heads, sequence, sequence]``; with segments its
                first rows and columns are added to the scores of each; ``None`` where nothing is to be added.
            dropout: probability that an attention weight is dropped.
            segments: ``None`` where each row is one.

        Returns:
            ``[batch, sequence, heads, head_dim]``.
        """


@cache
def attention_kernel(name: str = "auto") -> AttentionKernel:
    """The attention of that name in :data:`KERNELS`; one for all layers, which then are compiled once."""
    kernels: dict[str, AttentionKernel] = {
        "auto": partial(_by_segment, _sdpa),
        "math": partial(_by_segment, partial(_sdpa_by, SDPBackend.MATH)),
        "flash": partial(_by_segment, partial(_sdpa_by, SDPBackend.FLASH_ATTENTION)),
        "efficient": partial(_by_segment, _efficient),
        "flash-attn": _flash_attn,
    }
    return kernels[name]


def _by_segment(
    attend: _Attention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    segments: Segments | None = None,
) -> Tensor:
    if segments is None:
        return attend(query, key, value, mask, dropout)
    return _each_segment(attend, query, key, value, mask, dropout, segments)


# A mask over the whole row would have every score computed, to be thrown away: benchmarks/segments.py. Compiled, this
# would be another graph for every number and length of segments.
@torch.compiler.disable
def _each_segment(
    attend: _Attention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    segments: Segments,
) -> Tensor:
    # Split rather than sliced: the backward pass of a slice is a gradient of the whole row.
    parts = zip(*(heads.flatten(0, 1).split(segments.lengths) for heads in (query, key, value)), strict=True)
    attended = []
    for length, (own_query, own_key, own_value) in zip(segments.lengths, parts, strict=True):
        own_mask = None if mask is None else mask[:, :length, :length]
        attended.append(attend(own_query[None], own_key[None], own_value[None], own_mask, dropout).squeeze(0))
    return torch.cat(attended).view_as(query)


def _sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    attended = F.scaled_dot_product_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        # With a batch axis, since torch's fused kernels take masks of two and of four axes only.
        attn_mask=None if mask is None else mask.unsqueeze(0),
        dropout_p=dropout,
        is_causal=mask is None,
        enable_gqa=query.shape[2] != key.shape[2],
    )
    return attended.transpose(1, 2)


def _sdpa_by(
    backend: SDPBackend, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float
) -> Tensor:
    with sdpa_kernel(backend):
        return _sdpa(query, key, value, mask, dropout)


def _efficient(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    # This backend of torch's has no grouped queries.
    queries_per_kv = query.shape[2] // key.shape[2]
    key, value = (shared.repeat_interleave(queries_per_kv, dim=2) for shared in (key, value))
    return _sdpa_by(SDPBackend.EFFICIENT_ATTENTION, query, key, value, mask, dropout)


def _flash_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    segments: Segments | None = None,
) -> Tensor:
    """FlashAttention-2 (Dao, 2023, arXiv:2307.08691), which has grouped queries and segments, and no mask."""
    from flash_attn import flash_attn_func

    assert mask is None, "check_kernels refuses a mask"
    if segments is not None:
        return _flash_attn_of_segments(query, key, value, dropout, segments)
    return flash_attn_func(query, key, value, dropout_p=dropout, causal=True)


# Compiled, this would be another graph for every length of the longest segment.
@torch.compiler.disable
def _flash_attn_of_segments(query: Tensor, key: Tensor, value: Tensor, dropout: float, segments: Segments) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    longest = max(segments.lengths)
    attended = flash_attn_varlen_func(
        query.flatten(0, 1),
        key.flatten(0, 1),
        value.flatten(0, 1),
        cu_seqlens_q=segments.boundaries,
        cu_seqlens_k=segments.boundaries,
        max_seqlen_q=longest,
        max_seqlen_k=longest,
        dropout_p=dropout,
        causal=True,
    )
    return attended.view_as(query)


@dataclass(frozen=True)
class NormKernels:
    """What computes the norms over the last axis.

    Attributes:
        rms_norm: ``rms_norm(hidden, weight, eps)``.
        layer_norm: ``layer_norm(hidden, weight, bias, eps)``.
    """

    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    layer_norm: Callable[[Tensor, Tensor, Tensor, float], Tensor]


@cache
def norm_kernels(name: str = "auto") -> NormKernels:
    """The norms of that name in :data:`KERNELS`; the same for all layers."""
    if name != "apex":
        return NormKernels(
            lambda hidden, weight, eps: F.rms_norm(hidden, weight.shape, weight, eps),
            lambda hidden, weight, bias, eps: F.layer_norm(hidden, weight.shape, weight, bias, eps),
        )
    from apex.normalization.fused_layer_norm import fused_layer_norm_affine, fused_rms_norm_affine

    return NormKernels(
        lambda hidden, weight, eps: fused_rms_norm_affine(hidden, weight, weight.shape, eps),
        lambda hidden, weight, bias, eps: fused_layer_norm_affine(hidden, weight, bias, weight.shape, eps),
    )
