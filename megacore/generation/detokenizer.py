"""Incremental detokenization: the text of tokens as they are generated.

The streaming decoders of transformers and tokenizers know no stop texts, and transformers' returns whole words only.
"""

from __future__ import annotations

from collections.abc import Sequence

from megacore.data import Tokenizer

_REPLACEMENT = "�"  # decoders return this character for bytes that are not a complete character
_CONTEXT = 8  # earlier tokens that are decoded together with a new one: the first word of a text may lose its space


class Detokenizer:
    """The text of the tokens that follow a prompt.

    :meth:`add` returns the new part of the text that cannot change any more. The bytes of an incomplete character are
    held back, and so is text that may be the beginning of a stop text. All returned parts together are ``text`` once
    :meth:`finish` was called.

    A token is decoded together with those since the last safe boundary, not with the whole text: text before such a
    boundary does not depend on what follows.

    Args:
        tokenizer: Tokenizer of the model.
        prompt_ids: Tokens of the prompt.
        stop: Stop texts; the text is cut off before the first one that occurs.

    Attributes:
        is_stopped: True once a stop text has occurred.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int], stop: Sequence[str] = ()) -> None:
        self.is_stopped = False
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._returned: list[str] = []
        self._pending = ""
        size = _CONTEXT
        # A prompt may end within a run of byte tokens, which do not decode from the middle of a character.
        while size < len(prompt_ids) and tokenizer.decode(prompt_ids[-size:]).startswith(_REPLACEMENT):
            size *= 2
        self._ids = list(prompt_ids[-size:])
        self._num_decoded = len(tokenizer.decode(self._ids).rstrip(_REPLACEMENT))

    @property
    def text(self) -> str:
        """The text returned so far."""
        return "".join(self._returned)

    def add(self, token_id: int) -> str:
        """Add a token; return the new text."""
        self._ids.append(token_id)
        # Byte tokens are decoded together, and the next one may change their text.
        if self._tokenizer.is_byte(token_id):
            return ""
        decoded = self._tokenizer.decode(self._ids)
        new = self._return(self._new_part(decoded.rstrip(_REPLACEMENT)), is_last=False)
        if decoded and not decoded.endswith(_REPLACEMENT):
            self._set_boundary()
        return new

    def finish(self) -> str:
        """Return the rest of the text, after the last token."""
        return self._return(self._new_part(self._tokenizer.decode(self._ids)), is_last=True)

    def _set_boundary(self) -> None:
        """Decode further tokens from here, together with the fewest of the last tokens that have any text."""
        size = _CONTEXT
        while not (decoded := self._tokenizer.decode(self._ids[-size:])) and size < len(self._ids):
            size *= 2
        self._ids = self._ids[-size:]
        self._num_decoded = len(decoded)

    def _new_part(self, decoded: str) -> str:
        """Return the part of the text of ``_ids`` that is new."""
        new = decoded[self._num_decoded :]
        self._num_decoded += len(new)
        return new

    def _return(self, new: str, *, is_last: bool) -> str:
        """Return the text that is complete. The beginning of a stop text is pending, so only that part is searched."""
        if self.is_stopped:
            return ""
        text = self._pending + new
        found = [index for stop in self._stop if (index := text.find(stop)) >= 0]
        if found:
            self.is_stopped, end = True, min(found)
        else:
            end = len(text) - (0 if is_last else self._possible_stop(text))
        self._pending = text[end:]
        self._returned.append(text[:end])
        return text[:end]

    def _possible_stop(self, text: str) -> int:
        """Return the length of the longest end of ``text`` that is the beginning of a stop text."""
        return max((n for stop in self._stop for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
