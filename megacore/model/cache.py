"""The keys and values of the tokens that came before, so that a next token costs one token's work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from megacore.config import ModelConfig
from megacore.errors import PluginError
from megacore.model.alibi import alibi_biases, alibi_slopes
from megacore.model.attention import Positions, local_heads
from megacore.model.kernels import attention_kernel
from megacore.model.rotary import rotary_table
from megacore.parallel import ParallelContext

if TYPE_CHECKING:
    from megacore.model.decoder import DecoderModel

GROWTH = 256
"""By how many tokens of every sequence the buffers grow at least."""


class KeyValueCache:
    """What the attentions of a model, or of this rank's part of it, keep of a batch of sequences.

    The sequences may be of any lengths: nothing is padded but the buffers, which nobody sees. First come the prompts,
    packed one behind the other into a single row (:meth:`prompts`); then a token of each sequence at a time
    (:meth:`step`). Both return the :class:`~megacore.model.Positions` for the layers, which carry the cache to every
    :class:`~megacore.model.SelfAttention` in them.

    Args:
        config: of the model.
        parallel: whose rank's heads are kept.
        longest: the number of tokens that no sequence will exceed.
        device: of the model.
        dtype: that it computes in.

    Attributes:
        lengths: tokens of each sequence, those that pass the layers next included.
    """

    def __init__(
        self, config: ModelConfig, parallel: ParallelContext, *, longest: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.config = config
        self.parallel = parallel
        self.device = device
        self.dtype = dtype
        self.longest = longest
        self.lengths: list[int] = []
        self._buffers: dict[nn.Module, tuple[Tensor, Tensor]] = {}
        # Of the tokens that pass the layers next: their sequences, their positions, and whether they are prompts.
        self._rows = self._places = torch.zeros(0, dtype=torch.int64, device=device)
        self._are_prompts = False
        if config.position_embedding == "rotary":
            self._rotary = rotary_table(config, longest, device=device, dtype=dtype)

    def prompts(self, lengths: Sequence[int]) -> Positions:
        """Let further sequences begin; their tokens, packed into one row, are to pass the layers next."""
        numbers = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
        self._are_prompts = True
        self._rows = (numbers + len(self.lengths)).to(self.device)
        self._places = torch.cat([torch.arange(length) for length in lengths]).to(self.device)
        self.lengths += lengths
        positions = Positions.of(
            self.config,
            len(numbers),
            self.parallel,
            device=self.device,
            dtype=self.dtype,
            segment_numbers=numbers.unsqueeze(0),
        )
        return replace(positions, cache=self)

    def step(self) -> Positions:
        """Let every sequence grow by a token; these tokens, ``[sequences, 1]``, are to pass the layers next."""
        self._are_prompts = False
        self._rows = torch.arange(len(self.lengths), device=self.device)
        self._places = torch.tensor(self.lengths, device=self.device)
        self.lengths = [length + 1 for length in self.lengths]
        places = torch.arange(self._num_places, device=self.device)
        future = places > self._places.unsqueeze(-1)
        if self.config.position_embedding == "rotary":
            cos, sin = (table[self._places].unsqueeze(1) for table in self._rotary)
            mask = None
            if len(set(self.lengths)) > 1:
                mask = torch.zeros(future.shape, device=self.device, dtype=self.dtype)
                mask = mask.masked_fill(future, -torch.inf).unsqueeze(1)
            return Positions(cos=cos, sin=sin, mask=mask, cache=self)
        first, last = local_heads(self.config, self.parallel)
        slopes = alibi_slopes(self.config.num_attention_heads)[first:last]
        biases = alibi_biases(
            slopes, self._num_places, self.config.head_dim**-0.5, device=self.device, dtype=self.dtype
        )
        return Positions(mask=biases.masked_fill(future.unsqueeze(1), -torch.inf), cache=self)

    @property
    def _num_places(self) -> int:
        """The tokens of the longest sequence."""
        return max(self.lengths)

    def attend(self, attention: nn.Module, query: Tensor, key: Tensor, value: Tensor, positions: Positions) -> Tensor:
        """What the heads of ``attention`` attend to, among the tokens that pass now and those that came before.

        Query, key, value and the result are as :class:`~megacore.model.kernels.AttentionKernel` has them, keys turned
        to their positions already.
        """
        keys, values = self._kept(attention, key, value)
        if self._are_prompts:
            return attention_kernel()(query, key, value, positions.mask, 0.0, positions.segments)
        # The queries that share a key are the rows of a matrix, so that no key is repeated for them.
        grouped = query.squeeze(1).unflatten(1, (key.shape[2], -1))
        mask = positions.mask
        if mask is not None:
            mask = mask.unsqueeze(1) if mask.shape[1] == 1 else mask.unflatten(1, grouped.shape[1:3])
        attended = F.scaled_dot_product_attention(
            grouped, keys[:, :, : self._num_places], values[:, :, : self._num_places], attn_mask=mask
        )
        return attended.flatten(1, 2).unsqueeze(1)

    def keep(self, rows: Sequence[int]) -> None:
        """Forget all sequences but those of these numbers, which are counted anew."""
        chosen = torch.tensor(rows, dtype=torch.int64, device=self.device)
        self.lengths = [self.lengths[row] for row in rows]
        self._buffers = {
            attention: (keys[chosen], values[chosen]) for attention, (keys, values) in self._buffers.items()
        }

    def check_used_by(self, model: DecoderModel) -> None:
        """Refuse layers that the prompts have passed without leaving anything here.

        Raises:
            PluginError: names the first of them.
        """
        for number, layer in model.decoder.layers.items():
            if not any(module in self._buffers for module in layer.modules()):
                raise PluginError(
                    f"layer {number} of {self.config.family} keeps no keys and values: text is generated with "
                    "megacore's SelfAttention, or with an attention that calls positions.cache.attend, and its plugin "
                    "has neither. Export the model and generate with another program"
                )

    def _kept(self, attention: nn.Module, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keep what passes ``attention`` now; return all that is kept, ``[sequences, kv_heads, places, head_dim]``."""
        buffers = self._buffers.get(attention)
        if buffers is None or buffers[0].shape[0] < len(self.lengths) or buffers[0].shape[2] < self._num_places:
            buffers = self._grown(buffers, key), self._grown(buffers and buffers[1:], value)
            self._buffers[attention] = buffers
        for buffer, new in zip(buffers, (key, value), strict=True):
            buffer[self._rows, :, self._places] = new.flatten(0, 1)
        return buffers

    def _grown(self, buffers: tuple[Tensor, ...] | None, new: Tensor) -> Tensor:
        """The first of ``buffers`` with room for the present lengths and some more, in at most a constant share."""
        room = self._num_places + max(GROWTH, self._num_places // 2)
        places = max(min(room, self.longest), 0 if buffers is None else buffers[0].shape[2])
        grown = new.new_zeros(len(self.lengths), new.shape[2], places, new.shape[3])
        if buffers is not None:
            rows, _, old_places, _ = buffers[0].shape
            grown[:rows, :, :old_places] = buffers[0]
        return grown
