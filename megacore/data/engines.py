"""Encoding text by the quickest library that agrees with the one that defines the tokenizer.

A ``tokenizer.json`` is defined by the library tokenizers, and fastokens encodes with it an order of magnitude faster; a
``tokenizer.model`` is defined by sentencepiece, and kitoken is faster. Neither is trusted: what they give is compared
with what the defining library gives, at the start and all through the work.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megacore.data.tokenizer import SentencePieceTokenizer, Tokenizer

_COMPARED_AT_FIRST = 1 << 16
"""Characters of the first chunk that are compared."""

_COMPARED = 1 << 11
"""Characters of each other chunk that are compared, and the most of a single document."""


class Encoded(NamedTuple):
    """The ids of some texts, back to back, and how many each has: ``[sum of lengths]`` and ``[texts]``."""

    ids: NDArray[np.uint32]
    lengths: NDArray[np.int64]


Encode = Callable[[Sequence[str]], Encoded]


class Engine(NamedTuple):
    """What encodes texts, and the name of its library."""

    name: str
    encode: Encode


class EnginesDisagreeError(Exception):
    """The fast engine gave other ids than the defining one, so it cannot be used at all.

    Attributes:
        document: for which one: its number in the chunk, or its place.
        engine: the name of the fast one.
    """

    def __init__(self, document: Any, engine: str) -> None:
        super().__init__(document, engine)
        self.document, self.engine = document, engine


def defining_engine(tokenizer: Tokenizer) -> Engine:
    """The library that defines ``tokenizer``."""

    def encode(texts: Sequence[str]) -> Encoded:
        return _joined(tokenizer.encode_batch(texts))

    return Engine(tokenizer.library, encode)


def fast_engine(tokenizer: Tokenizer) -> Engine | None:
    """A faster one; ``None`` where none is installed that takes this tokenizer."""
    try:
        if isinstance(tokenizer, SentencePieceTokenizer):
            # Of models that rewrite text (nmt_nfkc and the like), kitoken was seen to give other ids now and then: too
            # seldom for the comparisons to be sure to find it.
            return None if tokenizer.rewrites_text else _kitoken(tokenizer.file)
        return _fastokens(tokenizer.file)
    except ImportError:
        return None


def checked(fast: Engine, tokenizer: Tokenizer, texts: Sequence[str], chunk: int) -> Encoded:
    """What ``fast`` gives for the texts of a chunk, some of which are compared with what ``tokenizer`` gives.

    ``chunk`` is its number; of the first one, 0, more is compared. Texts that ``fast`` refuses, as fastokens does those
    with bytes that the vocabulary lacks, are left to ``tokenizer``, with the whole chunk.

    Raises:
        EnginesDisagreeError: they differ.
    """
    try:
        encoded = fast.encode(texts)
    except ValueError:
        return defining_engine(tokenizer).encode(texts)
    ends = np.cumsum(encoded.lengths)
    for number in _to_compare(texts, chunk):
        text = texts[number]
        if len(text) <= _COMPARED:
            found = encoded.ids[ends[number] - encoded.lengths[number] : ends[number]]
        else:
            text = text[:_COMPARED]
            found = fast.encode([text]).ids
        if found.tolist() != tokenizer.encode(text):
            raise EnginesDisagreeError(number, fast.name)
    return encoded


def _to_compare(texts: Sequence[str], chunk: int) -> list[int]:
    if not texts:
        return []
    if chunk > 0:
        return [random.Random(chunk).randrange(len(texts))]
    chosen, num_characters = [], 0
    for number, text in enumerate(texts):
        if num_characters >= _COMPARED_AT_FIRST:
            break
        chosen.append(number)
        num_characters += min(len(text), _COMPARED)
    return chosen


def _fastokens(file: Path) -> Engine | None:
    import fastokens

    try:
        tokenizer = fastokens.Tokenizer.from_file(str(file))
        tokenizer.no_truncation()
        tokenizer.no_padding()
    except Exception:  # it raises nothing more special, and takes some kinds of tokenizers only
        return None

    def encode(texts: Sequence[str]) -> Encoded:
        ids, offsets = tokenizer.encode_batch_flat(list(texts), add_special_tokens=False)
        ends = np.frombuffer(offsets, np.int64)
        return Encoded(np.frombuffer(ids, np.uint32), ends[1:] - ends[:-1])

    return Engine("fastokens", encode)


def _kitoken(file: Path) -> Engine | None:
    from kitoken import Kitoken

    try:
        tokenizer = Kitoken.from_sentencepiece_file(str(file))
    except Exception:  # likewise
        return None

    def encode(texts: Sequence[str]) -> Encoded:
        return _joined(tokenizer.encode_all(list(texts), False))

    return Engine("kitoken", encode)


def _joined(all_ids: Sequence[Sequence[int]]) -> Encoded:
    lengths = np.array([len(ids) for ids in all_ids], np.int64)
    joined = np.empty(int(lengths.sum()), np.uint32)
    start = 0
    for ids in all_ids:
        joined[start : start + len(ids)] = ids
        start += len(ids)
    return Encoded(joined, lengths)
