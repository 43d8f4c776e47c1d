"""Whether token ids belong to a model's vocabulary."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megacore.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor


def check_token_ids(ids: Tensor, vocab_size: int, where: str) -> Tensor:
    """Return ``ids``, those of ``where``. Raises :class:`DataError` when one is not in ``[0, vocab_size)``."""
    smallest, largest = (int(bound) for bound in ids.aminmax())
    if smallest < 0 or largest >= vocab_size:
        stranger = smallest if smallest < 0 else largest
        raise DataError(
            f"{where} has token id {stranger}, and the checkpoint's vocabulary is 0 to {vocab_size - 1}: "
            "tokenize with the checkpoint's own tokenizer"
        )
    return ids
