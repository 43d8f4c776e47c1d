"""The table of attention kernels: what computes the heads' outputs, and what each asks for."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F  # noqa: N812

AttentionKernel = Callable[[Tensor, Tensor, Tensor, Tensor | None, float], Tensor]
"""``kernel(query, key, value, mask, dropout)``.

All of ``[batch, sequence, heads, head_dim]``; the mask is what is added to the scores, ``[heads, sequence, sequence]``,
or ``None`` for attention that is causal and nothing else.
"""


def attention_kernel() -> AttentionKernel:
    return _sdpa


def _sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    attended = F.scaled_dot_product_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=mask is None,
        enable_gqa=True,
    )
    return attended.transpose(1, 2)
