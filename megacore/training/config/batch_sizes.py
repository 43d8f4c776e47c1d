"""How large each global batch is: the same throughout, or growing at the beginning."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BatchSizes:
    """The size of each global batch follows from the samples seen before it.

    It grows from ``start`` by ``increment`` in spans of equally many samples, and is ``full`` once ``ramp`` samples
    were seen, as Megatron-LM's ``--rampup-batch-size``.

    Attributes:
        full: the size without, or after, the growth.
        start: of the first batch; ``None`` for none other than ``full``.
        increment: between sizes; ``full - start`` is a multiple of it.
        ramp: samples over which it grows.
    """

    full: int
    start: int | None = None
    increment: int = 1
    ramp: int = 0

    def at(self, num_samples: int) -> int:
        """The size of the batch that begins after ``num_samples`` samples."""
        if self._num_increments == 0:
            return self.full
        first = self.full - self._num_increments * self.increment
        return first + self.increment * min(self._num_increments, num_samples * self._num_increments // self.ramp)

    @property
    def sizes(self) -> range:
        """All sizes that there are."""
        return range(self.full - self._num_increments * self.increment, self.full + 1, self.increment)

    def num_batches(self, first_sample: int, num_samples: int) -> int:
        """How many batches, the next one beginning with ``first_sample``, it takes until ``num_samples`` are seen."""
        batches, seen = 0, first_sample
        for number, size in enumerate(self.sizes, start=1):
            # Batches of this size begin before this many samples are seen.
            end = num_samples if size == self.full else -(-number * self.ramp // self._num_increments)
            of_this_size = max(0, -(-(min(end, num_samples) - seen) // size))
            batches += of_this_size
            seen += of_this_size * size
        return batches

    @property
    def _num_increments(self) -> int:
        return 0 if self.start is None else (self.full - self.start) // self.increment
