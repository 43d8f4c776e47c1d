"""Cutting a dataset into parts to train, to validate and to test on."""

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
    """Cut the stream of a dataset into consecutive parts whose numbers of tokens are as ``weights``.

    Tokens are counted, not documents, which may be of very different lengths. A cut is made at the document boundary
    that is nearest, so that no document is in two parts; unless a part that is asked for would then have no sample:
    then all cuts are made at the very token.

    Args:
        weights: of any sum, for :data:`SPLITS` in their order; a part that has none, or a weight of 0, is left out.
        seq_length: of the samples.

    Raises:
        DataError: a part that is asked for would have no sample.
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
    needed = Fraction(seq_length + 1) / min(shares.values())  # enough for the smallest part, which is not always this
    raise DataError(
        f"{dataset.prefix}: data.split = {[float(weight) for weight in weights]} gives {len(part)} of its "
        f"{dataset.num_tokens} tokens to {split}, and a sample of data.seq_length {seq_length} takes {seq_length + 1}: "
        f"raise that weight, set it to 0 to go without, use a dataset of {-(-needed // 1)} tokens or more, or name a "
        f"dataset for it (data.valid_prefix, data.test_prefix)"
    )
