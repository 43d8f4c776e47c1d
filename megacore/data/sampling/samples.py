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
        tokens: token ids, ``[length + 1]``: the model sees all but the last and learns all but the first.
        loss_mask: what each target counts for in the loss, ``[length]``; 0 for one that is not to be learned.
        segments: the number of each input token's segment, ``[length]``, from 0, never falling: tokens attend to those
            of their own segment only, and their positions count from its beginning. ``None`` where all are of one.
    """

    tokens: NDArray[np.int64]
    loss_mask: NDArray[np.float32]
    segments: NDArray[np.int32] | None = None


class SampleSource(Protocol):
    """A number of samples that can each be had by its index."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Sample: ...


class WindowSamples:
    """Windows over the tokens of a dataset, as :class:`~megacore.data.Sample`. Each token is learned in one of them.

    Where documents begin is searched in the dataset's own boundaries; ids are not looked at.

    Args:
        resets_at_documents: let each document be a segment of its own.
        eod_mask_loss: leave out of the loss each token that begins a document, which would be predicted from the end of
            the one before. (Of documents that end with an end-of-document token, it is what Megatron calls by this
            name: no loss where the *input* is that token. That token itself is learned.)
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
            # Token 0 begins a segment anyway; token ``length`` is a target only.
            start = self.windows.start(index)
            starts = np.array(self.windows.dataset.document_starts(start + 1, start + length + 1), np.int64) - start
            if self._eod_mask_loss:
                loss_mask[starts - 1] = 0
            if self._resets_at_documents:
                segments = np.zeros(length, np.int32)
                segments[starts[starts < length]] = 1
                segments = np.cumsum(segments, dtype=np.int32)
        return Sample(self.windows[index], loss_mask, segments)


class Place(NamedTuple):
    """Where the sample of a position is."""

    source: int
    sample: int


class MixedSamples:
    """The samples of a run: the one at each position ``0, 1, 2, …``, mixed by weight from sources in random order.

    A position alone determines its sample, so a run goes on anywhere, spread over any number of processes. Each source
    goes through its samples epoch by epoch at its own pace (:class:`~megacore.data.SampleOrder`). Getting ready takes
    the same time and memory for any number of samples and epochs.
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
        """Those of all sources together. The first so many of a single source are each of its samples once."""
        return sum(len(source) for source in self.sources)

    def place(self, position: int) -> Place:
        source, number = self.mixture[position]
        return Place(source, self._orders[source][number])

    def __getitem__(self, position: int) -> Sample:
        source, sample = self.place(position)
        return self.sources[source][sample]
