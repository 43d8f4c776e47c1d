"""The decoder-only transformer: embedding, the family's layers, final norm, head; all of it or one pipeline stage."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megacore.config import ModelConfig
from megacore.errors import LayoutError
from megacore.model.attention import Positions
from megacore.model.dropout import HiddenDropout
from megacore.model.norms import build_norm
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
"""``build_layer(config, layer_index, parallel)``, as a family has it."""


class Embedding(nn.Module):
    """Token embeddings."""

    def __init__(self, config: ModelConfig, parallel: ParallelContext) -> None:
        super().__init__()
        self.word_embeddings = VocabParallelEmbedding(config.vocab_size, config.hidden_size, parallel=parallel)
        self.hidden_dropout = HiddenDropout(parallel)

    def forward(self, input_ids: Tensor, sample_ids: Tensor | None) -> Tensor:
        return self.hidden_dropout(self.word_embeddings(input_ids), sample_ids)


class Decoder(nn.Module):
    """The layers of a stage, named by their number in the whole model, and on the last stage the final norm.

    Attributes:
        recompute_layers: how many layers at a time keep nothing but their input and are computed again in the backward
            pass (Chen et al., 2016, arXiv:1604.06174); 0 for none.
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
                # Dropout draws its masks from seeds of its own, so that no state of a generator has to be put back.
                hidden = checkpoint(_through, block, hidden, positions, use_reentrant=False, preserve_rng_state=False)
        else:
            hidden = _through(layers, hidden, positions)
        return self.final_layernorm(hidden) if self.is_last else hidden


def _through(layers: list[nn.Module], hidden: Tensor, positions: Positions) -> Tensor:
    for layer in layers:
        hidden = layer(hidden, positions)
    return hidden


class DecoderModel(nn.Module):
    """Token ids to logits or to a loss, or the part of that way that one pipeline stage goes.

    Built without values, on the meta device; see :func:`megacore.parallel.materialize`. Stages have the parameter names
    of the whole model; where the head is the embedding, the last stage has a copy of it under the embedding's name.
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
        """Go through this stage.

        Args:
            inputs: on the first stage token ids, ``[batch, sequence]``; on the others what the stage before returned.
            targets: token ids, ``[batch, sequence]``; the last stage then returns the loss instead of logits, or the
                scores.
            token_weights: of the loss; see :func:`megacore.parallel.linear_cross_entropy`. Without them there are
                scores of the tokens; see :func:`megacore.parallel.token_scores`.
            segments: number of each token's segment, ``[batch, sequence]``, on the CPU: tokens attend to those of their
                own segment only, and positions count from its beginning; none where each row is one.
            sample_ids: numbers of the samples, ``[batch]``, on the CPU, for dropout; none without.

        Returns:
            On the last stage this rank's logits, ``[batch, sequence, local_vocab]``, or the loss, ``[1]``, or the
            scores, ``[batch, sequence, 2]``; on the others hidden states, ``[batch, sequence, hidden]``, under sequence
            parallelism this rank's slice of them.

        Raises:
            LayoutError: under sequence parallelism, when the sequence is no multiple of the tensor-parallel size.
        """
        parallel = self.parallel
        sequence_length = inputs.shape[1]
        if self.stage.is_first:
            if parallel.sequence_parallel and sequence_length % parallel.tp_size:
                raise LayoutError(
                    f"a sequence of {sequence_length} tokens cannot be cut into {parallel.tp_size} equal slices, "
                    "which sequence parallelism needs"
                )
            hidden = self.embedding(inputs, sample_ids)
        else:
            hidden = inputs
            sequence_length *= parallel.tp_size if parallel.sequence_parallel else 1
        positions = Positions.of(
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
        if token_weights is None:
            return token_scores(
                hidden, self.head.local_uncast("weight"), targets, vocab_size=self.config.vocab_size, parallel=parallel
            )
        return linear_cross_entropy(
            hidden,
            self.head.local_uncast("weight"),
            targets,
            token_weights,
            vocab_size=self.config.vocab_size,
            parallel=parallel,
        )

    @property
    def head(self) -> ParallelModule:
        """The module whose weight, ``[local_vocab, hidden]``, projects to logits."""
        return self.embedding.word_embeddings if self.config.tie_embeddings else self.output_layer

    def own_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters by name, without the last stage's copy of an embedding that is the head too."""
        return {
            name: parameter
            for name, parameter in self.named_parameters()
            if self.stage.is_first or not name.startswith("embedding.")
        }


def model_specs(config: ModelConfig, build_layer: LayerBuilder) -> dict[str, ParameterSpec]:
    """The parameters of the whole model and how each is cut, without allocating any."""
    with torch.device("meta"):
        return parameter_specs(DecoderModel(config, build_layer, ParallelContext.single()))
