"""Tokens after tokens: a batch of prompts through the model, on every rank in the same steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megacore.model import DecoderModel, KeyValueCache, Positions
from megacore.parallel import ParallelContext, chunk_bounds, vocab_parallel_logits

PROMPT_TOKENS = 8192
"""Prompts pass the layers together up to about so many tokens, which bounds the memory of activations."""

ENDED = -1
"""Stands for the next token of a sequence that has none."""

Chooser = Callable[[Tensor], list[int]]
"""Given the logits of sequences that go on, ``[sequences, vocabulary]``, says their next tokens, or :data:`ENDED`."""


@torch.no_grad()
def decode(model: DecoderModel, prompts: Sequence[Sequence[int]], longest: int, choose: Chooser | None) -> None:
    """Let each of ``prompts`` grow, all in one batch, until ``choose`` has ended every one.

    All tensor-parallel ranks call this with the same prompts. The first one chooses, the others follow, so that they
    cannot come to differ.

    Args:
        model: the whole model, or this rank's part of each layer.
        prompts: token ids, at least one each, of any lengths.
        longest: the number of tokens that no sequence exceeds.
        choose: on the first rank.

    Raises:
        PluginError: when the model's layers keep no keys and values.
    """
    embeddings = model.head.local("weight")
    cache = KeyValueCache(
        model.config, model.parallel, longest=longest, device=model.parallel.device, dtype=embeddings.dtype
    )
    logits = torch.cat([_prompt_logits(model, cache, group) for group in _groups(prompts)])
    cache.check_used_by(model)
    while True:
        next_ids = _agreed(logits, choose, model.config.vocab_size, model.parallel)
        going_on = [row for row, token_id in enumerate(next_ids.tolist()) if token_id != ENDED]
        if not going_on:
            return
        if len(going_on) < len(next_ids):
            cache.keep(going_on)
            next_ids = next_ids[going_on]
        positions = cache.step()
        logits = _last_logits(model, next_ids.unsqueeze(-1), positions)[:, 0]


def _groups(prompts: Sequence[Sequence[int]]) -> Iterator[list[Sequence[int]]]:
    group: list[Sequence[int]] = []
    for prompt in prompts:
        if group and sum(map(len, group)) + len(prompt) > PROMPT_TOKENS:
            yield group
            group = []
        group.append(prompt)
    yield group


def _prompt_logits(model: DecoderModel, cache: KeyValueCache, prompts: list[Sequence[int]]) -> Tensor:
    """This rank's logits after the last token of each prompt, ``[prompts, local_vocab]``."""
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    ids = torch.cat([torch.tensor(prompt) for prompt in prompts]).to(cache.device)
    last = (lengths.cumsum(0) - 1).to(cache.device)
    return _last_logits(model, ids.unsqueeze(0), cache.prompts(lengths.tolist()), last)[0]


def _last_logits(model: DecoderModel, input_ids: Tensor, positions: Positions, last: Tensor | None = None) -> Tensor:
    """This rank's logits of all tokens, or of those at the places ``last``: ``[batch, places, local_vocab]``."""
    hidden = model.decoder(model.embedding(input_ids, None), positions)
    if last is not None:
        hidden = hidden[:, last]
    return vocab_parallel_logits(hidden, model.head.local("weight"), model.parallel)


def _agreed(logits: Tensor, choose: Chooser | None, vocab_size: int, parallel: ParallelContext) -> Tensor:
    """What the first rank chooses, on every rank: ``[sequences]``, on the device."""
    gathered = _at_first_rank(logits, vocab_size, parallel)
    if gathered is None:
        next_ids = torch.empty(len(logits), dtype=torch.int64, device=parallel.device)
    else:
        assert choose is not None, "the first rank chooses"
        next_ids = torch.tensor(choose(gathered), device=parallel.device)
    if parallel.tp_mesh is not None:
        dist.broadcast(next_ids, group=parallel.tp_group, group_src=0)
    return next_ids


def _at_first_rank(logits: Tensor, vocab_size: int, parallel: ParallelContext) -> Tensor | None:
    """The logits of the whole vocabulary, ``[sequences, vocabulary]``; ``None`` on other ranks than the first."""
    if parallel.tp_mesh is None:
        return logits
    # As torch.chunk cuts, the last parts may be shorter: a collective wants equal ones.
    _, largest = chunk_bounds(vocab_size, parallel.tp_size, 0)
    own = logits.new_zeros(len(logits), largest)
    own[:, : logits.shape[1]] = logits
    parts = [torch.empty_like(own) for _ in range(parallel.tp_size)] if parallel.tp_rank == 0 else None
    dist.gather(own, parts, group=parallel.tp_group, group_dst=0)
    return None if parts is None else torch.cat(parts, dim=-1)[:, :vocab_size]
