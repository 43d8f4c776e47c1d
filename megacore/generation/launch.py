"""``generate``, the public call: loads a checkpoint on as many processes as needed and generates text."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch

from megacore.checkpoint import Checkpoint
from megacore.errors import GenerationError
from megacore.generation.prompts import Prompt
from megacore.generation.sampling import Sampling
from megacore.generation.text_generator import BATCH_SIZE, Generated, Limits, OnText, TextGenerator
from megacore.parallel import ParallelContext, ParallelSizes, check_tensor_parallel, run_on_ranks
from megacore.parallel.launch.launcher import HALF_AN_HOUR
from megacore.plugins import get_family

Result = TypeVar("Result")


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
    """Generate text after each of ``prompts``. A result does not depend on the other prompts.

    Args:
        checkpoint: Native checkpoint of any layout.
        prompts: One prompt or several. A prompt is a text; or token ids; or the messages of a conversation (``role``
            and ``content``), to which the tokenizer's chat template is applied and the assistant's answer generated.
        max_new_tokens: Maximum number of tokens to generate for each prompt.
        temperature: Sampling temperature, which divides the logits; 0 is greedy decoding.
        top_k: Number of most likely tokens to sample from.
        top_p: Probability mass of the most likely tokens to sample from (nucleus sampling).
        seed: Random seed for sampling; by default a new one each time.
        stop: Stop texts; the text ends before the first one.
        end_ids: Tokens that end a text; by default those that the published model names, the tokenizer's end of a
            document, and for a conversation the end of the assistant's turn.
        add_bos: True to prepend the BOS token to a text; by default as the tokenizer's files say.
        chat_template: File with a chat template that replaces the tokenizer's.
        dtype: Dtype that the model computes in; by default that of the stored weights.
        tp: Tensor-parallel size, by default the checkpoint's own; processes are started for it.
        batch_size: Number of texts that are generated together.
        on_text: Receives text as it is generated. A function of a module, since another process may call it.

    Raises:
        GenerationError: when a prompt or a setting is invalid.
        MegacoreError: when the checkpoint cannot be loaded, or not at this size.
    """
    if batch_size < 1:
        raise GenerationError(f"the batch size must be at least 1, not {batch_size}")
    if not isinstance(prompts, str) and len(prompts) == 0:
        raise GenerationError("there is no prompt")
    is_single = isinstance(prompts, str) or isinstance(prompts[0], int | Mapping)
    seeded = {} if seed is None else {"seed": seed}
    return run_with_generator(
        checkpoint,
        TextGenerator.generate,
        [prompts] if is_single else list(prompts),
        Limits(max_new_tokens=max_new_tokens, stop=stop, end_ids=end_ids),
        Sampling(temperature=temperature, top_k=top_k, top_p=top_p, **seeded),
        batch_size,
        on_text,
        tp=tp,
        dtype=dtype,
        add_bos=add_bos,
        chat_template=None if chat_template is None else Path(chat_template),
    )


def run_with_generator(
    checkpoint: Path | str,
    function: Callable[..., Result],
    *arguments: Any,
    tp: int | None = None,
    timeout: timedelta = HALF_AN_HOUR,
    **settings: Any,
) -> Result:
    """Load the model of ``checkpoint``; return ``function(generator, *arguments)``, called on the first rank.

    ``function`` is one of a module, since another process calls it, and the other ranks wait up to ``timeout`` for it
    to generate something. ``settings`` are those of :class:`TextGenerator`; see :func:`generate` for the rest.
    """
    opened = Checkpoint(checkpoint)
    get_family(opened.manifest.family)  # a missing plugin is better reported before processes are started
    tp = tp or opened.manifest.layout.tp
    check_tensor_parallel(opened.manifest.specs, tp)
    result: Result = run_on_ranks(
        generate_on_rank, opened.path, settings, function, arguments, sizes=ParallelSizes(tp=tp), timeout=timeout
    )
    return result


def generate_on_rank(
    parallel: ParallelContext,
    checkpoint_path: Path,
    settings: dict[str, Any],
    function: Callable[..., Result],
    arguments: tuple[Any, ...],
) -> Result | None:
    """Run :func:`run_with_generator` on one rank; return the result on the first one."""
    generator = TextGenerator(Checkpoint(checkpoint_path), parallel, **settings)
    if parallel.tp_rank > 0:
        generator.follow()
        return None
    result = function(generator, *arguments)
    generator.end()
    return result
