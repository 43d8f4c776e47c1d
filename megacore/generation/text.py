"""Tokens to text as they come: never half a character, never the beginning of what ends the text."""

from __future__ import annotations

from collections.abc import Sequence

from megacore.data import Tokenizer

_HALF = "�"
"""What a decoder gives for bytes that are no character, or not one yet."""

_CONTEXT = 8
"""So many tokens of the prompt are decoded along: the first word of a text may lose its space, any other keeps it.
There are more where that many would begin in the middle of a character."""


class TextStream:
    """The text of tokens that follow a prompt.

    :meth:`add` returns what is sure of the text so far and was not returned before: bytes of a character wait for the
    others, and so does what may turn out to be the beginning of a stop text. All that is returned, together, is
    ``text`` once :meth:`finish` was called.

    Args:
        tokenizer: of the model.
        prompt_ids: what the tokens follow.
        stop: texts that end it; the text is cut off before the first one.

    Attributes:
        text: what was returned.
        is_stopped: whether a stop text came.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int], stop: Sequence[str] = ()) -> None:
        self.text = ""
        self.is_stopped = False
        self._tokenizer = tokenizer
        size = _CONTEXT
        while size < len(prompt_ids) and tokenizer.decode(prompt_ids[-size:]).startswith(_HALF):
            size *= 2
        self._context = list(prompt_ids[-size:])
        self._before = tokenizer.decode(self._context).rstrip(_HALF)
        self._ids: list[int] = []
        self._stop = tuple(stop)

    def add(self, token_id: int) -> str:
        """Take a further token."""
        self._ids.append(token_id)
        whole = len(self._ids)
        # Single bytes are decoded together, and may become something else with the next one.
        while whole and self._tokenizer.is_byte(self._ids[whole - 1]):
            whole -= 1
        text = self._decoded(self._ids[:whole]).rstrip(_HALF)
        return self._returned(text, held_back=self._possible_stop(text))

    def finish(self) -> str:
        """What is left, when no token follows."""
        return self._returned(self._decoded(self._ids), held_back=0)

    def _decoded(self, ids: list[int]) -> str:
        return self._tokenizer.decode(self._context + ids)[len(self._before) :]

    def _returned(self, text: str, *, held_back: int) -> str:
        if self.is_stopped:
            return ""
        found = [place for stop in self._stop if (place := text.find(stop)) >= 0]
        if found:
            self.is_stopped, end = True, min(found)
        else:
            end = len(text) - held_back
        new = text[len(self.text) : end]
        self.text += new
        return new

    def _possible_stop(self, text: str) -> int:
        """The length of the longest end of ``text`` that a stop text begins with."""
        return max((n for stop in self._stop for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
