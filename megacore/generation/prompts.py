"""Prompts: text, token ids or a conversation, and their encoding as token ids."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TypeGuard, cast

from megacore.checkpoint import Checkpoint
from megacore.data import Tokenizer, load_tokenizer
from megacore.data.tokenizers.chat_template import ChatTemplate, Message, open_chat_template
from megacore.errors import GenerationError

Prompt = str | Sequence[int] | Sequence[Message]
"""A text, token ids, or the messages of a conversation that the assistant answers."""


def is_conversation(prompt: Prompt) -> TypeGuard[Sequence[Message]]:
    """Return whether a prompt is the messages of a conversation."""
    return not isinstance(prompt, str) and len(prompt) > 0 and isinstance(prompt[0], Mapping)


class PromptEncoder:
    """Encodes prompts as token ids, with the tokenizer of a checkpoint; the settings are those of ``generate``.

    Attributes:
        tokenizer: Tokenizer of the checkpoint; ``None`` for a checkpoint without one.
    """

    def __init__(
        self, checkpoint: Checkpoint, *, add_bos: bool | None = None, chat_template: Path | None = None
    ) -> None:
        self._path = checkpoint.path
        directory = checkpoint.tokenizer_directory
        self.tokenizer = None if directory is None else load_tokenizer(directory)
        self._context = int(checkpoint.manifest.config["max_position_embeddings"])
        self._vocab_size = int(checkpoint.manifest.config["vocab_size"])
        self._add_bos = add_bos
        self._template_file = chat_template

    def encode(self, prompt: Prompt) -> list[int]:
        """Return the ids of a prompt.

        Raises:
            GenerationError: when it is empty, is longer than the model's context, or needs a tokenizer and the
                checkpoint has none.
            DataError: when the chat template refuses it.
        """
        if isinstance(prompt, str):
            ids = self._encode_text(prompt)
        elif is_conversation(prompt):
            ids = self.require_tokenizer().encode(self.template.render(prompt, add_generation_prompt=True))
        else:
            ids = [int(token_id) for token_id in cast(Sequence[int], prompt)]
        excerpt = _abridged(prompt)
        if not ids:
            raise GenerationError(
                f"the prompt {excerpt} has no token, so there is nothing to continue: give one with text"
            )
        if unknown := [token_id for token_id in ids if not 0 <= token_id < self._vocab_size]:
            raise GenerationError(
                f"the prompt {excerpt} has the token id {unknown[0]}, and the vocabulary of {self._path} ends at "
                f"{self._vocab_size - 1}: was its tokenizer extended, and the model not?"
            )
        if len(ids) >= self._context:
            raise GenerationError(
                f"the prompt {excerpt} has {len(ids)} tokens, and the context of the model is {self._context}: there "
                "is no room for another token. Shorten the prompt"
            )
        return ids

    def require_tokenizer(self) -> Tokenizer:
        """Return the tokenizer. Raise :class:`GenerationError` if there is none."""
        if self.tokenizer is None:
            raise GenerationError(
                f"{self._path} has no tokenizer, so it cannot encode text: convert the model from a directory that has "
                "one, or give prompts as token ids (megacore.generate in Python)"
            )
        return self.tokenizer

    @cached_property
    def template(self) -> ChatTemplate:
        """The chat template. Raise :class:`DataError` if there is none."""
        return open_chat_template(self.require_tokenizer(), self._template_file)

    def _encode_text(self, text: str) -> list[int]:
        tokenizer = self.require_tokenizer()
        if not text:
            return []
        ids = tokenizer.encode(text)
        if not (tokenizer.adds_bos if self._add_bos is None else self._add_bos):
            return ids
        if tokenizer.bos_id is None:
            raise GenerationError(f"{tokenizer.file} has no BOS token: leave out --bos")
        return [tokenizer.bos_id, *ids]


def end_ids(checkpoint: Checkpoint, tokenizer: Tokenizer | None) -> frozenset[int]:
    """Return the tokens that end a text: those that the published model names, and the end of a document."""
    ids = [] if tokenizer is None or tokenizer.eod_id is None else [tokenizer.eod_id]
    for file in ("generation_config", "config"):
        eos = (checkpoint.manifest.origin.get(file) or {}).get("eos_token_id")
        if eos is not None:
            return frozenset([*ids, eos] if isinstance(eos, int) else [*ids, *eos])
    return frozenset(ids)


def _abridged(prompt: Prompt) -> str:
    text = prompt if isinstance(prompt, str) else str(list(prompt))
    text = text if len(text) <= 40 else f"{text[:40]}…"
    return json.dumps(text, ensure_ascii=False) if isinstance(prompt, str) else text
