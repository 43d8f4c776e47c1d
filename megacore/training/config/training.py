"""The section of the run file on how long to train, and in which batches."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from megacore.training.config.batch_sizes import BatchSizes
from megacore.training.config.section import Section

_LENGTHS = ("train_iters", "train_samples", "epochs")


class TrainingSection(Section):
    """How long, and in which batches."""

    train_iters: int | None = Field(None, gt=0, description="Optimizer steps. Either this or one of the next two.")
    train_samples: int | None = Field(
        None, gt=0, description="Samples to train on; the last batch is a whole one, and may go beyond."
    )
    epochs: float | None = Field(
        None, gt=0, description="How often to go through the data; of a mixture, as many samples as all of it has."
    )
    micro_batch_size: int = Field(1, gt=0, description="Samples computed at once.")
    global_batch_size: int = Field(
        1, gt=0, description="Samples of one optimizer step; a multiple of micro_batch_size."
    )
    rampup_batch_size: (
        tuple[Annotated[int, Field(gt=0)], Annotated[int, Field(gt=0)], Annotated[int, Field(gt=0)]] | None
    ) = Field(
        None,
        description="`[start, increment, samples]`: begin with batches of `start` samples, which grow by `increment` "
        "in equal spans until, after `samples` samples, they are of global_batch_size.",
    )
    skip_iters: tuple[Annotated[int, Field(gt=0)], ...] = Field(
        (), description="Iterations, from 1, that see their samples, but change nothing."
    )
    freeze: tuple[str, ...] = Field(
        (),
        description='Parameters that are not trained, as `["embedding.*", "decoder.layers.[0-3].*"]`; the '
        "checkpoint's `megacore.json` has the names.",
    )
    exit_interval: int | None = Field(
        None, gt=0, description="End the run early after the next iteration that is a multiple of it."
    )
    exit_duration_in_mins: float | None = Field(
        None, gt=0, description="End the run early after the iteration in which so many minutes are over."
    )

    @property
    def batch_sizes(self) -> BatchSizes:
        """How large each global batch is."""
        if self.rampup_batch_size is None:
            return BatchSizes(self.global_batch_size)
        return BatchSizes(self.global_batch_size, *self.rampup_batch_size)

    @model_validator(mode="after")
    def _keys_agree(self) -> TrainingSection:
        given = [key for key in _LENGTHS if getattr(self, key) is not None]
        if len(given) != 1:
            told = f"{' and '.join(given)} say the same" if given else "how long the run is, is missing"
            raise ValueError(f"{told}: give one of {', '.join(_LENGTHS)}")
        if self.rampup_batch_size is not None:
            start, increment, _ = self.rampup_batch_size
            if start > self.global_batch_size or (self.global_batch_size - start) % increment:
                raise ValueError(
                    f"rampup_batch_size: batches that grow from {start} by {increment} do not come to "
                    f"global_batch_size ({self.global_batch_size})"
                )
        for size in self.batch_sizes.sizes:
            if size % self.micro_batch_size:
                which = "global_batch_size" if size == self.global_batch_size else "a batch size of rampup_batch_size"
                raise ValueError(f"{which} ({size}) must be a multiple of micro_batch_size ({self.micro_batch_size})")
        return self
