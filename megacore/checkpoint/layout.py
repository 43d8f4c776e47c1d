"""Which (tensor-parallel, pipeline-parallel) rank a parameter belongs to."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

from megacore.errors import LayoutError

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")


@dataclass(frozen=True)
class Layout:
    """How a checkpoint is cut: over ``tp`` ranks inside each parameter, over pipeline stages between layers.

    Attributes:
        tp: tensor-parallel size.
        stages: for each pipeline stage, the half-open range of its layers.
    """

    tp: int
    stages: tuple[tuple[int, int], ...]

    @classmethod
    def even(cls, *, tp: int, pp: int, num_layers: int) -> Layout:
        """Layers spread over ``pp`` stages as evenly as they go, the first stages taking one more where they must.

        Raises:
            LayoutError: when there are more stages than layers.
        """
        if tp < 1 or pp < 1:
            raise LayoutError(f"tensor and pipeline parallel sizes start at 1; asked for tp {tp}, pp {pp}")
        if pp > num_layers:
            raise LayoutError(
                f"pp {pp} is more than the model's {num_layers} layers; pp sizes that work: 1 to {num_layers}"
            )
        small, larger_stages = divmod(num_layers, pp)
        ends = [stage * small + min(stage, larger_stages) for stage in range(pp + 1)]
        return cls(tp=tp, stages=tuple(pairwise(ends)))

    @property
    def pp(self) -> int:
        return len(self.stages)

    @property
    def num_layers(self) -> int:
        return self.stages[-1][1]

    def stage_of(self, name: str) -> int:
        """The pipeline stage of parameter ``name``; the embedding is on the first, final norm and head on the last."""
        if match := _LAYER.match(name):
            layer = int(match.group(1))
            for stage, (start, stop) in enumerate(self.stages):
                if start <= layer < stop:
                    return stage
            raise ValueError(f"{name} is beyond the {self.num_layers} layers of the layout")
        return 0 if name.startswith("embedding.") else self.pp - 1

    def names_on_stage(self, names: Iterable[str], stage: int) -> list[str]:
        return [name for name in names if self.stage_of(name) == stage]
