"""Splits of a dataset for training, validation and test."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from itertools import accumulate, pairwise
from typing import Literal, get_args

from megacore.data.datasets.indexed import IndexedDataset
from megacore.errors import DataError

Split = Literal["train", "valid", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)


def split_tokens(dataset: IndexedDataset, weights: Sequence[float], seq_length: int) -> dict[Split, range]:
    """Cut the token stream of a dataset into consecutive parts, with numbers of tokens in proportion to ``weights``.

    Tokens are counted, not documents, whose lengths may differ a lot. A cut is made at the nearest document boundary,
    so that no document is in two parts; if a requested part would then have no sample, all cuts are made at the exact
    token.

    ``weights`` have any sum and belong to :data:`SPLITS`, in their order; a missing weight, or 0, requests no part.

    Raises:
        DataError: A requested part would have no sample of ``seq_length``.
    """
    exact = [Fraction(str(weight)) for weight in weights]
    shares = {split: weight / sum(exact) for split, weight in zip(SPLITS, exact, strict=False) if weight}
    at_tokens = [round(share * dataset.num_tokens) for share in accumulate(shares.values(), initial=Fraction(0))]
    at_documents = [0, *(dataset.nearest_document_start(cut) for cut in at_tokens[1:-1]), dataset.num_tokens]
    for cuts in (at_documents, at_tokens):
        parts = {split: range(start, stop) for split, (start, stop) in zip(shares, pairwise(cuts), strict=True)}
        if all(len(part) > seq_length for part in parts.values()):
            return parts
    split, part = min(parts.items(), key=lambda item: len(item[1]))
    # Enough for the smallest weight, which need not be that of this split.
    needed = Fraction(seq_length + 1) / min(shares.values())
    raise DataError(
        f"{dataset.prefix}: data.split = {[float(weight) for weight in weights]} gives {len(part)} of its "
        f"{dataset.num_tokens} tokens to {split}, and a sample of data.seq_length {seq_length} takes {seq_length + 1}: "
        f"raise that weight, set it to 0 to go without, use a dataset of {-(-needed // 1)} tokens or more, or name a "
        f"dataset for it (data.valid_prefix, data.test_prefix)"
    )
