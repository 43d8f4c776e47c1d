"""``TextGenerator``: a loaded model, on one process or several, that generates text after prompts."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import InitVar, asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from megacore.checkpoint import Checkpoint
from megacore.checkpoint.safetensors_file import DTYPES
from megacore.data import Tokenizer
from megacore.errors import GenerationError
from megacore.generation.decoding import ENDED, decode
from megacore.generation.detokenizer import Detokenizer
from megacore.generation.prompts import Prompt, PromptEncoder, end_ids, is_conversation
from megacore.generation.sampling import Sampling
from megacore.model import DecoderModel, load_model
from megacore.parallel import ParallelContext, broadcast_object

BATCH_SIZE = 32

EndReason = Literal["end", "stop", "max_new_tokens", "context"]

OnText = Callable[[int, str], None]
"""``on_text(index, text)`` receives the next text of prompt ``index``, and an empty one when it has ended."""


@dataclass(frozen=True)
class Generated:
    """The result of a prompt.

    Attributes:
        prompt_ids: Tokens of the prompt.
        ids: Generated tokens, including the one that ended the text.
        text: Text of ``ids``, without the token that ended it and cut off before a stop text; ``None`` for a model
            without a tokenizer.
        ended_by: Reason of the end: ``"end"``, a token that ends a text; ``"stop"``, a stop text;
            ``"max_new_tokens"``; ``"context"``, the model's context is full.
    """

    prompt_ids: list[int]
    ids: list[int]
    text: str | None
    ended_by: EndReason

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The conditions that end a text.

    Attributes:
        max_new_tokens: Maximum number of generated tokens.
        stop: Stop texts, before which the text is cut off. A stop text that is a token also matches as a token.
        end_ids: Tokens that end the text; by default those that the checkpoint names.

    Raises:
        GenerationError: when a limit is invalid.
    """

    max_new_tokens: int = 128
    stop: Sequence[str] = ()
    end_ids: Collection[int] | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise GenerationError(f"max_new_tokens must be at least 1, not {self.max_new_tokens}")
        if isinstance(self.stop, str):
            raise GenerationError(f"stop is a list of texts, not a text: [{self.stop!r}]")
        if not all(self.stop):
            raise GenerationError("a stop text is empty: every text would end before it begins")


class TextGenerator:
    """A model on the tensor-parallel ranks of ``parallel``, with its tokenizer.

    Every rank creates one. Then :meth:`generate` may be called on the first rank while the others :meth:`follow`. The
    settings are those of the function ``generate``; ``dtype`` is by default that of most stored weights.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        parallel: ParallelContext,
        *,
        dtype: torch.dtype | None = None,
        add_bos: bool | None = None,
        chat_template: Path | None = None,
    ) -> None:
        self.parallel = parallel
        self.prompts = PromptEncoder(checkpoint, add_bos=add_bos, chat_template=chat_template)
        self.end_ids = end_ids(checkpoint, self.prompts.tokenizer)
        names = [entry.dtype for entry in checkpoint.manifest.parameters.values()]
        dtype = dtype or DTYPES[max(names, key=names.count)]
        self.model: DecoderModel = load_model(checkpoint, parallel, dtype=dtype).eval()

    def generate(
        self,
        prompts: Sequence[Prompt],
        limits: Limits,
        sampling: Sampling,
        batch_size: int = BATCH_SIZE,
        on_text: OnText | None = None,
    ) -> list[Generated]:
        """Generate text after each of ``prompts``, ``batch_size`` of them together.

        Raises:
            GenerationError: when the model cannot continue a prompt; see :class:`PromptEncoder`.
        """
        if limits.stop:
            self.prompts.require_tokenizer()
        sequences = [
            _Sequence(
                index, self.prompts.encode(prompt), self._end_ids(prompt, limits), self.prompts.tokenizer, limits,
                self.model.config.max_position_embeddings, sampling.generator(index), on_text,
            )
            for index, prompt in enumerate(prompts)
        ]  # fmt: skip
        for first in range(0, len(sequences), batch_size):
            batch = sequences[first : first + batch_size]
            prompt_ids = [sequence.prompt_ids for sequence in batch]
            max_length = max(min(len(seq.prompt_ids) + limits.max_new_tokens, seq.context) for seq in batch)
            broadcast_object((prompt_ids, max_length), self.parallel, axis="tp")
            active = list(batch)

            def choose_tokens(logits: Tensor) -> list[int]:
                nonlocal active
                chosen = sampling.choose(logits, [sequence.generator for sequence in active])
                next_ids = [sequence.add(token_id) for sequence, token_id in zip(active, chosen, strict=True)]
                active = [sequence for sequence in active if sequence.ended_by is None]
                return next_ids

            decode(self.model, prompt_ids, max_length, choose_tokens)
        return [sequence.generated() for sequence in sequences]

    def follow(self) -> None:
        """Compute this rank's part of what the first rank generates, until that calls :meth:`end`."""
        while (batch := broadcast_object(None, self.parallel, axis="tp")) is not None:
            prompt_ids, max_length = batch
            decode(self.model, prompt_ids, max_length, None)

    def end(self) -> None:
        """Make the other ranks return from :meth:`follow`."""
        broadcast_object(None, self.parallel, axis="tp")

    def _end_ids(self, prompt: Prompt, limits: Limits) -> frozenset[int]:
        tokenizer = self.prompts.tokenizer
        ids = self.end_ids if limits.end_ids is None else frozenset(limits.end_ids)
        if tokenizer is None or not is_conversation(prompt) or limits.end_ids is not None:
            return ids
        end_of_turn = self.prompts.template.end_of_turn
        token_id = None if end_of_turn is None else tokenizer.token_id(end_of_turn)
        return ids if token_id is None else ids | {token_id}


@dataclass
class _Sequence:
    """A prompt and the tokens generated after it so far."""

    index: int
    prompt_ids: list[int]
    ends: frozenset[int]
    tokenizer: InitVar[Tokenizer | None]
    limits: Limits
    context: int
    generator: torch.Generator
    on_text: OnText | None
    ids: list[int] = field(default_factory=list)
    ended_by: EndReason | None = None

    def __post_init__(self, tokenizer: Tokenizer | None) -> None:
        self.detokenizer = None if tokenizer is None else Detokenizer(tokenizer, self.prompt_ids, self.limits.stop)
        # A stop text may be a token that sentencepiece decodes to nothing.
        self.stop_ids = set() if tokenizer is None else {tokenizer.token_id(stop) for stop in self.limits.stop}

    def add(self, token_id: int) -> int:
        """Add a token; return it, or :data:`ENDED` if it is the last one."""
        self.ids.append(token_id)
        if token_id in self.ends:
            self.ended_by = "end"
        elif token_id in self.stop_ids:
            self.ended_by = "stop"
        else:
            self._emit(None if self.detokenizer is None else self.detokenizer.add(token_id))
            if self.detokenizer is not None and self.detokenizer.is_stopped:
                self.ended_by = "stop"
            elif len(self.ids) == self.limits.max_new_tokens:
                self.ended_by = "max_new_tokens"
            elif len(self.prompt_ids) + len(self.ids) == self.context:
                self.ended_by = "context"
        if self.ended_by is None:
            return token_id
        if self.detokenizer is not None:
            self._emit(self.detokenizer.finish())
            if self.detokenizer.is_stopped and self.ended_by != "end":
                self.ended_by = "stop"
        if self.on_text is not None:
            self.on_text(self.index, "")
        return ENDED

    def generated(self) -> Generated:
        assert self.ended_by is not None
        text = None if self.detokenizer is None else self.detokenizer.text
        return Generated(self.prompt_ids, self.ids, text, self.ended_by)

    def _emit(self, text: str | None) -> None:
        if text and self.on_text is not None:
            self.on_text(self.index, text)
