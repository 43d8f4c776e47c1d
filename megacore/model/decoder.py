"""The decoder-only transformer: embedding, the family's layers, final norm, head; all of it or one pipeline stage."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megacore.config import ModelConfig
from megacore.errors import LayoutError
from megacore.model.dropout import HiddenDropout
from megacore.model.norms import build_norm
from megacore.model.positions import Positions
from megacore.parallel import (
    ParallelContext,
    ParallelModule,
    ParameterSpec,
    Stage,
    VocabParallelEmbedding,
    VocabParallelHead,
    linear_cross_entropy,
    parameter_specs,
    token_scores,
    vocab_parallel_logits,
)

LayerBuilder = Callable[[ModelConfig, int, ParallelContext], nn.Module]
"""``build_layer(config, layer_index, parallel)``, the hook of a family."""


class Embedding(nn.Module):
    """Token embeddings, followed by dropout."""

    def __init__(self, config: ModelConfig, parallel: ParallelContext) -> None:
        super().__init__()
        self.word_embeddings = VocabParallelEmbedding(config.vocab_size, config.hidden_size, parallel=parallel)
        self.hidden_dropout = HiddenDropout(parallel)

    def forward(self, input_ids: Tensor, sample_ids: Tensor | None) -> Tensor:
        hidden: Tensor = self.hidden_dropout(self.word_embeddings(input_ids), sample_ids)
        return hidden


class Decoder(nn.Module):
    """The layers of a stage, named by their number in the whole model, and on the last stage the final norm.

    Attributes:
        recompute_layers: Number of consecutive layers that keep only their common input and are recomputed in the
            backward pass (Chen et al., 2016, arXiv:1604.06174); 0 for none.
    """

    def __init__(self, config: ModelConfig, build_layer: LayerBuilder, parallel: ParallelContext, stage: Stage) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({str(i): build_layer(config, i, parallel) for i in stage.layers})
        if stage.is_last:
            self.final_layernorm = build_norm(config, parallel)
        self.is_last = stage.is_last
        self.recompute_layers = 0

    def forward(self, hidden: Tensor, positions: Positions) -> Tensor:
        layers = list(self.layers.values())
        if self.recompute_layers and torch.is_grad_enabled():
            for first in range(0, len(layers), self.recompute_layers):
                block = layers[first : first + self.recompute_layers]
                # Dropout draws its masks from its own seeds, so no generator state has to be restored.
                hidden = checkpoint(_run, block, hidden, positions, use_reentrant=False, preserve_rng_state=False)
        else:
            hidden = _run(layers, hidden, positions)
        return self.final_layernorm(hidden) if self.is_last else hidden


def _run(layers: list[nn.Module], hidden: Tensor, positions: Positions) -> Tensor:
    for layer in layers:
        hidden = layer(hidden, positions)
    return hidden


class DecoderModel(nn.Module):
    """A model from token ids to logits or to a loss, or one pipeline stage of it.

    It is built without values, on the meta device; see :func:`megacore.parallel.materialize`. Stages have the parameter
    names of the whole model. With tied embeddings the last stage has a copy of the embedding under its name.
    """

    def __init__(
        self,
        config: ModelConfig,
        build_layer: LayerBuilder,
        parallel: ParallelContext,
        stage: Stage | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.parallel = parallel
        self.stage = stage = stage or Stage.whole(config.num_layers)
        if stage.is_first or (stage.is_last and config.tie_embeddings):
            self.embedding = Embedding(config, parallel)
        self.decoder = Decoder(config, build_layer, parallel, stage)
        if stage.is_last and not config.tie_embeddings:
            self.output_layer = VocabParallelHead(config.vocab_size, config.hidden_size, parallel=parallel)

    def forward(
        self,
        inputs: Tensor,
        *,
        targets: Tensor | None = None,
        token_weights: Tensor | None = None,
        segments: Tensor | None = None,
        sample_ids: Tensor | None = None,
    ) -> Tensor:
        """Run this stage.

        Args:
            inputs: Token ids, ``[batch, sequence]``, on the first stage; otherwise the output of the previous stage.
            targets: Target token ids, ``[batch, sequence]``, with which the last stage returns the loss or the scores
                instead of logits.
            token_weights: Weights of the targets in the loss; see :func:`megacore.parallel.linear_cross_entropy`.
                Without weights the last stage returns scores; see :func:`megacore.parallel.token_scores`.
            segments: Number of each token's segment, ``[batch, sequence]``, on the CPU. Tokens attend within their
                segment, whose positions start at 0. ``None`` if each row is one segment.
            sample_ids: Numbers of the samples, ``[batch]``, on the CPU, for dropout; ``None`` without dropout.

        Returns:
            The last stage returns this rank's logits, ``[batch, sequence, local_vocab]``, or the loss, ``[1]``, or the
            scores, ``[batch, sequence, 2]``. Other stages return hidden states, ``[batch, sequence, hidden]``, under
            sequence parallelism this rank's slice of the sequence.

        Raises:
            LayoutError: under sequence parallelism, when the sequence is not a multiple of the tensor-parallel size.
        """
        parallel = self.parallel
        sequence_length = inputs.shape[1]
        if self.stage.is_first:
            if parallel.sequence_parallel and sequence_length % parallel.tp_size:
                raise LayoutError(
                    f"a sequence of {sequence_length} tokens cannot be cut into {parallel.tp_size} equal slices, "
                    "which sequence parallelism requires"
                )
            hidden: Tensor = self.embedding(inputs, sample_ids)
        else:
            hidden = inputs
            sequence_length *= parallel.tp_size if parallel.sequence_parallel else 1
        positions = Positions.for_sequences(
            self.config,
            sequence_length,
            parallel,
            device=hidden.device,
            dtype=hidden.dtype,
            segment_numbers=segments,
            sample_ids=sample_ids,
        )
        hidden = self.decoder(hidden, positions)
        if not self.stage.is_last:
            return hidden
        if targets is None:
            return vocab_parallel_logits(hidden, self.head.local("weight"), parallel)
        weight, vocab_size = self.head.local_uncast("weight"), self.config.vocab_size
        if token_weights is None:
            return token_scores(hidden, weight, targets, vocab_size=vocab_size, parallel=parallel)
        return linear_cross_entropy(hidden, weight, targets, token_weights, vocab_size=vocab_size, parallel=parallel)

    @property
    def head(self) -> ParallelModule:
        """The module whose weight, ``[local_vocab, hidden]``, is the projection to logits."""
        return self.embedding.word_embeddings if self.config.tie_embeddings else self.output_layer

    def own_parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters by name, without the last stage's copy of a tied embedding."""
        return {
            name: parameter
            for name, parameter in self.named_parameters()
            if self.stage.is_first or not name.startswith("embedding.")
        }


def model_specs(config: ModelConfig, build_layer: LayerBuilder) -> dict[str, ParameterSpec]:
    """Return the shape and cut of all parameters of the whole model, without allocating any."""
    with torch.device("meta"):
        return parameter_specs(DecoderModel(config, build_layer, ParallelContext.single()))
