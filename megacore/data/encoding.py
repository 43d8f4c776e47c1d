"""Chunks of documents to token ids, on several processes, in order."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megacore.data.documents import Chunk, documents_of
from megacore.data.engines import Encoded, EnginesDisagreeError, checked, defining_engine, fast_engine
from megacore.data.tokenizer import load_tokenizer
from megacore.errors import DataError, WorkerError

_IN_ADVANCE = 2
"""Chunks that are on their way for each process: one is encoded, one waits."""


@dataclass(frozen=True)
class Encoding:
    """How documents are encoded.

    Attributes:
        tokenizer: its file.
        json_key: where a record has its text.
        prepended: id that begins every document, if one does.
        appended: likewise at its end.
        dtype: of the ids.
        may_be_fast: whether another library than the defining one may encode.
    """

    tokenizer: Path
    json_key: str
    prepended: int | None
    appended: int | None
    dtype: np.dtype[Any]
    may_be_fast: bool = True


@dataclass(frozen=True)
class EncodedChunk:
    """What became of a chunk.

    Attributes:
        ids: of its documents, back to back.
        lengths: how many each has.
        num_text_bytes: of the documents, in UTF-8.
        num_empty: documents without a token, left out.
        errors: of those that could not be read, left out too.
        num_input_bytes: of the file.
        engine: name of the library that encoded.
    """

    ids: NDArray[Any]
    lengths: NDArray[np.int64]
    num_text_bytes: int
    num_empty: int
    errors: list[DataError]
    num_input_bytes: int
    engine: str


class Encoder:
    """Encodes chunks, in a single process."""

    def __init__(self, encoding: Encoding) -> None:
        self._encoding = encoding
        self._tokenizer = load_tokenizer(encoding.tokenizer)
        self._fast = fast_engine(self._tokenizer) if encoding.may_be_fast else None
        self._defining = defining_engine(self._tokenizer)

    def __call__(self, number: int, chunk: Chunk) -> EncodedChunk:
        """Encode chunk ``number`` of all.

        Raises:
            EnginesDisagreeError: the engine gives other ids than the defining one; it names the document.
        """
        documents = documents_of(chunk, self._encoding.json_key)
        try:
            encoded = (
                self._defining.encode(documents.texts)
                if self._fast is None
                else checked(self._fast, self._tokenizer, documents.texts, number)
            )
        except EnginesDisagreeError as disagreement:
            place = documents.places[disagreement.document]
            raise EnginesDisagreeError(place, disagreement.engine) from None
        is_full = encoded.lengths > 0
        ids, lengths = self._framed(Encoded(encoded.ids, encoded.lengths[is_full]))
        return EncodedChunk(
            ids=ids,
            lengths=lengths,
            num_text_bytes=documents.num_text_bytes,
            num_empty=int((~is_full).sum()),
            errors=documents.errors,
            num_input_bytes=chunk.num_input_bytes,
            engine=(self._fast or self._defining).name,
        )

    def _framed(self, encoded: Encoded) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """The ids with what begins and ends each document."""
        first, last = self._encoding.prepended, self._encoding.appended
        ids, dtype = encoded.ids.astype(self._encoding.dtype), self._encoding.dtype
        if first is None and last is None:
            return ids, encoded.lengths
        lengths = encoded.lengths + (first is not None) + (last is not None)
        ends = np.cumsum(lengths)
        framed = np.empty(int(lengths.sum()), dtype)
        is_text = np.ones(len(framed), bool)
        for token, places in ((first, ends - lengths), (last, ends - 1)):
            if token is not None:
                framed[places] = token
                is_text[places] = False
        framed[is_text] = ids
        return framed, lengths


def encoded_chunks(chunks: Iterable[Chunk], encoding: Encoding, *, workers: int) -> Iterator[EncodedChunk]:
    """Encode ``chunks`` on ``workers`` processes, or in this one where that is 1, and yield the results in order.

    No more than a few chunks for each process are in memory at once.

    Raises:
        EnginesDisagreeError: see :class:`Encoder`.
        WorkerError: a process was killed.
    """
    if workers == 1:
        yield from map(Encoder(encoding), itertools.count(), chunks)
        return
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _begin, (encoding,))
    pending: deque[Future[EncodedChunk]] = deque()
    try:
        for number, chunk in enumerate(chunks):
            pending.append(pool.submit(_encode, number, chunk))
            if len(pending) > _IN_ADVANCE * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        raise WorkerError("a process that encodes was killed: was there too little memory?") from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_encoder: Encoder
"""Of a process that encodes, which does nothing else."""


def _begin(encoding: Encoding) -> None:
    """Prepare a process that encodes. Ctrl-C reaches all processes, and it is the first one that ends the others."""
    global _encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ.update(RAYON_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1")
    _encoder = Encoder(encoding)


def _encode(number: int, chunk: Chunk) -> EncodedChunk:
    return _encoder(number, chunk)
