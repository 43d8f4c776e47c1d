"""Choosing the next token: greedily, or by sampling."""

from __future__ import annotations

import hashlib
import math
import secrets
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megacore.errors import GenerationError


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """The settings that choose the next token.

    The random numbers depend only on the seed and the number of the prompt: the samples are the same in any batch and,
    up to rounding of the logits, at any tensor-parallel size.

    Attributes:
        temperature: Temperature, which divides the logits; 0 takes the most likely token, the smallest id among equals.
        top_k: Number of most likely tokens to sample from; ``None`` for all.
        top_p: Minimum probability mass of the most likely tokens to sample from (Holtzman et al., 2020,
            arXiv:1904.09751), after ``top_k``.
        seed: Random seed; by default a new one each time.

    Raises:
        GenerationError: when a setting is invalid or has no effect.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int = field(default_factory=lambda: secrets.randbits(32))

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise GenerationError(f"the temperature must be 0 or above, not {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise GenerationError(f"top-k must be a number of tokens, at least 1, not {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise GenerationError(f"top-p must be a probability above 0, at most 1, not {self.top_p}")
        if self.temperature == 0 and (self.top_k is not None or self.top_p < 1):
            raise GenerationError(
                "top-k and top-p have no effect without a temperature: at temperature 0 the most likely token is "
                "taken. Give a temperature above 0"
            )

    def generator(self, index: int) -> torch.Generator:
        """Return the random number generator of prompt ``index``."""
        key = f"{self.seed},{index}".encode()
        seed = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest()) >> 1
        return torch.Generator().manual_seed(seed)

    def choose(self, logits: Tensor, generators: list[torch.Generator]) -> list[int]:
        """Choose a token for each row of ``logits``, ``[sequences, vocabulary]``.

        Raises:
            GenerationError: when a logit is not a number.
        """
        if logits.isnan().any():
            raise GenerationError(
                "the model's logits are not numbers (NaN): its weights have NaN, or the dtype of the computation "
                "overflows; try --dtype fp32"
            )
        if self.temperature == 0:
            return logits.argmax(dim=-1).tolist()
        rows = zip(self.probabilities(logits).cpu(), generators, strict=True)
        return [int(torch.multinomial(row, 1, generator=generator)) for row, generator in rows]

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return the sampling probabilities, ``[sequences, vocabulary]``, in float64, for a temperature above 0."""
        logits = logits.double()
        logits = (logits - logits.amax(dim=-1, keepdim=True)) / self.temperature
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            smallest = logits.topk(self.top_k, dim=-1).values[:, -1:]
            logits = logits.masked_fill(logits < smallest, -math.inf)
        probabilities = logits.softmax(dim=-1)
        if self.top_p < 1:
            descending, order = probabilities.sort(dim=-1, descending=True, stable=True)
            likelier = descending.cumsum(dim=-1) - descending
            probabilities = probabilities.masked_fill(
                torch.zeros_like(order, dtype=torch.bool).scatter_(-1, order, likelier >= self.top_p), 0.0
            )
        return probabilities / probabilities.sum(dim=-1, keepdim=True)
