"""The memory of the loss and of the layers' activations, compared with their bounds.

    python benchmarks/memory.py

The loss: the peak memory of the process (``VmHWM``) during forward and backward, minus the memory before, minus the two
resulting gradients (of the hidden states and of the head). Without chunks the logits alone would be
``batch * sequence * vocabulary * 4`` bytes, and their gradient as much again.

The activations: the additional memory of the process after the forward pass of 8 layers and the final norm. With full
recomputation each block of layers keeps only its input, and the norm its input and its output:
``(layers / recompute_layers + 2) * batch * sequence * hidden * 4`` bytes.

The shapes are SmolLM2-135M's, in float32, at micro-batch 2 and 512 tokens.
"""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from pathlib import Path

BATCH, SEQUENCE, VOCAB, HIDDEN, LAYERS = 2, 512, 49152, 576, 8
MB = 1e6
MODES = {"none": ("none", 1), "selective": ("selective", 1), "full": ("full", 1), "full, 2 at a time": ("full", 2)}


def status(field: str) -> int:
    """Return a field of ``/proc/self/status`` in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def memory_in_use() -> int:
    """Return the bytes of anonymous memory, after freed memory is returned to the system."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return status("RssAnon")


def measure_loss() -> float:
    """Return the peak bytes beyond the hidden states and the gradients."""
    import torch

    from megacore.parallel import ParallelContext, linear_cross_entropy

    hidden = torch.randn(BATCH, SEQUENCE, HIDDEN, requires_grad=True)
    weight = (torch.randn(VOCAB, HIDDEN) / HIDDEN**0.5).requires_grad_()
    targets = torch.randint(0, VOCAB, (BATCH, SEQUENCE))
    token_weights = torch.full((BATCH, SEQUENCE), 1 / (BATCH * SEQUENCE))

    def forward_and_backward(length: int) -> None:
        linear_cross_entropy(
            hidden[:, :length],
            weight,
            targets[:, :length],
            token_weights[:, :length],
            vocab_size=VOCAB,
            parallel=ParallelContext.single(),
        ).backward()
        hidden.grad = weight.grad = None

    forward_and_backward(1)  # buffers that libraries allocate once
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before = status("VmRSS")
    forward_and_backward(SEQUENCE)
    return status("VmHWM") - before - (hidden.nbytes + weight.nbytes)


def measure_activations(mode: str) -> float:
    """Return the bytes that 8 layers keep for the backward pass."""
    import torch

    from megacore import ModelConfig, get_family
    from megacore.model import ComputeOptions, DecoderModel, Positions, apply_options
    from megacore.parallel import ParallelContext, materialize

    config = ModelConfig(
        family="llama",
        num_layers=LAYERS,
        hidden_size=HIDDEN,
        ffn_hidden_size=1536,
        num_attention_heads=9,
        num_kv_heads=3,
        head_dim=64,
        vocab_size=99,
        max_position_embeddings=SEQUENCE,
        norm_eps=1e-5,
    )
    single = ParallelContext.single()
    model = DecoderModel(config, get_family("llama").build_layer, single)
    materialize(model, single, lambda name, spec: torch.randn(spec.shape) / HIDDEN**0.5)
    granularity, recompute_layers = MODES[mode]
    apply_options(model, ComputeOptions(recompute=granularity, recompute_layers=recompute_layers))
    positions = Positions.for_sequences(config, SEQUENCE, single, device=single.device, dtype=torch.float32)
    hidden = torch.randn(BATCH, SEQUENCE, HIDDEN, requires_grad=True)
    model.decoder(hidden, positions)  # buffers that libraries allocate once
    before = memory_in_use()
    output = model.decoder(hidden, positions)
    after = memory_in_use()
    del output
    return after - before


def bytes_by_formula(mode: str) -> int:
    """Return the bytes that layers with full recomputation keep."""
    _, recompute_layers = MODES[mode]
    return (LAYERS // recompute_layers + 2) * BATCH * SEQUENCE * HIDDEN * 4


def measure_in_new_process(*arguments: str) -> float:
    result = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True, check=True)
    return json.loads(result.stdout)


def main() -> None:
    beyond = measure_in_new_process("loss")
    logits = BATCH * SEQUENCE * VOCAB * 4
    print(f"the loss, vocabulary {VOCAB}, {BATCH} × {SEQUENCE} tokens, hidden size {HIDDEN}:")
    print(f"  beyond hidden states and gradients: {beyond / MB:.0f} MB; the logits as a whole: {logits / MB:.0f} MB")
    print(f"  under 100 MB: {'met' if beyond < 100 * MB else 'MISSED'}")
    print(f"\nactivations of {LAYERS} layers:")
    print("  recompute           kept [MB]  formula [MB]")
    for mode in MODES:
        kept = measure_in_new_process("activations", mode)
        formula = f"{bytes_by_formula(mode) / MB:.1f}" if MODES[mode][0] == "full" else "-"
        print(f"  {mode:<20}{kept / MB:>9.1f}  {formula:>12}")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(measure_loss() if sys.argv[1] == "loss" else measure_activations(sys.argv[2]))
    else:
        main()
