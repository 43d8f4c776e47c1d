"""``generate``: prompts to text."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from megacore.errors import GenerationError
from megacore.generation.generator import BATCH_SIZE, Generated, Limits, OnText, TextGenerator, with_generator
from megacore.generation.prompts import Prompt
from megacore.generation.sampling import Sampling


def generate(
    checkpoint: Path | str,
    prompts: Prompt | Sequence[Prompt],
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    seed: int | None = None,
    stop: Sequence[str] = (),
    end_ids: Collection[int] | None = None,
    add_bos: bool | None = None,
    chat_template: Path | str | None = None,
    dtype: torch.dtype | None = None,
    tp: int | None = None,
    batch_size: int = BATCH_SIZE,
    on_text: OnText | None = None,
) -> list[Generated]:
    """Let the model of ``checkpoint`` go on from ``prompts``; each has the result that it has alone.

    Args:
        checkpoint: a native checkpoint, cut in any way.
        prompts: one or several, each a text; or token ids; or messages of a conversation (``role`` and ``content``),
            which the tokenizer's chat template writes and the assistant answers.
        max_new_tokens: after so many tokens a text ends, if nothing else has ended it.
        temperature: logits are divided by it; at 0 the most likely token is taken.
        top_k: draw from so many tokens, the most likely ones.
        top_p: draw from the most likely tokens that together have this probability.
        seed: of what is drawn; another one each time unless it is given.
        stop: texts that end the text before them.
        end_ids: tokens that end a text; by default those that the published model names, the tokenizer's end of a
            document, and for a conversation the end of the assistant's turn.
        add_bos: whether a text begins with the token for a beginning; by default as the tokenizer's files say.
        chat_template: a file to take instead of the tokenizer's own chat template.
        dtype: the model computes in; by default what its weights are stored in.
        tp: tensor-parallel size, by default the checkpoint's own; processes are started for it.
        batch_size: how many texts grow at a time.
        on_text: is told of text as it comes; a function of a module, since another process may call it.

    Raises:
        GenerationError: for a prompt or a setting that nothing can be generated from.
        MegacoreError: when the checkpoint cannot be loaded, or not at this size.
    """
    is_one = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int | Mapping))
    several: list[Any] = [prompts] if is_one else list(prompts)
    if batch_size < 1:
        raise GenerationError(f"the batch size must be at least 1, not {batch_size}")
    if not several:
        raise GenerationError("there is no prompt")
    drawn = {} if seed is None else {"seed": seed}
    return with_generator(
        checkpoint,
        TextGenerator.generate,
        several,
        Limits(max_new_tokens=max_new_tokens, stop=stop, end_ids=end_ids),
        Sampling(temperature=temperature, top_k=top_k, top_p=top_p, **drawn),
        batch_size,
        on_text,
        tp=tp,
        dtype=dtype,
        add_bos=add_bos,
        chat_template=None if chat_template is None else Path(chat_template),
    )
