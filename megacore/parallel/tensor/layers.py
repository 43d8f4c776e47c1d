"""Column- and row-parallel linear layers and the vocabulary-parallel embedding.

From Shoeybi et al., 2019, arXiv:1909.08053. A column-parallel layer splits its outputs over the ranks, a row-parallel
layer its inputs: one after the other they need a single sum over the ranks.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from megacore.parallel.context import ParallelContext
from megacore.parallel.tensor.collectives import all_reduce, gather_sequence, scatter_sequence, sum_gradients
from megacore.parallel.tensor.module import ParallelModule, ReplicatedModule
from megacore.parallel.tensor.overlap import overlapping_linear
from megacore.parallel.tensor.sharding import chunk_bounds


def enter_parallel_region(hidden: Tensor, parallel: ParallelContext) -> Tensor:
    """Make the hidden states between parallel layers the input of a parallel layer: ``[batch, sequence, hidden]``."""
    return gather_sequence(hidden, parallel) if parallel.sequence_parallel else sum_gradients(hidden, parallel)


def leave_parallel_region(partial: Tensor, parallel: ParallelContext) -> Tensor:
    """Sum the ranks' partial ``[batch, sequence, hidden]``; under sequence parallelism each keeps its slice."""
    return scatter_sequence(partial, parallel) if parallel.sequence_parallel else all_reduce(partial, parallel)


class ColumnParallelLinear(ParallelModule):
    """``y = x W^T + b`` with the outputs cut over the ranks.

    The weight is ``[*out_shape, in_features]`` and is cut along axis ``shard_dim`` of ``out_shape``; the bias is
    ``out_shape``. ``num_subunits`` and ``num_shared`` say how that axis can be cut over more ranks than it is long; see
    :class:`~megacore.parallel.ParameterSpec`. The result has this rank's outputs, flattened:
    ``[batch, sequence, local_out_features]``.

    Attributes:
        overlaps: True if the input's gradient is summed over the ranks while the weight's is computed; False for a
            backward pass that computes the two separately. See
            :func:`~megacore.parallel.tensor.overlap.overlapping_linear`.
    """

    def __init__(
        self,
        in_features: int,
        out_shape: tuple[int, ...],
        *,
        shard_dim: int,
        num_subunits: int = 1,
        num_shared: int = 0,
        bias: bool,
        parallel: ParallelContext,
    ) -> None:
        super().__init__(parallel)
        self.overlaps = True
        cut: dict[str, int] = {
            "shard_dim": shard_dim,
            "row_dims": len(out_shape),
            "num_subunits": num_subunits,
            "num_shared": num_shared,
        }
        self.declare("weight", (*out_shape, in_features), **cut)
        self.has_bias = bias
        if bias:
            self.declare("bias", out_shape, **cut)

    def forward(self, hidden: Tensor) -> Tensor:
        weight = self.local("weight").flatten(0, -2)
        bias = self.local("bias").flatten() if self.has_bias else None
        if self.overlaps:
            return overlapping_linear(hidden, weight, bias, self.parallel)
        return F.linear(enter_parallel_region(hidden, self.parallel), weight, bias)


class RowParallelLinear(ReplicatedModule):
    """``y = x W^T + b`` with the inputs cut over the ranks, and the partial results summed.

    The weight is ``[out_features, *in_shape]`` and is cut along the first axis of ``in_shape``, and, if that is
    too short, along the next one, which has ``num_subunits`` parts. The bias is not cut and is added once, after the
    sum. The input is this rank's part, flattened: ``[batch, sequence, local_in_features]``.
    """

    def __init__(
        self,
        in_shape: tuple[int, ...],
        out_features: int,
        *,
        num_subunits: int = 1,
        bias: bool,
        parallel: ParallelContext,
    ) -> None:
        super().__init__(parallel)
        self.declare("weight", (out_features, *in_shape), shard_dim=1, num_subunits=num_subunits)
        self.has_bias = bias
        if bias:
            self.declare("bias", (out_features,))

    def forward(self, inputs: Tensor) -> Tensor:
        result = leave_parallel_region(F.linear(inputs, self.local("weight").flatten(1)), self.parallel)
        return result + self.replicated("bias") if self.has_bias else result


class VocabParallelEmbedding(ParallelModule):
    """Token embeddings ``[vocab_size, hidden_size]``, the vocabulary cut over the ranks."""

    def __init__(self, vocab_size: int, hidden_size: int, *, parallel: ParallelContext) -> None:
        super().__init__(parallel)
        self.declare("weight", (vocab_size, hidden_size), shard_dim=0)
        self.first, self.last = chunk_bounds(vocab_size, parallel.tp_size, parallel.tp_rank)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Look up token ids, ``[batch, sequence]``, and return ``[batch, sequence, hidden]``."""
        # Rows are cast after the lookup, so that the many gradients of a token are summed in the dtype of the table.
        table = self.local_uncast("weight")
        if self.parallel.tp_size == 1:
            return self._to_compute_dtype(F.embedding(input_ids, table))
        elsewhere = (input_ids < self.first) | (input_ids >= self.last)
        rows = self._to_compute_dtype(F.embedding((input_ids - self.first).masked_fill(elsewhere, 0), table))
        return leave_parallel_region(rows.masked_fill(elsewhere.unsqueeze(-1), 0.0), self.parallel)


class VocabParallelHead(ParallelModule):
    """The projection to logits, ``[vocab_size, hidden_size]``, the vocabulary cut over the ranks."""

    def __init__(self, vocab_size: int, hidden_size: int, *, parallel: ParallelContext) -> None:
        super().__init__(parallel)
        self.declare("weight", (vocab_size, hidden_size), shard_dim=0)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return this rank's logits, ``[batch, sequence, local_vocab]``."""
        return vocab_parallel_logits(hidden, self.local("weight"), self.parallel)


def vocab_parallel_logits(hidden: Tensor, weight: Tensor, parallel: ParallelContext) -> Tensor:
    """Multiply ``hidden`` by this rank's rows of the head, ``weight``; for a tied head, those of the embedding."""
    return F.linear(enter_parallel_region(hidden, parallel), weight)
