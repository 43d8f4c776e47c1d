"""The parallel layers on two real ranks, against plain torch on the whole weights, in float64."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import Replicate, Shard
from torch.nn import functional as F  # noqa: N812

from layer_on_rank import Outcome, run_collective, run_cross_entropy, run_module
from megacore import ModelConfig
from megacore.model import LayerNorm, RMSNorm
from megacore.parallel import (
    ColumnParallelLinear,
    ParallelContext,
    ParallelSizes,
    RowParallelLinear,
    VocabParallelEmbedding,
    VocabParallelHead,
    linear_cross_entropy,
)
from megacore.parallel.tensor.collectives import all_reduce, gather_sequence, scatter_sequence, sum_gradients
from megacore.parallel.tensor.layers import enter_parallel_region, leave_parallel_region

BATCH, SEQUENCE, HIDDEN, VOCAB = 2, 4, 10, 99

either_sequence = pytest.mark.parametrize(
    "sequence_parallel", [False, True], ids=["whole sequence", "sequence parallel"]
)
either_overlap = pytest.mark.parametrize("overlaps", [True, False], ids=["overlapping", "one after the other"])
either_bias = pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])


def two_ranks(sequence_parallel: bool) -> ParallelSizes:
    return ParallelSizes(tp=2, sequence_parallel=sequence_parallel)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(hash((shape, seed))), dtype=torch.float64)


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=0)


def between_layers(whole: Tensor, sequence_parallel: bool) -> list[Tensor]:
    """What each rank holds of an activation between the parallel layers."""
    return [part.clone() for part in (whole.chunk(2, dim=1) if sequence_parallel else (whole, whole))]


def parts(whole: Tensor, shape: tuple[int, ...], dim: int) -> list[Tensor]:
    """What each rank holds of an activation whose last axis, of ``shape``, is cut along axis ``dim`` of that."""
    return [part.flatten(2).clone() for part in whole.unflatten(-1, shape).chunk(2, dim=2 + dim)]


def truth(function, *inputs: Tensor, gradient: Tensor) -> tuple[Tensor, ...]:
    """The output of ``function(*inputs)`` and the gradients of the inputs."""
    inputs = tuple(tensor.clone().requires_grad_() for tensor in inputs)
    output = function(*inputs)
    return (output.detach(), *torch.autograd.grad(output, inputs, gradient))


# --- linear layers

COLUMN_CUTS = {"3 groups as 2 + 1": ((3, 6), 0), "gate and up of 7 as 4 + 3": ((2, 7), 1), "a vector of 5": ((5,), 0)}
ROW_CUTS = {"3 groups as 2 + 1": (3, 4), "7 as 4 + 3": (7,)}


def column_layer(overlaps: bool, *arguments, **settings) -> ColumnParallelLinear:
    layer = ColumnParallelLinear(*arguments, **settings)
    layer.overlaps = overlaps
    return layer


def run_column(
    ranks, out_shape, shard_dim, bias, sequence_parallel, overlaps=True
) -> tuple[list[Outcome], tuple[Tensor, ...]]:
    hidden, gradient = random(BATCH, SEQUENCE, HIDDEN), random(BATCH, SEQUENCE, torch.Size(out_shape).numel())
    values = {"weight": random(*out_shape, HIDDEN)} | ({"bias": random(*out_shape, seed=1)} if bias else {})
    outcomes = ranks.run(
        run_module,
        partial(column_layer, overlaps, HIDDEN, out_shape, shard_dim=shard_dim, bias=bias),
        values,
        between_layers(hidden, sequence_parallel),
        parts(gradient, out_shape, shard_dim),
        sizes=two_ranks(sequence_parallel),
    )

    def linear(hidden, weight, bias=None):
        return F.linear(hidden, weight.reshape(-1, HIDDEN), None if bias is None else bias.flatten())

    return outcomes, truth(linear, hidden, *values.values(), gradient=gradient)


@either_sequence
@either_bias
@pytest.mark.parametrize(("out_shape", "shard_dim"), COLUMN_CUTS.values(), ids=COLUMN_CUTS)
def test_a_column_parallel_layer_computes_the_outputs_of_the_whole(
    ranks, out_shape, shard_dim, bias, sequence_parallel
):
    outcomes, (output, *_) = run_column(ranks, out_shape, shard_dim, bias, sequence_parallel)

    for outcome, expected in zip(outcomes, parts(output, out_shape, shard_dim), strict=True):
        close(outcome.output, expected)


@either_sequence
@either_overlap
@either_bias
@pytest.mark.parametrize(("out_shape", "shard_dim"), COLUMN_CUTS.values(), ids=COLUMN_CUTS)
def test_a_column_parallel_layer_has_the_gradients_of_the_whole(
    ranks, out_shape, shard_dim, bias, overlaps, sequence_parallel
):
    outcomes, (_, hidden, *gradients) = run_column(ranks, out_shape, shard_dim, bias, sequence_parallel, overlaps)

    for outcome, expected in zip(outcomes, between_layers(hidden, sequence_parallel), strict=True):
        close(outcome.input_gradient, expected)
    for name, expected in zip(["weight", "bias"], gradients, strict=False):
        close(torch.cat([outcome.gradients[name] for outcome in outcomes], shard_dim), expected)


def run_row(ranks, in_shape, bias, sequence_parallel) -> tuple[list[Outcome], tuple[Tensor, ...]]:
    inputs, gradient = random(BATCH, SEQUENCE, torch.Size(in_shape).numel()), random(BATCH, SEQUENCE, HIDDEN, seed=2)
    values = {"weight": random(HIDDEN, *in_shape)} | ({"bias": random(HIDDEN)} if bias else {})
    outcomes = ranks.run(
        run_module,
        partial(RowParallelLinear, in_shape, HIDDEN, bias=bias),
        values,
        parts(inputs, in_shape, 0),
        between_layers(gradient, sequence_parallel),
        sizes=two_ranks(sequence_parallel),
    )

    def linear(inputs, weight, bias=None):
        return F.linear(inputs, weight.reshape(HIDDEN, -1), bias)

    return outcomes, truth(linear, inputs, *values.values(), gradient=gradient)


@either_sequence
@either_bias
@pytest.mark.parametrize("in_shape", ROW_CUTS.values(), ids=ROW_CUTS)
def test_a_row_parallel_layer_computes_the_outputs_of_the_whole(ranks, in_shape, bias, sequence_parallel):
    outcomes, (output, *_) = run_row(ranks, in_shape, bias, sequence_parallel)

    for outcome, expected in zip(outcomes, between_layers(output, sequence_parallel), strict=True):
        close(outcome.output, expected)


@either_sequence
@either_bias
@pytest.mark.parametrize("in_shape", ROW_CUTS.values(), ids=ROW_CUTS)
def test_a_row_parallel_layer_has_the_gradients_of_the_whole(ranks, in_shape, bias, sequence_parallel):
    outcomes, (_, inputs, weight, *rest) = run_row(ranks, in_shape, bias, sequence_parallel)

    for outcome, expected in zip(outcomes, parts(inputs, in_shape, 0), strict=True):
        close(outcome.input_gradient, expected)
    close(torch.cat([outcome.gradients["weight"] for outcome in outcomes], 1), weight)
    for expected in rest:  # every rank holds the bias, and its gradient, as a whole
        close(outcomes[0].gradients["bias"], expected)
        assert torch.equal(outcomes[0].gradients["bias"], outcomes[1].gradients["bias"])


# --- norms

CONFIG = ModelConfig(
    family="any", num_layers=1, hidden_size=HIDDEN, ffn_hidden_size=7, num_attention_heads=3, num_kv_heads=3,
    head_dim=2, vocab_size=VOCAB, max_position_embeddings=SEQUENCE, norm_eps=1e-5,
)  # fmt: skip


@either_sequence
@pytest.mark.parametrize("norm", [RMSNorm, LayerNorm])
def test_a_norm_has_outputs_and_gradients_of_the_whole_on_every_rank(ranks, norm, sequence_parallel):
    hidden, gradient = random(BATCH, SEQUENCE, HIDDEN), random(BATCH, SEQUENCE, HIDDEN, seed=1)
    values = {"weight": random(HIDDEN)} | ({"bias": random(HIDDEN, seed=1)} if norm is LayerNorm else {})

    def written_out(hidden, weight, bias=None):
        if bias is None:
            return hidden / (hidden.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight
        return (hidden - hidden.mean(-1, keepdim=True)) / (
            hidden.var(-1, correction=0, keepdim=True) + 1e-5
        ).sqrt() * weight + bias

    outcomes = ranks.run(
        run_module,
        partial(norm, CONFIG),
        values,
        between_layers(hidden, sequence_parallel),
        between_layers(gradient, sequence_parallel),
        sizes=two_ranks(sequence_parallel),
    )

    output, hidden_gradient, *gradients = truth(written_out, hidden, *values.values(), gradient=gradient)
    for rank, outcome in enumerate(outcomes):
        close(outcome.output, between_layers(output, sequence_parallel)[rank])
        close(outcome.input_gradient, between_layers(hidden_gradient, sequence_parallel)[rank])
        for name, expected in zip(values, gradients, strict=True):
            close(outcome.gradients[name], expected)
            assert torch.equal(outcome.gradients[name], outcomes[0].gradients[name])


# --- embedding and head

IDS = torch.tensor([[0, 49, 50, 98], [50, 0, 50, 7]])
"""The first and the last of each rank's part of the vocabulary, 50 + 49, and one id three times."""


@either_sequence
@pytest.mark.parametrize("ids", [IDS, IDS % 50, IDS % 49 + 50], ids=["both parts", "the first part", "the second part"])
def test_the_embedding_has_outputs_and_gradients_of_the_whole_wherever_the_ids_are(ranks, ids, sequence_parallel):
    weight, gradient = random(VOCAB, HIDDEN), random(BATCH, SEQUENCE, HIDDEN)
    outcomes = ranks.run(
        run_module,
        partial(VocabParallelEmbedding, VOCAB, HIDDEN),
        {"weight": weight},
        [ids, ids],
        between_layers(gradient, sequence_parallel),
        sizes=two_ranks(sequence_parallel),
    )

    output, weight_gradient = truth(lambda weight: F.embedding(ids, weight), weight, gradient=gradient)
    for outcome, expected in zip(outcomes, between_layers(output, sequence_parallel), strict=True):
        close(outcome.output, expected)
    close(torch.cat([outcome.gradients["weight"] for outcome in outcomes]), weight_gradient)


@either_sequence
def test_the_head_has_outputs_and_gradients_of_the_whole(ranks, sequence_parallel):
    hidden, weight, gradient = random(BATCH, SEQUENCE, HIDDEN), random(VOCAB, HIDDEN), random(BATCH, SEQUENCE, VOCAB)
    outcomes = ranks.run(
        run_module,
        partial(VocabParallelHead, VOCAB, HIDDEN),
        {"weight": weight},
        between_layers(hidden, sequence_parallel),
        parts(gradient, (VOCAB,), 0),
        sizes=two_ranks(sequence_parallel),
    )

    output, hidden_gradient, weight_gradient = truth(F.linear, hidden, weight, gradient=gradient)
    assert [outcome.output.shape[-1] for outcome in outcomes] == [50, 49]
    for rank, outcome in enumerate(outcomes):
        close(outcome.output, parts(output, (VOCAB,), 0)[rank])
        close(outcome.input_gradient, between_layers(hidden_gradient, sequence_parallel)[rank])
    close(torch.cat([outcome.gradients["weight"] for outcome in outcomes]), weight_gradient)


# --- what parameters and activations are


def test_parameters_are_dtensors_cut_as_declared_and_activations_are_plain_tensors(ranks):
    column, _ = run_column(ranks, (2, 7), 1, bias=True, sequence_parallel=False)
    row, _ = run_row(ranks, (3, 4), bias=True, sequence_parallel=True)

    for outcome in column:
        assert outcome.placements == {"weight": (Shard(1),), "bias": (Shard(1),)}
        assert outcome.output_type is Tensor
    for outcome in row:
        assert outcome.placements == {"weight": (Shard(1),), "bias": (Replicate(),)}
        assert outcome.output_type is Tensor


# --- collectives

REGION = {"whole sequence": False, "sequence parallel": True}
SLICE, WHOLE = (BATCH, SEQUENCE // 2, 3), (BATCH, SEQUENCE, 3)


@pytest.mark.parametrize(
    ("collective", "input_shape", "output_shape", "equal_inputs", "equal_outputs"),
    [
        (sum_gradients, WHOLE, WHOLE, True, False),
        (all_reduce, WHOLE, WHOLE, False, True),
        (gather_sequence, SLICE, WHOLE, False, False),
        (scatter_sequence, WHOLE, SLICE, False, False),
    ],
)
@pytest.mark.parametrize("contiguous", [True, False], ids=["contiguous", "transposed"])
def test_the_backward_of_a_collective_is_its_conjugate(
    ranks, collective, input_shape, output_shape, equal_inputs, equal_outputs, contiguous
):
    """``<f(x), y> = <x, f*(y)>``, inner products over all ranks, where what is equal on the ranks counts once."""

    def a_tensor_a_rank(shape, equal, seed):
        tensors = [random(*shape, seed=seed), random(*shape, seed=seed if equal else seed + 1)]
        return tensors if contiguous else [tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in tensors]

    x, y = a_tensor_a_rank(input_shape, equal_inputs, 0), a_tensor_a_rank(output_shape, equal_outputs, 10)

    outputs, gradients = zip(*ranks.run(run_collective, collective, x, y), strict=True)

    def inner(one, other, equal):
        assert not equal or torch.equal(one[0], one[1])
        return sum((a * b).sum() for a, b in list(zip(one, other, strict=True))[: 1 if equal else None])

    close(inner(outputs, y, equal_outputs), inner(gradients, x, equal_inputs))


@pytest.mark.parametrize(
    ("region", "sequence_parallel", "expected"),
    [
        (enter_parallel_region, False, lambda x: x),
        (leave_parallel_region, False, lambda x: [x[0] + x[1]] * 2),
        (enter_parallel_region, True, lambda x: [torch.cat(x, dim=1)] * 2),
        (leave_parallel_region, True, lambda x: (x[0] + x[1]).chunk(2, dim=1)),
    ],
)
def test_regions_are_entered_and_left_with_the_collective_of_the_mode(ranks, region, sequence_parallel, expected):
    x = [random(*WHOLE, seed=0), random(*WHOLE, seed=1)]
    shapes = [tensor.shape for tensor in expected(x)]

    answers = ranks.run(
        run_collective, region, x, [random(*shape) for shape in shapes], sizes=two_ranks(sequence_parallel)
    )

    for (output, _), wanted in zip(answers, expected(x), strict=True):
        close(output, wanted)


# --- the loss


def run_loss(ranks, hidden: Tensor, weight: Tensor, targets: Tensor, *, sequence_parallel=False, chunk_bytes=2**24):
    """The ranks' losses and joined gradients, and those of the whole, of a weighted sum."""
    token_weights = random(BATCH, SEQUENCE, seed=5).abs()
    outcomes = ranks.run(
        run_cross_entropy,
        between_layers(hidden, sequence_parallel),
        [part.clone() for part in weight.chunk(2)],
        targets,
        token_weights,
        VOCAB,
        chunk_bytes,
        sizes=two_ranks(sequence_parallel),
    )

    def whole(hidden, weight):
        losses = F.cross_entropy(F.linear(hidden, weight).flatten(0, 1), targets.flatten(), reduction="none")
        return (losses @ token_weights.flatten()).reshape(1)

    losses, hidden_gradients, weight_gradients = zip(*outcomes, strict=True)
    assert torch.equal(losses[0], losses[1])
    for gradient in hidden_gradients if not sequence_parallel else []:
        assert torch.equal(gradient, hidden_gradients[0])
    hidden_gradient = torch.cat(hidden_gradients, dim=1) if sequence_parallel else hidden_gradients[0]
    expected = truth(whole, hidden, weight, gradient=torch.ones(1, dtype=torch.float64))
    return (losses[0], hidden_gradient, torch.cat(weight_gradients)), expected


@either_sequence
@pytest.mark.parametrize("chunk_bytes", [2**24, 4 * 50 * 3, 1], ids=["at once", "3 tokens at a time", "one at a time"])
@pytest.mark.parametrize(
    "targets", [IDS, IDS % 50, IDS % 49 + 50], ids=["both parts", "the first part", "the second part"]
)
def test_the_loss_over_a_cut_vocabulary_is_that_of_the_whole(ranks, targets, chunk_bytes, sequence_parallel):
    found, expected = run_loss(
        ranks,
        random(BATCH, SEQUENCE, HIDDEN),
        random(VOCAB, HIDDEN),
        targets,
        sequence_parallel=sequence_parallel,
        chunk_bytes=chunk_bytes,
    )

    for one, other in zip(found, expected, strict=True):
        close(one, other)


def test_the_loss_of_large_logits_is_finite_and_right(ranks):
    hidden, weight = random(BATCH, SEQUENCE, HIDDEN), random(VOCAB, HIDDEN) * 1e4  # exp() of one of them would overflow

    found, expected = run_loss(ranks, hidden, weight, IDS)

    for one, other in zip(found, expected, strict=True):
        close(one, other, tolerance=1e-7)
    assert found[0] > 1e4


def test_the_loss_does_not_mind_a_rank_whose_logits_are_all_far_below_the_others(ranks):
    hidden, weight = random(BATCH, SEQUENCE, HIDDEN), random(VOCAB, HIDDEN)
    hidden[..., 0] = 1
    weight[50:, 0] = -1e5

    found, expected = run_loss(ranks, hidden, weight, IDS)

    for one, other in zip(found, expected, strict=True):
        close(one, other, tolerance=1e-9)


def test_a_loss_that_was_scaled_afterwards_is_refused():
    hidden, weight = random(BATCH, SEQUENCE, HIDDEN).requires_grad_(), random(VOCAB, HIDDEN)
    loss = linear_cross_entropy(
        hidden, weight, IDS, torch.ones(IDS.shape), vocab_size=VOCAB, parallel=ParallelContext.single()
    )

    with pytest.raises(RuntimeError, match="scale token_weights instead"):
        (2 * loss).backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_loss_of_16_bit_hidden_states_has_a_32_bit_gradient_of_a_32_bit_head(dtype):
    hidden, weight = random(BATCH, SEQUENCE, HIDDEN).to(dtype).requires_grad_(), random(VOCAB, HIDDEN).float()
    weight.requires_grad_()

    loss = linear_cross_entropy(
        hidden, weight, IDS, torch.ones(IDS.shape), vocab_size=VOCAB, parallel=ParallelContext.single()
    )
    loss.backward()

    expected = F.cross_entropy(
        F.linear(hidden.detach().float(), weight.detach()).flatten(0, 1), IDS.flatten(), reduction="sum"
    )
    assert (loss.dtype, hidden.grad.dtype, weight.grad.dtype) == (torch.float32, dtype, torch.float32)
    torch.testing.assert_close(loss, expected.reshape(1), rtol=1e-2, atol=0)
