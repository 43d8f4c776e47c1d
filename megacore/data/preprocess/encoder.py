"""Pieces of input to the ids of their documents: the part of ``tokenize`` that every process does by itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megacore.data.datasets.indexed import token_dtype
from megacore.data.preprocess.readers import Piece
from megacore.data.preprocess.records import Document, Problem, document
from megacore.data.tokenizers.added_tokens import NewTokens
from megacore.data.tokenizers.fast_engines import DisagreementError, EncodedTexts, Engine, LeftOut
from megacore.data.tokenizers.tokenizer import SentencePieceTokenizer, load_tokenizer

# What is encoded at once is little enough for a library's own bookkeeping (about 100 bytes a token) to stay small.
_BATCH_CHARACTERS = 1 << 20

NUM_PROBLEMS_NAMED = 5
"""Of the documents that are skipped, how many are told one by one."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What to do with every piece; the arguments of :func:`megacore.tokenize`."""

    tokenizer: Path
    new_tokens: NewTokens
    use_fast: bool
    json_keys: tuple[str, ...]
    append_eod: bool
    prepend_bos: bool
    skip_erroneous: bool


class EncodedPiece(NamedTuple):
    """What became of one piece of the input."""

    by_key: list[EncodedDocuments]
    """For each key."""
    num_positions: int
    """Lines or rows of the piece."""
    num_problems: int
    problems: list[Problem]
    """The first ones; where erroneous documents are not skipped, the one that ends the work."""
    engine: str
    """What has encoded, for people."""
    disagreement: int | None
    """The place of a document for which the engines give different ids: nothing is encoded then."""
    left_out: LeftOut | None
    """Why no faster library has encoded, where one was to."""


@dataclass
class EncodedDocuments:
    """The documents of a piece under one key. Ids have the dtype of the dataset."""

    ids: list[NDArray[Any]] = field(default_factory=list)
    lengths: list[NDArray[np.int64]] = field(default_factory=list)
    num_text_bytes: int = 0
    num_empty: int = 0


class PieceEncoder:
    """Encodes the pieces of a job, one after the other, each by itself; on one thread where others do so beside it."""

    def __init__(self, job: Job, *, one_thread: bool = False) -> None:
        self._job = job
        tokenizer = load_tokenizer(job.tokenizer, job.new_tokens)
        if one_thread and isinstance(tokenizer, SentencePieceTokenizer):
            tokenizer.num_threads = 1  # the other libraries look for that in the environment
        self._engine = Engine(tokenizer, use_fast=job.use_fast)
        self._dtype = token_dtype(tokenizer.vocab_size)
        self._beginning = [tokenizer.bos_id] if job.prepend_bos else []
        self._ending = [tokenizer.eod_id] if job.append_eod else []

    def encode(self, number: int, piece: Piece) -> EncodedPiece:
        """Encode piece ``number`` of the job."""
        reading = piece.read(self._job.json_keys)
        found = [
            record if isinstance(record, Problem) else document(record, self._job.json_keys)
            for record in reading.records
        ]
        problems = [problem for problem in found if isinstance(problem, Problem)]
        encoded = EncodedPiece(
            by_key=[],
            num_positions=reading.num_positions,
            num_problems=len(problems),
            problems=problems[:NUM_PROBLEMS_NAMED],
            engine=self._engine.name,
            disagreement=None,
            left_out=self._engine.left_out,
        )
        if problems and not self._job.skip_erroneous:
            return encoded
        documents = [one for one in found if isinstance(one, Document)]
        for column in range(len(self._job.json_keys)):
            of_key = EncodedDocuments()
            # Only what begins a job is compared as a whole.
            for part, batch in enumerate(_batches(documents, column)):
                texts = [one.texts[column] for one in batch]
                batch_number = number if part == 0 else -part
                try:
                    self._add(of_key, texts, self._engine.encode(texts, batch_number=batch_number))
                except DisagreementError as disagreement:
                    return encoded._replace(by_key=[], disagreement=batch[disagreement.index].position)
            encoded.by_key.append(of_key)
        return encoded

    def _add(self, documents: EncodedDocuments, texts: Sequence[str], encoded: EncodedTexts) -> None:
        has_ids = encoded.lengths > 0
        documents.num_empty += len(texts) - int(np.count_nonzero(has_ids))
        documents.num_text_bytes += sum(
            len(text) if text.isascii() else len(text.encode())
            for text, kept in zip(texts, has_ids.tolist(), strict=True)
            if kept
        )
        lengths = encoded.lengths[has_ids]
        ids = encoded.ids.astype(self._dtype)
        if self._beginning or self._ending:
            ids, lengths = self._framed(ids, lengths)
        documents.ids.append(ids)
        documents.lengths.append(lengths)

    def _framed(self, ids: NDArray[Any], lengths: NDArray[np.int64]) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """The documents with the token before and after each that the job asks for."""
        lengths = lengths + len(self._beginning) + len(self._ending)
        ends = np.cumsum(lengths)
        framed = np.empty(int(lengths.sum()), self._dtype)
        is_text = np.ones(len(framed), np.bool_)
        for token, places in ((self._beginning, ends - lengths), (self._ending, ends - 1)):
            if token:
                framed[places] = token[0]
                is_text[places] = False
        framed[is_text] = ids
        return framed, lengths


def _batches(documents: Sequence[Document], column: int) -> Iterator[list[Document]]:
    batch: list[Document] = []
    num_characters = 0
    for one in documents:
        batch.append(one)
        num_characters += len(one.texts[column])
        if num_characters >= _BATCH_CHARACTERS:
            yield batch
            batch, num_characters = [], 0
    if batch:
        yield batch
