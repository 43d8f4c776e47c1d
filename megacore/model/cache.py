"""The cache of keys and values, with which the next token costs the work of one token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from megacore.config import ModelConfig
from megacore.errors import PluginError
from megacore.model.alibi import alibi_biases, alibi_slopes
from megacore.model.kernels import attention_kernel
from megacore.model.positions import Positions, local_heads
from megacore.model.rotary import rotary_table
from megacore.parallel import ParallelContext

GROWTH = 256  # minimum number of tokens of each sequence by which the buffers grow


class KeyValueCache:
    """The keys and values of a batch of sequences, for the attention modules of a model or of this rank's part of it.

    The sequences may have any lengths; only the buffers are padded. First the prompts pass the layers, packed into a
    single row (:meth:`add_prompts`), then one token of each sequence at a time (:meth:`add_tokens`). Both methods
    return the :class:`~megacore.model.Positions` for the layers, which carry the cache to every
    :class:`~megacore.model.SelfAttention` in them.

    Attributes:
        max_length: Upper bound of the length of a sequence in tokens.
        lengths: Length of each sequence in tokens, including the tokens that pass the layers next.
    """

    def __init__(
        self,
        config: ModelConfig,
        parallel: ParallelContext,
        *,
        max_length: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.config = config
        self.parallel = parallel
        self.device = device
        self.dtype = dtype
        self.max_length = max_length
        self.lengths: list[int] = []
        self._buffers: dict[nn.Module, tuple[Tensor, Tensor]] = {}
        # The tokens that pass the layers next: their sequences, their positions, and whether they are prompts.
        self._rows = self._token_positions = torch.zeros(0, dtype=torch.int64, device=device)
        self._are_prompts = False
        if config.position_embedding == "rotary":
            self._rotary = rotary_table(config, max_length, device=device, dtype=dtype)

    def add_prompts(self, lengths: Sequence[int]) -> Positions:
        """Add sequences; return the positions of their tokens, which pass the layers next, packed into one row."""
        numbers = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
        self._are_prompts = True
        self._rows = (numbers + len(self.lengths)).to(self.device)
        self._token_positions = torch.cat([torch.arange(length) for length in lengths]).to(self.device)
        self.lengths += lengths
        segments = numbers.unsqueeze(0)
        positions = Positions.for_sequences(
            self.config, len(numbers), self.parallel, device=self.device, dtype=self.dtype, segment_numbers=segments
        )
        return replace(positions, cache=self)

    def add_tokens(self) -> Positions:
        """Add a token to every sequence; return their positions. They pass the layers next, ``[sequences, 1]``."""
        self._are_prompts = False
        self._rows = torch.arange(len(self.lengths), device=self.device)
        self._token_positions = torch.tensor(self.lengths, device=self.device)
        self.lengths = [length + 1 for length in self.lengths]
        key_positions = torch.arange(self._num_keys, device=self.device)
        future = key_positions > self._token_positions.unsqueeze(-1)
        if self.config.position_embedding == "rotary":
            cos, sin = (table[self._token_positions].unsqueeze(1) for table in self._rotary)
            mask = None
            if len(set(self.lengths)) > 1:
                mask = torch.zeros(future.shape, device=self.device, dtype=self.dtype)
                mask = mask.masked_fill(future, -torch.inf).unsqueeze(1)
            return Positions(cos=cos, sin=sin, mask=mask, cache=self)
        slopes = alibi_slopes(self.config.num_attention_heads)[slice(*local_heads(self.config, self.parallel))]
        biases = alibi_biases(slopes, self._num_keys, self.config.head_dim**-0.5, device=self.device, dtype=self.dtype)
        return Positions(mask=biases.masked_fill(future.unsqueeze(1), -torch.inf), cache=self)

    @property
    def _num_keys(self) -> int:
        """Length of the longest sequence in tokens."""
        return max(self.lengths)

    def attend(self, attention: nn.Module, query: Tensor, key: Tensor, value: Tensor, positions: Positions) -> Tensor:
        """Return the outputs of the heads of ``attention``, over the current tokens and the cached ones.

        Query, key, value and the result have the shapes of :class:`~megacore.model.kernels.AttentionKernel`. The
        rotary embedding is already applied.
        """
        keys, values = self._update(attention, key, value)
        if self._are_prompts:
            return attention_kernel()(query, key, value, positions.mask, 0.0, positions.segments)
        # The queries that share a key become the rows of a matrix, so that no key is repeated for them.
        grouped = torch.unflatten(query.squeeze(1), 1, (key.shape[2], -1))
        mask = positions.mask
        if mask is not None:
            mask = mask.unsqueeze(1) if mask.shape[1] == 1 else torch.unflatten(mask, 1, grouped.shape[1:3])
        attended = F.scaled_dot_product_attention(
            grouped, keys[:, :, : self._num_keys], values[:, :, : self._num_keys], attn_mask=mask
        )
        return attended.flatten(1, 2).unsqueeze(1)

    def select(self, rows: Sequence[int]) -> None:
        """Keep only the sequences with these numbers, and renumber them."""
        chosen = torch.tensor(rows, dtype=torch.int64, device=self.device)
        self.lengths = [self.lengths[row] for row in rows]
        self._buffers = {module: (keys[chosen], values[chosen]) for module, (keys, values) in self._buffers.items()}

    def check_used_by(self, layers: nn.ModuleDict) -> None:
        """Check that each of ``layers`` has cached the keys and values of the prompts.

        Raises:
            PluginError: names the first layer that has not.
        """
        for number, layer in layers.items():
            if not any(module in self._buffers for module in layer.modules()):
                raise PluginError(
                    f"layer {number} of {self.config.family} does not cache keys and values: generation needs "
                    "megacore's SelfAttention, or an attention that calls positions.cache.attend, and the plugin has "
                    "neither. Export the model and generate with another program"
                )

    def _update(self, attention: nn.Module, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Cache the current keys and values; return all cached ones, ``[sequences, kv_heads, positions, head_dim]``."""
        buffers = self._buffers.get(attention)
        if buffers is None or buffers[0].shape[0] < len(self.lengths) or buffers[0].shape[2] < self._num_keys:
            buffers = self._resized(buffers, key), self._resized(buffers and buffers[1:], value)
            self._buffers[attention] = buffers
        for buffer, new in zip(buffers, (key, value), strict=True):
            buffer[self._rows, :, self._token_positions] = new.flatten(0, 1)
        return buffers

    def _resized(self, buffers: tuple[Tensor, ...] | None, new: Tensor) -> Tensor:
        """Return the first of ``buffers`` with room for all sequences; the spare room is a constant share of it."""
        room = self._num_keys + max(GROWTH, self._num_keys // 2)
        capacity = max(min(room, self.max_length), 0 if buffers is None else buffers[0].shape[2])
        resized = new.new_zeros(len(self.lengths), new.shape[2], capacity, new.shape[3])
        if buffers is not None:
            rows, _, old_capacity, _ = buffers[0].shape
            resized[:rows, :, :old_capacity] = buffers[0]
        return resized
