"""What training takes from a dataset: token ids, what each target counts for, and which tokens see each other."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Sample:
    """One row of a batch.

    Attributes:
        tokens: token ids, ``[length + 1]``: the model sees all but the last and learns all but the first.
        loss_mask: what each target counts for in the loss, ``[length]``; 0 for one that is not to be learned.
        segments: the number of each input token's segment, ``[length]``, from 0, never falling: tokens attend to those
            of their own segment only, and their positions count from its beginning. ``None`` where all are of one.
    """

    tokens: NDArray[np.int64]
    loss_mask: NDArray[np.float32]
    segments: NDArray[np.int32] | None = None
