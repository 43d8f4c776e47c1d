"""The decoding loop: a batch of prompts through the model, token by token, with the same steps on every rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import chain

import torch
import torch.distributed as dist
from torch import Tensor

from megacore.model import DecoderModel, KeyValueCache, Positions
from megacore.parallel import ParallelContext, chunk_bounds, vocab_parallel_logits

PROMPT_TOKENS = 8192
"""Approximate number of prompt tokens that pass the layers together, which bounds the memory of activations."""

ENDED = -1
"""Returned in place of the next token by a sequence that has ended."""

ChooseTokens = Callable[[Tensor], list[int]]
"""Maps the logits of the active sequences, ``[sequences, vocabulary]``, to their next tokens, or :data:`ENDED`."""


@torch.no_grad()
def decode(
    model: DecoderModel, prompts: Sequence[Sequence[int]], max_length: int, choose_tokens: ChooseTokens | None
) -> None:
    """Extend all ``prompts``, in one batch, until ``choose_tokens`` has ended each of them.

    All tensor-parallel ranks call this with the same prompts. The first one chooses the tokens and broadcasts them, so
    that the ranks cannot diverge.

    Args:
        model: The model, of which each rank has its part of each layer.
        prompts: Token ids, at least one for each prompt.
        max_length: Upper bound of the length of a sequence in tokens.
        choose_tokens: Chooses the next tokens, on the first rank; ``None`` on the others.

    Raises:
        PluginError: when the model's layers do not cache keys and values.
    """
    device, dtype = model.parallel.device, model.head.local("weight").dtype
    cache = KeyValueCache(model.config, model.parallel, max_length=max_length, device=device, dtype=dtype)
    logits = torch.cat([_prompt_logits(model, cache, group) for group in _grouped(prompts)])
    cache.check_used_by(model.decoder.layers)
    while True:
        next_ids = _next_ids(logits, choose_tokens, model.config.vocab_size, model.parallel)
        active = [row for row, token_id in enumerate(next_ids.tolist()) if token_id != ENDED]
        if not active:
            return
        if len(active) < len(next_ids):
            cache.select(active)
            next_ids = next_ids[active]
        logits = _last_logits(model, next_ids.unsqueeze(-1), cache.add_tokens())[:, 0]


def _grouped(prompts: Sequence[Sequence[int]]) -> Iterator[list[Sequence[int]]]:
    """Yield consecutive prompts of up to :data:`PROMPT_TOKENS` tokens together."""
    group: list[Sequence[int]] = []
    for prompt in prompts:
        if group and sum(map(len, group)) + len(prompt) > PROMPT_TOKENS:
            yield group
            group = []
        group.append(prompt)
    yield group


def _prompt_logits(model: DecoderModel, cache: KeyValueCache, prompts: list[Sequence[int]]) -> Tensor:
    """Return this rank's logits after the last token of each prompt, ``[prompts, local_vocab]``."""
    lengths = [len(prompt) for prompt in prompts]
    ids = torch.tensor([list(chain.from_iterable(prompts))], device=cache.device)
    last = torch.tensor(lengths, device=cache.device).cumsum(0) - 1
    return _last_logits(model, ids, cache.add_prompts(lengths), last)[0]


def _last_logits(model: DecoderModel, input_ids: Tensor, positions: Positions, last: Tensor | None = None) -> Tensor:
    """Return this rank's logits after all tokens, or after the tokens ``last``, ``[batch, tokens, local_vocab]``."""
    hidden = model.decoder(model.embedding(input_ids, None), positions)
    hidden = hidden if last is None else hidden[:, last]
    return vocab_parallel_logits(hidden, model.head.local("weight"), model.parallel)


def _next_ids(logits: Tensor, choose_tokens: ChooseTokens | None, vocab_size: int, parallel: ParallelContext) -> Tensor:
    """Return the tokens that the first rank chooses, on every rank: ``[sequences]``, on the device."""
    gathered = _gather_to_first_rank(logits, vocab_size, parallel)
    if gathered is None:
        next_ids = torch.empty(len(logits), dtype=torch.int64, device=parallel.device)
    else:
        assert choose_tokens is not None, "the first rank chooses the tokens"
        next_ids = torch.tensor(choose_tokens(gathered), device=parallel.device)
    if parallel.tp_mesh is not None:
        dist.broadcast(next_ids, group=parallel.tp_group, group_src=0)
    return next_ids


def _gather_to_first_rank(logits: Tensor, vocab_size: int, parallel: ParallelContext) -> Tensor | None:
    """Return the logits of the whole vocabulary, ``[sequences, vocabulary]``, on the first rank; ``None`` elsewhere."""
    if parallel.tp_mesh is None:
        return logits
    # The last parts of an uneven cut are smaller, and the collective needs equal ones.
    _, largest = chunk_bounds(vocab_size, parallel.tp_size, 0)
    padded = logits.new_zeros(len(logits), largest)
    padded[:, : logits.shape[1]] = logits
    parts = [torch.empty_like(padded) for _ in range(parallel.tp_size)] if parallel.tp_rank == 0 else None
    dist.gather(padded, parts, group=parallel.tp_group, group_dst=0)
    return None if parts is None else torch.cat(parts, dim=-1)[:, :vocab_size]
