"""How a checkpoint is cut: the (tensor-parallel, pipeline-parallel) rank of each parameter."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from megacore.errors import LayoutError
from megacore.parallel import Stage

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")


@dataclass(frozen=True)
class Layout:
    """The cut of a checkpoint: over ``tp`` ranks inside each parameter, over pipeline stages between layers.

    Attributes:
        tp: Tensor-parallel size.
        stages: Half-open range of layers of each pipeline stage.
    """

    tp: int
    stages: tuple[tuple[int, int], ...]

    @classmethod
    def even(cls, *, tp: int, pp: int, num_layers: int) -> Layout:
        """Spread the layers evenly over ``pp`` stages; where they do not divide, the first stages have one more.

        Raises:
            LayoutError: when there are more stages than layers.
        """
        if tp < 1 or pp < 1:
            raise LayoutError(f"tensor and pipeline parallel sizes start at 1, but tp is {tp} and pp {pp}")
        if pp > num_layers:
            raise LayoutError(
                f"pp {pp} is more than the model's {num_layers} layers; pp sizes that work: 1 to {num_layers}"
            )
        small, num_larger = divmod(num_layers, pp)
        ends = [stage * small + min(stage, num_larger) for stage in range(pp + 1)]
        return cls(tp=tp, stages=tuple(pairwise(ends)))

    @classmethod
    def from_stages(cls, stages: Sequence[Stage], *, tp: int) -> Layout:
        """Return the layout of a model that is held in these pipeline stages."""
        return cls(tp=tp, stages=tuple((stage.start, stage.stop) for stage in stages))

    @property
    def pp(self) -> int:
        return len(self.stages)

    @property
    def num_layers(self) -> int:
        return self.stages[-1][1]

    def stage_of(self, name: str) -> int:
        """Return the stage of parameter ``name``; the embedding is on the first, final norm and head on the last."""
        if match := _LAYER.match(name):
            layer = int(match.group(1))
            for stage, (start, stop) in enumerate(self.stages):
                if start <= layer < stop:
                    return stage
            raise ValueError(f"{name} is beyond the {self.num_layers} layers of the layout")
        return 0 if name.startswith("embedding.") else self.pp - 1

    def names_on_stage(self, names: Iterable[str], stage: int) -> list[str]:
        return [name for name in names if self.stage_of(name) == stage]
