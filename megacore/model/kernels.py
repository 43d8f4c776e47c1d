"""The table of kernels: the implementations of attention, norms and the optimizer's step, and their requirements."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from torch.nn.attention import SDPBackend, sdpa_kernel

from megacore.errors import ConfigError
from megacore.model.positions import Segments

EVERY_DTYPE = ("fp32", "fp64", "bf16", "fp16")
SIXTEEN_BIT = ("bf16", "fp16")

_Function = TypeVar("_Function", bound=Callable[..., Any])

compile_disabled: Callable[[_Function], _Function] = torch.compiler.disable
"""Decorator of a function that compiled layers call without compiling it; torch gives its own no types."""


@dataclass(frozen=True)
class Kernel:
    """The requirements of an implementation.

    Attributes:
        label: Name shown to users.
        dtypes: Supported dtypes, as ``model.dtype`` of a run file names them, by type of device.
        masks_on: Types of device on which it supports a mask on the scores, such as linear biases.
        dropout_on: Types of device on which it supports dropout of attention weights.
        package_problem: Returns the reason why the package that contains it cannot be used, ``None`` if it can.
    """

    label: str
    dtypes: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: {"cpu": EVERY_DTYPE, "cuda": EVERY_DTYPE})
    masks_on: tuple[str, ...] = ("cpu", "cuda")
    dropout_on: tuple[str, ...] = ("cpu", "cuda")
    package_problem: Callable[[], str | None] = lambda: None


def _flash_attn_problem() -> str | None:
    return None if find_spec("flash_attn") else "the package flash-attn is not installed: pip install flash-attn"


_APEX_REMEDY = "NVIDIA's is built from https://github.com/NVIDIA/apex, with its CUDA extensions"


def apex_problem(extension: str) -> str | None:
    """Return the reason why NVIDIA's apex cannot be used, ``None`` if it can.

    An unrelated package on PyPI has the same name. The two are distinguished by the contents of their directories,
    without importing anything, since the import of another package may have any effect.

    Args:
        extension: Compiled module that the required part of apex calls.
    """
    spec = find_spec("apex")
    if spec is None:
        return f"the package apex is not installed; {_APEX_REMEDY}"
    locations = [Path(location) for location in spec.submodule_search_locations or ()]
    if not any((path / "optimizers").is_dir() and (path / "normalization").is_dir() for path in locations):
        found = locations[0] if locations else spec.origin
        return f"the apex installed at {found} is not NVIDIA's; {_APEX_REMEDY}"
    # Earlier versions installed the extensions as modules of their own, later ones as libraries inside the package.
    if find_spec(extension) is None and not any(any(p.glob(f"_extensions/_{extension}*.so")) for p in locations):
        return f"the apex installed at {locations[0]} was built without its CUDA extension {extension}; {_APEX_REMEDY}"
    return None


KERNELS: dict[str, dict[str, Kernel]] = {
    "attention": {
        "auto": Kernel("torch (auto)"),
        "math": Kernel("torch math"),
        "flash": Kernel(
            "torch flash", {"cpu": EVERY_DTYPE, "cuda": SIXTEEN_BIT}, masks_on=("cpu",), dropout_on=("cuda",)
        ),
        "efficient": Kernel("torch memory-efficient", {"cuda": ("fp32", *SIXTEEN_BIT)}),
        "flash-attn": Kernel(
            "flash-attn", {"cuda": SIXTEEN_BIT}, masks_on=(), dropout_on=("cuda",), package_problem=_flash_attn_problem
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
            "NVIDIA apex FusedAdam", {"cuda": ("fp32", *SIXTEEN_BIT)}, package_problem=partial(apex_problem, "amp_C")
        ),
    },
}
"""Kernels by their purpose, and by their name in a run file."""


def check_kernels(
    chosen: Mapping[str, str], *, device_type: str, dtype: str, has_mask: bool, drops_attention: bool
) -> None:
    """Check that the chosen kernels support this device, dtype and model.

    Args:
        chosen: Name of a kernel for each entry of :data:`KERNELS`.
        device_type: ``"cpu"`` or ``"cuda"``.
        dtype: Dtype of the computation, as ``model.dtype`` of a run file names it.
        has_mask: True if the model adds a mask to the scores of attention.
        drops_attention: True if attention weights are dropped.

    Raises:
        ConfigError: lists everything that is not supported.
    """
    refusals = []
    for kind, name in chosen.items():
        kernel = KERNELS[kind][name]
        problems = [*_problems(kernel, device_type, dtype)]
        if kind == "attention" and has_mask and device_type not in kernel.masks_on:
            problems.append("it supports no mask, which the model's linear biases (ALiBi) need")
        if kind == "attention" and drops_attention and device_type not in kernel.dropout_on:
            problems.append(f"it has no dropout on {_DEVICES[device_type]}, and dropout.attention is not 0")
        if problems:
            listed = "\n".join(f"  {problem}" for problem in problems)
            refusals.append(
                f'kernels.{kind} is "{name}", which cannot be used here:\n{listed}\n'
                f'Change that, or set kernels.{kind} to "auto"'
            )
    if refusals:
        raise ConfigError("\n".join(refusals))


_DEVICES = {"cpu": "a CPU", "cuda": "a GPU"}


def _problems(kernel: Kernel, device_type: str, dtype: str) -> Iterator[str]:
    if device_type not in kernel.dtypes:
        [required] = kernel.dtypes
        yield f"it computes on {_DEVICES[required]} only, and there is none"
        device_type = required
    dtypes = kernel.dtypes[device_type]
    if dtype not in dtypes:
        bits = "in 16 bit only" if dtypes == SIXTEEN_BIT else "in other dtypes"
        supported = f"{', '.join(dtypes[:-1])} or {dtypes[-1]}"
        yield f"it computes {bits} on {_DEVICES[device_type]}, and model.dtype is {dtype}: set it to {supported}"
    if problem := kernel.package_problem():
        yield problem


def describe_kernels(chosen: Mapping[str, str], *, is_compiled: bool) -> str:
    """Return a line that names the chosen kernels."""
    labels = [f"{kind} {KERNELS[kind][name].label}" for kind, name in chosen.items()]
    return f"kernels: {', '.join(labels)}" + (", each layer compiled by torch" if is_compiled else "")


_Attention = Callable[[Tensor, Tensor, Tensor, Tensor | None, float], Tensor]
"""``attend(query, key, value, mask, dropout)``, an :class:`AttentionKernel` for rows that are one segment each."""


class AttentionKernel(Protocol):
    """An implementation of attention, one of those in :data:`KERNELS`."""

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        dropout: float,
        segments: Segments | None = None,
    ) -> Tensor:
        """Return the outputs of causal attention within each segment, ``[batch, sequence, heads, head_dim]``.

        Args:
            query: Queries, ``[batch, sequence, heads, head_dim]``.
            key: Keys, with fewer heads if several query heads share one.
            value: Values, with the shape of ``key``.
            mask: Causal mask to add to the scores, ``[heads, sequence, sequence]``; each segment takes its first rows
                and columns. ``None`` for plain causal attention.
            dropout: Probability that an attention weight is dropped.
            segments: Segments of the rows; ``None`` if each row is one segment.
        """


@cache
def attention_kernel(name: str = "auto") -> AttentionKernel:
    """Return the attention of that name in :data:`KERNELS`, one object for all layers, which are then compiled once."""
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


# With a mask over the whole row every score would be computed and most thrown away: benchmarks/segments.py. Compiled,
# every number and length of segments would be another graph.
@compile_disabled
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
    lengths = list(segments.lengths)
    queries, keys, values = (torch.split(heads.flatten(0, 1)[None], lengths, 1) for heads in (query, key, value))
    attended = [
        attend(segment_query, segment_key, segment_value, None if mask is None else mask[:, :length, :length], dropout)
        for length, segment_query, segment_key, segment_value in zip(lengths, queries, keys, values, strict=True)
    ]
    return torch.cat(attended, 1).view_as(query)


def _sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    attended = F.scaled_dot_product_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        # With a batch axis, since torch's fused kernels support masks of two and of four dimensions only.
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
    # This backend of torch does not support grouped queries.
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
    """Compute FlashAttention-2 (Dao, 2023, arXiv:2307.08691), which supports grouped queries and segments, no mask."""
    from flash_attn import flash_attn_func

    assert mask is None, "check_kernels refuses a mask"
    if segments is not None:
        return _flash_attn_by_segment(query, key, value, dropout, segments)
    attended: Tensor = flash_attn_func(query, key, value, dropout_p=dropout, causal=True)
    return attended


# Compiled, every length of the longest segment would be another graph.
@compile_disabled
def _flash_attn_by_segment(query: Tensor, key: Tensor, value: Tensor, dropout: float, segments: Segments) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    longest = max(segments.lengths)
    attended: Tensor = flash_attn_varlen_func(
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
    """An implementation of the norms over the last axis.

    Attributes:
        rms_norm: Function ``rms_norm(hidden, weight, eps)``.
        layer_norm: Function ``layer_norm(hidden, weight, bias, eps)``.
    """

    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    layer_norm: Callable[[Tensor, Tensor, Tensor, float], Tensor]


@cache
def norm_kernels(name: str = "auto") -> NormKernels:
    """Return the norms of that name in :data:`KERNELS`, one object for all layers."""
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
