"""The rounding error of 16-bit logits, ours and the reference's, relative to 32-bit logits.

    python benchmarks/rounding.py CKPT REFERENCE DATA [--iters 3] [--seq-length 256]

`make demo` writes suitable arguments: demo/checkpoint demo/smollm2 demo/language-reference. For each sample, the mean
absolute logit error of three comparisons is printed and, for scale, the standard deviation of the float32 logits.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from megacore import get_family
from megacore.checkpoint import Checkpoint
from megacore.model import load_model
from megacore.parallel import ParallelContext
from megacore.verification import dataset_samples


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("checkpoint", "reference", "data"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--iters", type=int, default=3)
    parser.add_argument("--seq-length", type=int, default=256)
    options = parser.parse_args()

    checkpoint, device = Checkpoint(options.checkpoint), torch.device("cpu")
    ours = load_model(checkpoint, ParallelContext.single(), dtype=torch.bfloat16)
    family = get_family(checkpoint.manifest.family)
    wide, narrow = (
        family.load_reference(ours.config, options.reference, dtype, device)
        for dtype in (torch.float32, torch.bfloat16)
    )
    samples = dataset_samples(options.data, checkpoint, iterations=options.iters, seq_length=options.seq_length)
    print("ours bf16 - ref fp32   ref bf16 - ref fp32   ours bf16 - ref bf16   std of ref fp32")
    for sample in samples[:, :-1]:
        input_ids = sample.unsqueeze(0)
        a, b, c = (model(input_ids).double() for model in (ours, wide, narrow))
        errors = [(x - y).abs().mean().item() for x, y in ((a, b), (c, b), (a, c))]
        print("".join(f"{error:<23.4f}" for error in errors) + f"{b.std().item():.2f}")


if __name__ == "__main__":
    main()
