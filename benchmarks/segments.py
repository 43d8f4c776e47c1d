"""The cost of attention in a row of many segments, compared with one segment of the same length in the same run.

    python benchmarks/segments.py [--rounds N] [--sequence N]

The forward and backward pass of the attention of one layer is timed, without projections: one row, 16 query heads of 64
on 4 key-value heads, float32, one thread. The lengths of segments have an exponential distribution. Each is compared
with the same attention with a mask over the whole row. The variants alternate, ``--rounds`` times; the median counts.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from megacore.model.kernels import attention_kernel
from megacore.model.positions import Segments

HEADS, KV_HEADS, HEAD_DIM = 16, 4, 64
MEANS = (512, 128, 32, 8, 2)


def segment_numbers(sequence: int, mean: int) -> Tensor:
    """Return the number of each token's segment, ``[1, sequence]``."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.empty(sequence).exponential_(1 / mean, generator=generator).ceil().long()
    return torch.arange(sequence).repeat_interleave(lengths)[:sequence].unsqueeze(0)


def masked_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    heads = (tensor.transpose(1, 2) for tensor in (query, key, value))
    return F.scaled_dot_product_attention(*heads, attn_mask=mask, enable_gqa=True).transpose(1, 2)


def seconds(attend: Callable[..., Tensor], inputs: list[Tensor]) -> float:
    started = time.perf_counter()
    torch.autograd.grad(attend(*inputs).square().sum(), inputs)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sequence", type=int, default=2048)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    inputs = [torch.randn(1, options.sequence, heads, HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    for tensor in inputs:
        tensor.requires_grad_()
    kernel = attention_kernel()
    variants: dict[str, Callable[..., Tensor]] = {"one segment": lambda q, k, v: kernel(q, k, v, None, 0.0)}
    counts = {}
    for mean in MEANS:
        numbers = segment_numbers(options.sequence, mean)
        segments = Segments.from_numbers(numbers, device=torch.device("cpu"))
        assert segments is not None, "the row is one segment: ask for a longer sequence"
        mask = (numbers[0].unsqueeze(-1) == numbers[0]).tril()
        counts[mean] = len(segments.lengths)
        variants[f"segments of {mean}"] = lambda q, k, v, own=segments: kernel(q, k, v, None, 0.0, own)
        variants[f"segments of {mean}, masked"] = lambda q, k, v, own=mask: masked_attention(q, k, v, own)
    times: dict[str, list[float]] = {variant: [] for variant in variants}
    for _ in range(options.rounds):
        for variant, attend in variants.items():
            times[variant].append(seconds(attend, inputs))
    ratios = {
        variant: statistics.median(own / whole for own, whole in zip(measured, times["one segment"], strict=True))
        for variant, measured in times.items()
    }
    print(f"a row of {options.sequence} tokens as one segment: {statistics.median(times['one segment']):.3f} s")
    print("mean length  segments  time over that of one segment     masked")
    for mean in MEANS:
        own, masked = ratios[f"segments of {mean}"], ratios[f"segments of {mean}, masked"]
        print(f"{mean:>11}{counts[mean]:>10}{own:>31.2f}{masked:>11.2f}")


if __name__ == "__main__":
    main()
