"""The samples of a run by position: from which dataset each comes and which of its samples it is, without an index."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from megacore.data.sampling.mixture import Mixture
from megacore.data.sampling.windows import SampleOrder, TokenWindows


@dataclass(frozen=True)
class Sample:
    """One row of a batch.

    Attributes:
        tokens: Token ids, ``[length + 1]``: all but the last are inputs, all but the first are targets.
        loss_mask: Weight of each target in the loss, ``[length]``; 0 excludes a target.
        segments: Segment number of each input token, ``[length]``, ascending from 0: tokens attend within their own
            segment only, and positions count from its beginning. ``None`` means a single segment.
    """

    tokens: NDArray[np.int64]
    loss_mask: NDArray[np.float32]
    segments: NDArray[np.int32] | None = None


class SampleSource(Protocol):
    """A fixed number of samples with random access."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Sample: ...


class WindowSamples:
    """Windows over the tokens of a dataset, as :class:`~megacore.data.Sample`. Each token is a target in one of them.

    Documents begin where the dataset's boundaries say so, whatever the token ids.

    ``resets_at_documents`` makes each document a segment of its own. ``eod_mask_loss`` excludes the first token of each
    document from the loss, since its input is the end of the document before. (This is Megatron's option of the same
    name, for documents that end with an end-of-document token: no loss where the *input* is that token.)
    """

    def __init__(
        self, windows: TokenWindows, *, resets_at_documents: bool = False, eod_mask_loss: bool = False
    ) -> None:
        self.windows = windows
        self._resets_at_documents = resets_at_documents
        self._eod_mask_loss = eod_mask_loss

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> Sample:
        length = self.windows.seq_length
        loss_mask = np.ones(length, np.float32)
        loss_mask[: self.windows.num_repeated(index)] = 0
        segments = None
        if self._resets_at_documents or self._eod_mask_loss:
            # Token 0 begins a segment in any case; token ``length`` is only a target.
            start = self.windows.start(index)
            starts = np.array(self.windows.dataset.document_starts(start + 1, start + length + 1), np.int64) - start
            if self._eod_mask_loss:
                loss_mask[starts - 1] = 0
            if self._resets_at_documents:
                segments = np.zeros(length, np.int32)
                segments[starts[starts < length]] = 1
                segments = np.cumsum(segments, dtype=np.int32)
        return Sample(self.windows[index], loss_mask, segments)


class SampleLocation(NamedTuple):
    """The source and the index in it of the sample at some position."""

    source: int
    sample: int


class MixedSamples:
    """The samples of a run at positions ``0, 1, 2, …``: sources mixed by weight, each in random order.

    The position alone determines the sample, so a run can resume at any position with any number of processes. Each
    source goes through its samples epoch by epoch at its own pace (:class:`~megacore.data.SampleOrder`). Construction
    takes the same time and memory for any number of samples and epochs.
    """

    def __init__(
        self, sources: Sequence[SampleSource], weights: Sequence[Fraction | float | str], *, seed: int
    ) -> None:
        if len(sources) != len(weights):
            raise ValueError(f"{len(sources)} sources and {len(weights)} weights")
        self.sources = sources
        self.mixture = Mixture(weights)
        # Sources of the same length would otherwise have the same order.
        self._orders = [
            SampleOrder(len(source), f"{seed}, dataset {number}" if number else seed)
            for number, source in enumerate(sources)
        ]

    def with_sources(self, sources: Sequence[SampleSource]) -> MixedSamples:
        """Return the same mixture and order of other ``sources``, each as long as the one that it replaces."""
        samples = copy.copy(self)
        samples.sources = sources
        return samples

    @property
    def samples_per_epoch(self) -> int:
        """The number of samples of all sources together. With a single source they are an epoch, each sample once."""
        return sum(len(source) for source in self.sources)

    def location(self, position: int) -> SampleLocation:
        """Return the source and the index of the sample at ``position``."""
        source, number = self.mixture[position]
        return SampleLocation(source, self._orders[source][number])

    def __getitem__(self, position: int) -> Sample:
        source, sample = self.location(position)
        return self.sources[source][sample]
