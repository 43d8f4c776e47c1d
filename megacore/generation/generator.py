"""A model that goes on from prompts: loaded once, on one process or cut over several."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from megacore.checkpoint import Checkpoint
from megacore.checkpoint.safetensors_file import DTYPES
from megacore.data import Tokenizer
from megacore.errors import GenerationError
from megacore.generation.decoding import ENDED, decode
from megacore.generation.prompts import Prompt, PromptReader, end_ids, is_conversation
from megacore.generation.sampling import Sampling
from megacore.generation.text import TextStream
from megacore.model import DecoderModel, load_model
from megacore.parallel import ParallelContext, ParallelSizes, broadcast_object, check_tensor_parallel, run_on_ranks
from megacore.parallel.launch.launcher import HALF_AN_HOUR
from megacore.plugins import get_family

BATCH_SIZE = 32

OnText = Callable[[int, str], None]
"""``on_text(index, text)``: is told of further text of prompt ``index``, and of an empty one when it has ended."""


@dataclass(frozen=True)
class Generated:
    """What follows a prompt.

    Attributes:
        prompt_ids: the prompt in tokens.
        ids: the tokens that follow, with the one that ended them.
        text: of ``ids``, without the token that ended them, cut off before a stop text; ``None`` for a model without
            a tokenizer.
        ended_by: ``"end"``, a token that ends a text; ``"stop"``, a stop text; ``"max_new_tokens"``; ``"context"``, of
            the model, which is full.
    """

    prompt_ids: list[int]
    ids: list[int]
    text: str | None
    ended_by: Literal["end", "stop", "max_new_tokens", "context"]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """When a text ends.

    Attributes:
        max_new_tokens: after so many tokens.
        stop: texts before which it is cut off. One that is a token of the tokenizer's is found as that, too.
        end_ids: tokens that end it; by default those that the checkpoint names.

    Raises:
        GenerationError: for limits that mean nothing.
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
    """A model on the ranks of ``parallel``, with its tokenizer.

    Every rank makes one; then the first one's :meth:`generate` may be called, while the others :meth:`follow`.

    Args:
        checkpoint: what to load.
        parallel: over whose tensor-parallel ranks.
        dtype: what the model computes in; by default what most of the weights are stored in.
        add_bos: see :class:`~megacore.generation.prompts.PromptReader`.
        chat_template: likewise.
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
        self.prompts = PromptReader(checkpoint, add_bos=add_bos, chat_template=chat_template)
        self.end_ids = end_ids(checkpoint, self.prompts.tokenizer)
        self.model: DecoderModel = load_model(checkpoint, parallel, dtype=dtype or stored_dtype(checkpoint)).eval()

    def generate(
        self,
        prompts: Sequence[Prompt],
        limits: Limits,
        sampling: Sampling,
        batch_size: int = BATCH_SIZE,
        on_text: OnText | None = None,
    ) -> list[Generated]:
        """What follows each of ``prompts``; ``batch_size`` of them grow at a time.

        Raises:
            GenerationError: for a prompt that the model cannot go on from; see :class:`PromptReader`.
        """
        if limits.stop:
            self.prompts.require_tokenizer()
        read = [(self.prompts.read(prompt), self._end_ids(prompt, limits)) for prompt in prompts]
        texts = [
            _Text(
                index, ids, ends, self.prompts.tokenizer, limits, self.model.config.max_position_embeddings,
                sampling.generator(index), on_text,
            )
            for index, (ids, ends) in enumerate(read)
        ]  # fmt: skip
        for first in range(0, len(texts), batch_size):
            batch = texts[first : first + batch_size]
            longest = max(min(len(text.prompt_ids) + limits.max_new_tokens, text.context) for text in batch)
            broadcast_object(([text.prompt_ids for text in batch], longest), self.parallel, axis="tp")
            growing = list(batch)

            def choose(logits: Tensor) -> list[int]:
                nonlocal growing
                chosen = sampling.choose(logits, [text.generator for text in growing])
                next_ids = [text.add(token_id) for text, token_id in zip(growing, chosen, strict=True)]
                growing = [text for text in growing if text.ended_by is None]
                return next_ids

            decode(self.model, [text.prompt_ids for text in batch], longest, choose)
        return [text.generated() for text in texts]

    def follow(self) -> None:
        """Take part in what the first rank generates, until it calls :meth:`end`."""
        while (told := broadcast_object(None, self.parallel, axis="tp")) is not None:
            prompts, longest = told
            decode(self.model, prompts, longest, None)

    def end(self) -> None:
        """Let the other ranks return from :meth:`follow`."""
        broadcast_object(None, self.parallel, axis="tp")

    def _end_ids(self, prompt: Prompt, limits: Limits) -> frozenset[int]:
        tokenizer = self.prompts.tokenizer
        ids = self.end_ids if limits.end_ids is None else frozenset(limits.end_ids)
        if tokenizer is None or not is_conversation(prompt) or limits.end_ids is not None:
            return ids
        end_of_turn = self.prompts.require_template().end_of_turn
        token_id = None if end_of_turn is None else tokenizer.token_id(end_of_turn)
        return ids if token_id is None else ids | {token_id}


class _Text:
    """What has followed a prompt so far."""

    def __init__(
        self,
        index: int,
        prompt_ids: list[int],
        ends: frozenset[int],
        tokenizer: Tokenizer | None,
        limits: Limits,
        context: int,
        generator: torch.Generator,
        on_text: OnText | None,
    ) -> None:
        self.prompt_ids = prompt_ids
        self.context = context
        self.generator = generator
        self.ended_by: Literal["end", "stop", "max_new_tokens", "context"] | None = None
        self._index = index
        self._ids: list[int] = []
        self._ends = ends
        self._limits = limits
        self._on_text = on_text
        self._stream = None if tokenizer is None else TextStream(tokenizer, prompt_ids, limits.stop)
        # A token that sentencepiece writes as nothing is not in the text.
        known = [] if tokenizer is None else [tokenizer.token_id(stop) for stop in limits.stop]
        self._stop_ids = frozenset(token_id for token_id in known if token_id is not None)

    def add(self, token_id: int) -> int:
        """Take a further token; return it, or :data:`ENDED` where none is to follow."""
        self._ids.append(token_id)
        if token_id in self._ends:
            self.ended_by = "end"
        elif token_id in self._stop_ids:
            self.ended_by = "stop"
        else:
            self._tell(None if self._stream is None else self._stream.add(token_id))
            if self._stream is not None and self._stream.is_stopped:
                self.ended_by = "stop"
            elif len(self._ids) == self._limits.max_new_tokens:
                self.ended_by = "max_new_tokens"
            elif len(self.prompt_ids) + len(self._ids) == self.context:
                self.ended_by = "context"
        if self.ended_by is None:
            return token_id
        if self._stream is not None:
            self._tell(self._stream.finish())
            if self._stream.is_stopped and self.ended_by != "end":
                self.ended_by = "stop"
        if self._on_text is not None:
            self._on_text(self._index, "")
        return ENDED

    def generated(self) -> Generated:
        assert self.ended_by is not None
        text = None if self._stream is None else self._stream.text
        return Generated(self.prompt_ids, self._ids, text, self.ended_by)

    def _tell(self, text: str | None) -> None:
        if text and self._on_text is not None:
            self._on_text(self._index, text)


def stored_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """What most parameters of a checkpoint are stored in."""
    names = [entry.dtype for entry in checkpoint.manifest.parameters.values()]
    return DTYPES[max(names, key=names.count)]


def with_generator(
    checkpoint: Path | str,
    work: Callable[..., Any],
    *arguments: Any,
    tp: int | None = None,
    timeout: timedelta = HALF_AN_HOUR,
    **settings: Any,
) -> Any:
    """Load the model of ``checkpoint`` and return what ``work(generator, *arguments)`` returns on the first rank.

    Args:
        checkpoint: a native checkpoint, cut in any way.
        work: a function of a module, since another process calls it.
        arguments: for it.
        tp: tensor-parallel size, by default the checkpoint's own; processes are started for it.
        timeout: how long the other ranks wait for ``work`` to generate something.
        settings: of :class:`TextGenerator`.
    """
    opened = Checkpoint(checkpoint)
    get_family(opened.manifest.family)  # a missing plugin is better reported before processes are started
    tp = tp or opened.manifest.layout.tp
    check_tensor_parallel(opened.manifest.specs, tp)
    sizes = ParallelSizes(tp=tp)
    return run_on_ranks(work_on_rank, opened.path, settings, work, arguments, sizes=sizes, timeout=timeout)


def work_on_rank(
    parallel: ParallelContext,
    checkpoint_path: Path,
    settings: dict[str, Any],
    work: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> Any:
    """What :func:`with_generator` runs on every rank."""
    generator = TextGenerator(Checkpoint(checkpoint_path), parallel, **settings)
    if parallel.tp_rank > 0:
        generator.follow()
        return None
    result = work(generator, *arguments)
    generator.end()
    return result
