"""Dropout whose masks do not depend on how a model is cut (Srivastava et al., 2014).

A mask is drawn from a seed made of the run's seed, the number of the sample in the run, the layer and the place in the
layer. It is therefore the same on ranks that hold the same activations, when a layer is recomputed, and at any tensor,
pipeline and data parallel size; it differs between samples and between layers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megacore.model.kernels import compile_disabled
from megacore.parallel import ParallelContext


@dataclass(frozen=True)
class Dropout:
    """The dropout at one place of a model.

    Attributes:
        probability: Probability that an element is dropped.
        seed: Seed of the run.
        layer: Number of the layer in the whole model; -1 for the embedding.
        place: Number of the dropout in its layer.
    """

    probability: float = 0.0
    seed: int = 0
    layer: int = -1
    place: int = 0

    def keep_mask(self, shape: tuple[int, ...], sample_id: int, *, device: torch.device) -> Tensor:
        """Return the mask of the elements of one sample's activation that are kept, booleans of ``shape``."""
        generator = torch.Generator(device).manual_seed(self._seed_of(sample_id))
        return torch.empty(shape, dtype=torch.bool, device=device).bernoulli_(1 - self.probability, generator=generator)

    @contextmanager
    def seeded(self, sample_ids: Tensor | None, *details: int, device: torch.device) -> Iterator[None]:
        """Seed torch's own generator, which the attention kernels draw from, while the block runs.

        The seed depends on the first of ``sample_ids`` and on ``details``.
        """
        assert sample_ids is not None, "dropout needs the numbers of the samples"
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            seed = self._seed_of(int(sample_ids[0]), *details)
            torch.default_generator.manual_seed(seed)
            if device.type == "cuda":
                torch.cuda.manual_seed(seed)
            yield

    def _seed_of(self, *numbers: int) -> int:
        key = ",".join(map(str, (self.seed, self.layer, self.place, *numbers)))
        return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest()) >> 1


class HiddenDropout(nn.Module):
    """Dropout of a branch that a layer adds to the residual, ``[batch, sequence, hidden]``, or of the embedding.

    It is inactive until a training run sets its probability, and in evaluation. Under sequence parallelism each rank
    applies its slice of the mask of the whole sequence.
    """

    def __init__(self, parallel: ParallelContext) -> None:
        super().__init__()
        self.parallel = parallel
        self.dropout: Dropout | None = None

    def forward(self, hidden: Tensor, sample_ids: Tensor | None) -> Tensor:
        if self.dropout is None or sample_ids is None or not self.training:
            return hidden
        return self._drop(self.dropout, hidden, sample_ids)

    # A compiled layer cannot seed a generator, and would be compiled again for the numbers of each layer.
    @compile_disabled
    def _drop(self, dropout: Dropout, hidden: Tensor, sample_ids: Tensor) -> Tensor:
        _, length, size = hidden.shape
        parallel = self.parallel
        num_slices = parallel.tp_size if parallel.sequence_parallel else 1
        shape = num_slices * length, size
        keep = torch.stack([dropout.keep_mask(shape, int(number), device=hidden.device) for number in sample_ids])
        if num_slices > 1:
            keep = keep[:, parallel.tp_rank * length : (parallel.tp_rank + 1) * length]
        return torch.where(keep, hidden, 0.0) / (1 - dropout.probability)
