"""Encoding of pieces of input into token ids: the part of ``tokenize`` that runs in every worker process."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from megacore.data.datasets.indexed import token_dtype
from megacore.data.preprocess.readers import Piece
from megacore.data.preprocess.records import DocumentTexts, Problem, extract_texts
from megacore.data.tokenizers.added_tokens import NewTokens
from megacore.data.tokenizers.fast_engines import DisagreementError, EncodedTexts, Engine, UnusedEngine
from megacore.data.tokenizers.tokenizer import SentencePieceTokenizer, load_tokenizer

# Batches are small, since libraries need about 100 bytes per token while they encode.
_BATCH_CHARACTERS = 1 << 20
_Item = TypeVar("_Item")

MAX_REPORTED_PROBLEMS = 5
"""The maximum number of skipped documents that are reported one by one."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """The settings of :func:`megacore.tokenize` that apply to every piece."""

    tokenizer: Path
    new_tokens: NewTokens
    use_fast: bool
    json_keys: tuple[str, ...]
    append_eod: bool
    prepend_bos: bool
    skip_erroneous: bool


class EncodedPiece(NamedTuple):
    """The result for one piece of the input.

    Attributes:
        by_key: The documents of each key.
        num_positions: Number of lines or rows.
        problems: The first malformed records; unless they are skipped, the first one ends the work.
        engine: Description of the engine for messages.
        disagreement: Line or row of a document for which the engines produce different ids, or None. If there is one,
            nothing is encoded.
        unused: The reason why the fast engine was not used; None if it was used or not requested.
    """

    by_key: list[EncodedDocuments]
    num_positions: int
    num_problems: int
    problems: list[Problem]
    engine: str
    disagreement: int | None
    unused: UnusedEngine | None


@dataclass
class EncodedDocuments:
    """The documents of a piece under one key, with ids in the dtype of the dataset."""

    ids: list[NDArray[Any]] = field(default_factory=list)
    lengths: list[NDArray[np.int64]] = field(default_factory=list)
    num_text_bytes: int = 0
    num_empty: int = 0


class PieceEncoder:
    """Encodes the pieces of a job one at a time, with a single thread if it is one of several worker processes."""

    def __init__(self, job: Job, *, one_thread: bool = False) -> None:
        self._job = job
        tokenizer = load_tokenizer(job.tokenizer, job.new_tokens)
        if one_thread and isinstance(tokenizer, SentencePieceTokenizer):
            tokenizer.num_threads = 1  # for the other libraries, the environment says so
        self._engine = Engine(tokenizer, use_fast=job.use_fast)
        self._dtype = token_dtype(tokenizer.vocab_size)
        self._begin_tokens = [tokenizer.bos_id] if job.prepend_bos else []
        self._end_tokens = [tokenizer.eod_id] if job.append_eod else []

    def encode(self, number: int, piece: Piece) -> EncodedPiece:
        """Encode piece ``number`` of the job."""
        reading = piece.read(self._job.json_keys)
        found = [
            record if isinstance(record, Problem) else extract_texts(record, self._job.json_keys)
            for record in reading.records
        ]
        problems = [problem for problem in found if isinstance(problem, Problem)]
        encoded = EncodedPiece(
            by_key=[],
            num_positions=reading.num_positions,
            num_problems=len(problems),
            problems=problems[:MAX_REPORTED_PROBLEMS],
            engine=self._engine.name,
            disagreement=None,
            unused=self._engine.unused,
        )
        if problems and not self._job.skip_erroneous:
            return encoded
        documents = [document for document in found if isinstance(document, DocumentTexts)]
        for column in range(len(self._job.json_keys)):
            encoded_documents = EncodedDocuments()
            located = [(document.position, document.texts[column]) for document in documents]
            # Only the beginning of a job, batch 0, is compared completely.
            for part, batch in enumerate(batches(located, lambda item: len(item[1]))):
                texts = [text for _, text in batch]
                batch_number = number if part == 0 else -part
                try:
                    self._add(encoded_documents, texts, self._engine.encode(texts, batch_number=batch_number))
                except DisagreementError as disagreement:
                    return encoded._replace(by_key=[], disagreement=batch[disagreement.index][0])
            encoded.by_key.append(encoded_documents)
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
        if self._begin_tokens or self._end_tokens:
            ids, lengths = self._add_begin_and_end(ids, lengths)
        documents.ids.append(ids)
        documents.lengths.append(lengths)

    def _add_begin_and_end(
        self, ids: NDArray[Any], lengths: NDArray[np.int64]
    ) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """Return the documents with the begin and end tokens that the job requests."""
        lengths = lengths + len(self._begin_tokens) + len(self._end_tokens)
        ends = np.cumsum(lengths)
        framed = np.empty(int(lengths.sum()), self._dtype)
        is_text = np.ones(len(framed), np.bool_)
        for token, positions in ((self._begin_tokens, ends - lengths), (self._end_tokens, ends - 1)):
            if token:
                framed[positions] = token[0]
                is_text[positions] = False
        framed[is_text] = ids
        return framed, lengths


def batches(
    items: Iterable[_Item], count_characters: Callable[[_Item], int], max_items: int | None = None
) -> Iterator[list[_Item]]:
    """Yield the items in batches of about :data:`_BATCH_CHARACTERS` and at most ``max_items``."""
    batch: list[_Item] = []
    num_characters = 0
    for item in items:
        batch.append(item)
        num_characters += count_characters(item)
        if num_characters >= _BATCH_CHARACTERS or len(batch) == max_items:
            yield batch
            batch, num_characters = [], 0
    if batch:
        yield batch
