"""The decoder-only transformer: embedding, the family's layers, final norm, head."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from megacore.config import ModelConfig
from megacore.errors import LayoutError
from megacore.model.attention import Positions
from megacore.model.norms import build_norm
from megacore.parallel import (
    ParallelContext,
    ParameterSpec,
    VocabParallelEmbedding,
    VocabParallelHead,
    parameter_specs,
    vocab_parallel_logits,
)

LayerBuilder = Callable[[ModelConfig, int, ParallelContext], nn.Module]
"""``build_layer(config, layer_index, parallel)``, as a family has it."""


class Embedding(nn.Module):
    """Token embeddings; the module is there for its parameter's name."""

    def __init__(self, config: ModelConfig, parallel: ParallelContext) -> None:
        super().__init__()
        self.word_embeddings = VocabParallelEmbedding(config.vocab_size, config.hidden_size, parallel=parallel)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.word_embeddings(input_ids)


class Decoder(nn.Module):
    """The layers, named by their number in the whole model, and the final norm."""

    def __init__(self, config: ModelConfig, build_layer: LayerBuilder, parallel: ParallelContext) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({str(i): build_layer(config, i, parallel) for i in range(config.num_layers)})
        self.final_layernorm = build_norm(config, parallel)

    def forward(self, hidden: Tensor, positions: Positions) -> Tensor:
        for layer in self.layers.values():
            hidden = layer(hidden, positions)
        return self.final_layernorm(hidden)


class DecoderModel(nn.Module):
    """Token ids to logits. Built without values, on the meta device; see :func:`megacore.parallel.materialize`."""

    def __init__(self, config: ModelConfig, build_layer: LayerBuilder, parallel: ParallelContext) -> None:
        super().__init__()
        self.config = config
        self.parallel = parallel
        self.embedding = Embedding(config, parallel)
        self.decoder = Decoder(config, build_layer, parallel)
        if not config.tie_embeddings:
            self.output_layer = VocabParallelHead(config.vocab_size, config.hidden_size, parallel=parallel)

    def forward(self, input_ids: Tensor) -> Tensor:
        """``[batch, sequence]`` token ids to this rank's logits, ``[batch, sequence, local_vocab]``.

        Raises:
            LayoutError: under sequence parallelism, when the sequence is no multiple of the tensor-parallel size.
        """
        if self.parallel.sequence_parallel and input_ids.shape[1] % self.parallel.tp_size:
            raise LayoutError(
                f"a sequence of {input_ids.shape[1]} tokens cannot be cut into {self.parallel.tp_size} equal slices, "
                "which sequence parallelism needs"
            )
        hidden = self.embedding(input_ids)
        positions = Positions.of(
            self.config, input_ids.shape[1], self.parallel, device=hidden.device, dtype=hidden.dtype
        )
        hidden = self.decoder(hidden, positions)
        if self.config.tie_embeddings:
            return vocab_parallel_logits(hidden, self.embedding.word_embeddings.local("weight"), self.parallel)
        return self.output_layer(hidden)


def model_specs(config: ModelConfig, build_layer: LayerBuilder) -> dict[str, ParameterSpec]:
    """The parameters of the whole model and how each is cut, without allocating any."""
    with torch.device("meta"):
        return parameter_specs(DecoderModel(config, build_layer, ParallelContext.single()))
