"""Pipeline stages: contiguous ranges of layers, and how to balance them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from megacore.errors import LayoutError


@dataclass(frozen=True)
class Stage:
    """A contiguous range of layers; the first stage has the embedding too, the last the final norm and the head.

    Attributes:
        index: Number of the stage, from 0.
        num_stages: Number of stages of the model.
        start: Number of its first layer.
        stop: Number after that of its last layer.
    """

    index: int
    num_stages: int
    start: int
    stop: int

    @classmethod
    def whole(cls, num_layers: int) -> Stage:
        """Return the only stage of a model that is not cut between layers."""
        return cls(0, 1, 0, num_layers)

    @property
    def layers(self) -> range:
        return range(self.start, self.stop)

    @property
    def is_first(self) -> bool:
        return self.index == 0

    @property
    def is_last(self) -> bool:
        return self.index == self.num_stages - 1


def stages_from_counts(layers_per_stage: Sequence[int]) -> list[Stage]:
    """Return stages with these numbers of layers."""
    ends = accumulate(layers_per_stage, initial=0)
    return [Stage(index, len(layers_per_stage), *ends) for index, ends in enumerate(pairwise(ends))]


def balanced_stages(num_layers: int, num_stages: int, *, embedding: float = 0.0, head: float = 0.0) -> list[Stage]:
    """Spread layers over stages so that the heaviest stage is as light as it can be.

    Args:
        num_layers: Number of layers of the model.
        num_stages: Number of stages, at most as many.
        embedding: Weight of the embedding; a layer has the weight 1.
        head: Weight of the head, whose parameters, tied or not, cost as much to compute with as those of a layer.

    Raises:
        LayoutError: When there are more stages than layers.
    """
    if not 1 <= num_stages <= num_layers:
        raise LayoutError(
            f"{num_stages} pipeline stages are more than the model's {num_layers} layers, of which each stage has at "
            f"least one: pp × stages_per_rank can be 1 to {num_layers}"
        )
    counts = [1] * num_stages
    weights = [1.0] * num_stages
    weights[0] += embedding
    weights[-1] += head
    for _ in range(num_layers - num_stages):
        # Later stages if it makes no difference: the earlier a stage, the more micro-batches it holds at once.
        lightest = min(range(num_stages), key=lambda stage: (weights[stage], -stage))
        counts[lightest] += 1
        weights[lightest] += 1
    return stages_from_counts(counts)
