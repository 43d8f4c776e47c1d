"""Prompts: text, token ids or a conversation, and their encoding as token ids."""

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
"""A text, token ids, or the messages of a conversation that the assistant answers."""


def is_conversation(prompt: Prompt) -> TypeGuard[Sequence[Message]]:
    """Return whether a prompt is the messages of a conversation."""
    return not isinstance(prompt, str) and len(prompt) > 0 and isinstance(prompt[0], Mapping)


class PromptEncoder:
    """Encodes prompts as token ids, with the tokenizer of a checkpoint.

    Args:
        checkpoint: Checkpoint with the tokenizer.
        add_bos: True to prepend the BOS token to a text; by default as the tokenizer says.
        chat_template: File with a chat template that replaces the tokenizer's.

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
        self._template: ChatTemplate | None = None

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
            template = self.require_template()
            ids = self.require_tokenizer().encode(template.render(prompt, add_generation_prompt=True))
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

    def require_template(self) -> ChatTemplate:
        """Return the chat template. Raise :class:`DataError` if there is none."""
        if self._template is None:
            self._template = open_chat_template(self.require_tokenizer(), self._template_file)
        return self._template

    def _encode_text(self, text: str) -> list[int]:
        tokenizer = self.require_tokenizer()
        if not text:
            return []
        add_bos = tokenizer.adds_bos if self._add_bos is None else self._add_bos
        if add_bos and tokenizer.bos_id is None:
            raise GenerationError(f"{tokenizer.file} has no BOS token: leave out --bos")
        prefix = [tokenizer.bos_id] if add_bos and tokenizer.bos_id is not None else []
        return prefix + tokenizer.encode(text)


def end_ids(checkpoint: Checkpoint, tokenizer: Tokenizer | None) -> frozenset[int]:
    """Return the tokens that end a text: those that the published model names, and the end of a document."""
    ids: set[int] = set() if tokenizer is None or tokenizer.eod_id is None else {tokenizer.eod_id}
    published: dict[str, Any] = checkpoint.manifest.origin
    for settings in (published.get("generation_config"), published.get("config")):
        eos = (settings or {}).get("eos_token_id")
        if eos is not None:
            ids |= {eos} if isinstance(eos, int) else set(eos)
            break
    return frozenset(ids)


def _abridged(prompt: Prompt) -> str:
    if not isinstance(prompt, str):
        prompt = str(list(prompt))
        return prompt if len(prompt) <= 40 else f"{prompt[:40]}…"
    return json.dumps(prompt if len(prompt) <= 40 else f"{prompt[:40]}…", ensure_ascii=False)
