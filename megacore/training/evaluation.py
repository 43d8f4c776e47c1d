"""How well a model does on samples that it is not trained on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megacore.data import Split


@dataclass(frozen=True)
class Evaluation:
    """What came of one evaluation.

    Attributes:
        iteration: of the training steps, how many were done before.
        split: `"valid"` or `"test"`.
        values: by name, ``loss`` first, in nats a token; then the metrics of the run file, in their order.
    """

    iteration: int
    split: Split
    values: Mapping[str, float]
