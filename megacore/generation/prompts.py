"""What a model is to go on from: text, token ids or a conversation, as token ids."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard, cast

from megacore.checkpoint import Checkpoint
from megacore.data import Tokenizer, load_tokenizer
from megacore.data.tokenizers.chat_template import ChatTemplate, Message, open_chat_template
from megacore.errors import GenerationError

Prompt = str | Sequence[int] | Sequence[Message]
"""Text, token ids, or the messages of a conversation that the assistant is to answer."""


def is_conversation(prompt: Prompt) -> TypeGuard[Sequence[Message]]:
    """Whether a prompt is the messages of a conversation."""
    return not isinstance(prompt, str) and len(prompt) > 0 and isinstance(prompt[0], Mapping)


class PromptReader:
    """Makes token ids of prompts, with the tokenizer of a checkpoint.

    Args:
        checkpoint: where the tokenizer is.
        add_bos: whether a text begins with the token for a beginning; by default as its tokenizer says.
        chat_template: a file to take instead of the tokenizer's own chat template.

    Attributes:
        tokenizer: ``None`` where the checkpoint came without.
    """

    def __init__(
        self, checkpoint: Checkpoint, *, add_bos: bool | None = None, chat_template: Path | None = None
    ) -> None:
        self._where = checkpoint.path
        directory = checkpoint.tokenizer_directory
        self.tokenizer = None if directory is None else load_tokenizer(directory)
        self._context = int(checkpoint.manifest.config["max_position_embeddings"])
        self._vocab_size = int(checkpoint.manifest.config["vocab_size"])
        self._add_bos = add_bos
        self._template_file = chat_template
        self._template: ChatTemplate | None = None

    def read(self, prompt: Prompt) -> list[int]:
        """The ids of a prompt.

        Raises:
            GenerationError: when it is empty, is longer than the model's context, or needs a tokenizer and the
                checkpoint has none.
            DataError: when the chat template does not take it.
        """
        if isinstance(prompt, str):
            ids = self._of_text(prompt)
        elif is_conversation(prompt):
            template = self.require_template()
            ids = self.require_tokenizer().encode(template.render(prompt, add_generation_prompt=True))
        else:
            ids = [int(token_id) for token_id in cast(Sequence[int], prompt)]
        told = _abridged(prompt)
        if not ids:
            raise GenerationError(
                f"the prompt {told} has no token, so there is nothing to go on from: give one with text"
            )
        if unknown := [token_id for token_id in ids if not 0 <= token_id < self._vocab_size]:
            raise GenerationError(
                f"the prompt {told} has the token id {unknown[0]}, and the vocabulary of {self._where} ends at "
                f"{self._vocab_size - 1}: was its tokenizer extended, and the model not?"
            )
        if len(ids) >= self._context:
            raise GenerationError(
                f"the prompt {told} is {len(ids)} tokens, and the context of the model {self._context}: there is no "
                "room for another token. Shorten the prompt"
            )
        return ids

    def require_tokenizer(self) -> Tokenizer:
        """The tokenizer. Raises :class:`GenerationError` where there is none."""
        if self.tokenizer is None:
            raise GenerationError(
                f"{self._where} came without a tokenizer, so that text has no meaning for it: convert the model from a "
                "directory that has one, or give prompts as token ids (megacore.generate in Python)"
            )
        return self.tokenizer

    def require_template(self) -> ChatTemplate:
        """The chat template. Raises :class:`DataError` where there is none."""
        if self._template is None:
            self._template = open_chat_template(self.require_tokenizer(), self._template_file)
        return self._template

    def _of_text(self, text: str) -> list[int]:
        tokenizer = self.require_tokenizer()
        if not text:
            return []
        add_bos = tokenizer.adds_bos if self._add_bos is None else self._add_bos
        if add_bos and tokenizer.bos_id is None:
            raise GenerationError(f"{tokenizer.file}: has no token for the beginning of a text: leave out --bos")
        begin = [tokenizer.bos_id] if add_bos and tokenizer.bos_id is not None else []
        return begin + tokenizer.encode(text)


def end_ids(checkpoint: Checkpoint, tokenizer: Tokenizer | None) -> frozenset[int]:
    """The tokens that end a text: those that the published model names, and the one that ends a document."""
    ids: set[int] = set() if tokenizer is None or tokenizer.eod_id is None else {tokenizer.eod_id}
    published: dict[str, Any] = checkpoint.manifest.origin
    for settings in (published.get("generation_config"), published.get("config")):
        told = (settings or {}).get("eos_token_id")
        if told is not None:
            ids |= {told} if isinstance(told, int) else set(told)
            break
    return frozenset(ids)


def _abridged(prompt: Prompt) -> str:
    if not isinstance(prompt, str):
        prompt = str(list(prompt))
        return prompt if len(prompt) <= 40 else f"{prompt[:40]}…"
    return json.dumps(prompt if len(prompt) <= 40 else f"{prompt[:40]}…", ensure_ascii=False)
