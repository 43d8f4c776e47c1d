"""Segments: the stretches of a row whose tokens see each other and no others."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Segments:
    """The segments of a micro-batch, counted through all of its rows; the end of a row ends a segment.

    Attributes:
        lengths: of each, in tokens.
        boundaries: where each begins among the tokens of all rows, and where the last one ends, ``[segments + 1]``,
            int32, on the device of the model.
    """

    lengths: tuple[int, ...]
    boundaries: Tensor

    @classmethod
    def of(cls, numbers: Tensor | None, *, device: torch.device) -> Segments | None:
        """The segments that ``numbers`` give to each token, ``[batch, sequence]``; ``None`` where each row is one."""
        if numbers is None:
            return None
        begins = torch.ones_like(numbers, dtype=torch.bool)
        begins[:, 1:] = numbers[:, 1:] != numbers[:, :-1]
        boundaries = torch.cat([begins.flatten().nonzero().squeeze(-1), torch.tensor([numbers.numel()])])
        if len(boundaries) == len(numbers) + 1:
            return None
        return cls(tuple(boundaries.diff().tolist()), boundaries.to(device, torch.int32))
