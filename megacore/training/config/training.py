"""The section of the run file on the length of the training and its batches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field, model_validator

from megacore.training.config.section import Section

_LENGTH_KEYS = ("train_iters", "train_samples", "epochs")


@dataclass(frozen=True)
class BatchSizes:
    """The size of each global batch, constant or ramped up; it follows from the number of samples seen before.

    It grows from ``start`` by ``increment`` in spans of equally many samples, and is ``full`` once ``ramp`` samples
    were seen, as Megatron-LM's ``--rampup-batch-size``.

    Attributes:
        full: The size without, or after, the ramp.
        start: The size of the first batch; ``None`` for ``full`` throughout.
        increment: The difference between two sizes; ``full - start`` is a multiple of it.
        ramp: Number of samples over which the size grows.
    """

    full: int
    start: int | None = None
    increment: int = 1
    ramp: int = 0

    def at(self, num_samples: int) -> int:
        """Return the size of the batch that begins after ``num_samples`` samples."""
        num_increments = self._num_increments
        if num_increments == 0:
            return self.full
        first = self.full - num_increments * self.increment
        return first + self.increment * min(num_increments, num_samples * num_increments // self.ramp)

    @property
    def sizes(self) -> range:
        """All sizes in use, in ascending order."""
        return range(self.full - self._num_increments * self.increment, self.full + 1, self.increment)

    def num_batches(self, first_sample: int, num_samples: int) -> int:
        """Return the number of batches until ``num_samples`` are seen; the first begins with ``first_sample``."""
        batches, seen = 0, first_sample
        for number, size in enumerate(self.sizes, start=1):
            # Batches of this size begin before this many samples are seen.
            end = num_samples if size == self.full else -(-number * self.ramp // self._num_increments)
            count = max(0, -(-(min(end, num_samples) - seen) // size))
            batches += count
            seen += count * size
        return batches

    @property
    def _num_increments(self) -> int:
        return 0 if self.start is None else (self.full - self.start) // self.increment


class TrainingSection(Section):
    """The length of the training, and its batches."""

    train_iters: int | None = Field(
        None, gt=0, description="Number of optimizer steps. Give either this or one of the next two."
    )
    train_samples: int | None = Field(
        None, gt=0, description="Number of samples to train on, rounded up to a whole batch."
    )
    epochs: float | None = Field(
        None, gt=0, description="Number of passes over the data; for a mixture, over as many samples as it has in all."
    )
    micro_batch_size: int = Field(1, gt=0, description="Number of samples computed at once.")
    global_batch_size: int = Field(
        1, gt=0, description="Number of samples of one optimizer step, a multiple of micro_batch_size."
    )
    rampup_batch_size: (
        tuple[Annotated[int, Field(gt=0)], Annotated[int, Field(gt=0)], Annotated[int, Field(gt=0)]] | None
    ) = Field(
        None,
        description="`[start, increment, samples]`: begin with batches of `start` samples, which grow by `increment` "
        "in equal spans until they reach global_batch_size after `samples` samples.",
    )
    skip_iters: tuple[Annotated[int, Field(gt=0)], ...] = Field(
        (), description="Iterations, counted from 1, whose samples are consumed without changing the weights."
    )
    freeze: tuple[str, ...] = Field(
        (),
        description='Patterns of parameters not to train, for example `["embedding.*", "decoder.layers.[0-3].*"]`; '
        "the checkpoint's `megacore.json` lists the names.",
    )
    exit_interval: int | None = Field(
        None, gt=0, description="End the run early after the next iteration that is a multiple of this."
    )
    exit_duration_in_mins: float | None = Field(
        None, gt=0, description="End the run early after the iteration in which this many minutes have passed."
    )

    @property
    def batch_sizes(self) -> BatchSizes:
        """The size of each global batch."""
        if self.rampup_batch_size is None:
            return BatchSizes(self.global_batch_size)
        return BatchSizes(self.global_batch_size, *self.rampup_batch_size)

    @model_validator(mode="after")
    def _keys_agree(self) -> TrainingSection:
        given = [key for key in _LENGTH_KEYS if getattr(self, key) is not None]
        if len(given) != 1:
            problem = f"{' and '.join(given)} say the same" if given else "the length of the run is missing"
            raise ValueError(f"{problem}: give one of {', '.join(_LENGTH_KEYS)}")
        if self.rampup_batch_size is not None:
            start, increment, _ = self.rampup_batch_size
            if start > self.global_batch_size or (self.global_batch_size - start) % increment:
                raise ValueError(
                    f"rampup_batch_size: batches that grow from {start} by {increment} do not come to "
                    f"global_batch_size ({self.global_batch_size})"
                )
        for size in self.batch_sizes.sizes:
            if size % self.micro_batch_size:
                key = "global_batch_size" if size == self.global_batch_size else "a batch size of rampup_batch_size"
                raise ValueError(f"{key} ({size}) must be a multiple of micro_batch_size ({self.micro_batch_size})")
        return self
