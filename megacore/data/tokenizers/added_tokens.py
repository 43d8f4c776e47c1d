"""Tokens that are added to a tokenizer's own file, so that every program that reads the file knows them."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from megacore.errors import DataError

STANDARD_TOKENS = ("<CLS>", "<SEP>", "<EOD>", "<MASK>", "<PAD>")
"""The tokens that Megatron-LLM adds by default, in its order; ``<PAD>`` only if a tokenizer has no padding token."""

_CONTROL, _USER_DEFINED = 3, 4  # of sentencepiece_model.proto, ModelProto.SentencePiece.Type


@dataclass(frozen=True, kw_only=True)
class NewTokens:
    """Tokens to add. They get the ids after the vocabulary, in this order; an existing token keeps its id.

    Attributes:
        standard: Add :data:`STANDARD_TOKENS`.
        num_extra_ids: Number of tokens ``<extra_id_0>``, ``<extra_id_1>``… to add.
        named: Further tokens to add.
    """

    standard: bool = False
    num_extra_ids: int = 0
    named: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if "" in self.named or any(token != token.strip() for token in self.named):
            raise DataError("a token to add is empty, or has a space at an end: name them as in '<|user|>,<|end|>'")
        if self.num_extra_ids < 0:
            raise DataError(f"the number of extra ids is 0 or more, not {self.num_extra_ids}")

    def __bool__(self) -> bool:
        return self.standard or self.num_extra_ids > 0 or bool(self.named)

    def standard_tokens(self, *, has_padding: bool) -> list[str]:
        """Return the standard tokens to add to a tokenizer with or without a padding token."""
        return [token for token in STANDARD_TOKENS if token != "<PAD>" or not has_padding] if self.standard else []

    def requested_tokens(self) -> list[str]:
        """Return the tokens that the user asked for."""
        return [*(f"<extra_id_{i}>" for i in range(self.num_extra_ids)), *self.named]


def extend_sentencepiece(model: bytes, new: NewTokens, *, known: Iterable[str], has_padding: bool) -> bytes:
    """Return the SentencePiece ``model`` with more pieces.

    The standard tokens are control symbols like ``</s>``, which text is never encoded to. Requested tokens are
    user-defined symbols: text that spells one is encoded to it. In protocol buffers, entries of a repeated field that
    follow the serialized message are appended to it.
    """
    known = set(known)
    pieces = []
    for kind, tokens in (
        (_CONTROL, new.standard_tokens(has_padding=has_padding)),
        (_USER_DEFINED, new.requested_tokens()),
    ):
        for token in tokens:
            if token not in known:
                known.add(token)
                pieces.append(_piece(token, kind))
    return model + b"".join(pieces)


def extend_tokenizer_json(tokenizer: Any, new: NewTokens, *, has_padding: bool) -> None:
    """Add special tokens to a ``tokenizers.Tokenizer``: text that spells one is encoded to it, as always there."""
    from tokenizers import AddedToken

    known = tokenizer.get_vocab(with_added_tokens=True)
    for token in [*new.standard_tokens(has_padding=has_padding), *new.requested_tokens()]:
        if token not in known:
            tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False)])


def _piece(token: str, kind: int) -> bytes:
    """Serialize a ``pieces`` entry of ModelProto: ``piece`` (1, string), ``score`` (2, float), ``type`` (3, enum)."""
    text = token.encode()
    body = b"\x0a" + _varint(len(text)) + text + b"\x15" + struct.pack("<f", 0.0) + b"\x18" + _varint(kind)
    return b"\x0a" + _varint(len(body)) + body


def _varint(number: int) -> bytes:
    encoded = bytearray()
    while number > 0x7F:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)
