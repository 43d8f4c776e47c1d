"""Tokens to text as they come: never half a character, never the beginning of what ends the text."""

from __future__ import annotations

from collections.abc import Sequence

from megacore.data import Tokenizer

_HALF = "�"
"""What a decoder gives for bytes that are no character, or not one yet."""

_CONTEXT = 8
"""So many tokens before are decoded along: the first word of a text may lose its space, any other keeps it."""


class TextStream:
    """The text of tokens that follow a prompt.

    :meth:`add` returns what is sure of the text so far and was not returned before: bytes of a character wait for the
    others, and so does what may turn out to be the beginning of a stop text. All that is returned, together, is
    ``text`` once :meth:`finish` was called.

    A token is decoded together with those since the last sure boundary, not with the whole text: the text before a
    boundary stays as it is, whatever follows.

    Args:
        tokenizer: of the model.
        prompt_ids: what the tokens follow.
        stop: texts that end it; the text is cut off before the first one.

    Attributes:
        is_stopped: whether a stop text came.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int], stop: Sequence[str] = ()) -> None:
        self.is_stopped = False
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._returned: list[str] = []
        self._held_back = ""
        size = _CONTEXT
        # A prompt may end within a run of single bytes, which is nothing where it is cut in the middle of a character.
        while size < len(prompt_ids) and tokenizer.decode(prompt_ids[-size:]).startswith(_HALF):
            size *= 2
        self._ids = list(prompt_ids[-size:])
        self._num_taken = len(tokenizer.decode(self._ids).rstrip(_HALF))

    @property
    def text(self) -> str:
        """What was returned."""
        return "".join(self._returned)

    def add(self, token_id: int) -> str:
        """Take a further token."""
        self._ids.append(token_id)
        # Single bytes are decoded together, and may become something else with the next one.
        if self._tokenizer.is_byte(token_id):
            return ""
        decoded = self._tokenizer.decode(self._ids)
        new = self._return(self._taken(decoded.rstrip(_HALF)), is_last=False)
        if decoded and not decoded.endswith(_HALF):
            self._begin_here()
        return new

    def finish(self) -> str:
        """What is left, when no token follows."""
        return self._return(self._taken(self._tokenizer.decode(self._ids)), is_last=True)

    def _begin_here(self) -> None:
        """Decode from here on, with as few of the last tokens as have any text."""
        size = _CONTEXT
        while not (decoded := self._tokenizer.decode(self._ids[-size:])) and size < len(self._ids):
            size *= 2
        self._ids = self._ids[-size:]
        self._num_taken = len(decoded)

    def _taken(self, decoded: str) -> str:
        """What is new of the text of ``_ids``."""
        new = decoded[self._num_taken :]
        self._num_taken += len(new)
        return new

    def _return(self, new: str, *, is_last: bool) -> str:
        """What is to be returned now. A stop text is looked for where it can be new: its beginning was held back."""
        if self.is_stopped:
            return ""
        text = self._held_back + new
        found = [place for stop in self._stop if (place := text.find(stop)) >= 0]
        if found:
            self.is_stopped, end = True, min(found)
        else:
            end = len(text) - (0 if is_last else self._possible_stop(text))
        self._held_back = text[end:]
        self._returned.append(text[:end])
        return text[:end]

    def _possible_stop(self, text: str) -> int:
        """The length of the longest end of ``text`` that a stop text begins with."""
        return max((n for stop in self._stop for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
