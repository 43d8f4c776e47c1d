"""Segments: what is packed into a row has the logits, the loss and the gradients that it has alone in transformers."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.testing import assert_close
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import megacore
import tiny_run
from megacore.checkpoint import Checkpoint
from megacore.model import ComputeOptions, Positions, apply_options, kernels, load_model, positions
from megacore.model.positions import Segments
from megacore.parallel import ParallelContext
from megacore.training import Batch, Engine, RunConfig, batches
from megacore.training.resolved import parallel_sizes, resolve_run
from tiny_llama import published_model, write_dataset
from tiny_models import falcon_with_linear_biases, tied_multi_query_falcon
from training_on_rank import SEGMENTS, segmented, segmented_gradients

SINGLE = ParallelContext.single()
CPU = torch.device("cpu")
BOUND = {"rtol": 1e-11, "atol": 1e-12}

LLAMA, MULTI_QUERY, ALIBI = MODELS = ("rotary, grouped queries", "rotary, multi-query", "linear biases")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """The dataset, and each model as transformers saves it and converted."""
    place = tmp_path_factory.mktemp("segments")
    write_dataset(place / "data")
    publish = {LLAMA: published_model, MULTI_QUERY: tied_multi_query_falcon, ALIBI: falcon_with_linear_biases}
    for model in MODELS:
        publish[model](place / f"published {model}")
        megacore.convert("llama" if model == LLAMA else "falcon", place / f"published {model}", place / model)
    return place


def run_of(place: Path, out: Path, model: str, *overrides: str) -> RunConfig:
    return tiny_run.run_of(place, out, "model.dtype=fp64", *overrides, checkpoint=model)


# --- what transformers computes of each segment alone


def reference(published: Path) -> nn.Module:
    """The model of transformers, with everything in float64, the norms too."""
    model = AutoModelForCausalLM.from_pretrained(published, dtype=torch.float64, attn_implementation="sdpa")
    for name, module in list(model.named_modules()):
        if isinstance(module, LlamaRMSNorm):
            norm = nn.RMSNorm(module.weight.shape, eps=module.variance_epsilon)
            norm.weight = module.weight
            model.set_submodule(name, norm)
    return model


def logits_alone(model: nn.Module, batch: Batch) -> Tensor:
    """The logits of each segment alone, put together: ``[samples, sequence, vocabulary]``."""

    def of_row(tokens: Tensor, lengths: list[int]) -> Iterator[Tensor]:
        for segment in tokens[:-1].split(lengths):
            # A rotary embedding that stretches with the sequence remembers the longest.
            yield copy.deepcopy(model)(segment.unsqueeze(0), use_cache=False).logits[0]

    return torch.stack([torch.cat(list(of_row(*row))) for row in zip(batch.tokens, SEGMENTS, strict=True)])


@dataclass(frozen=True)
class Truth:
    logits: Tensor
    loss: float
    gradients: dict[str, Tensor]
    """By native name, each as one matrix."""


@pytest.fixture(scope="module")
def truths(place) -> dict[str, Truth]:
    return {model: truth_of(place, model) for model in MODELS}


def truth_of(place: Path, name: str) -> Truth:
    """The gradients take the way of the weights: through a checkpoint that is converted."""
    batch = first_batch(place, name)
    model = reference(place / f"published {name}")
    total, logits = torch.zeros((), dtype=torch.float64), []
    for tokens, mask, lengths in zip(batch.tokens, batch.loss_mask, SEGMENTS, strict=True):
        parts = zip(tokens[:-1].split(lengths), tokens[1:].split(lengths), mask.split(lengths), strict=True)
        for inputs, targets, weights in parts:
            logits.append(model(inputs.unsqueeze(0), use_cache=False).logits[0])
            total = total + (F.cross_entropy(logits[-1], targets, reduction="none") * weights).sum()
    loss = total / batch.loss_mask.sum()
    loss.backward()
    for parameter in model.parameters():
        parameter.data = parameter.grad
    gradients = place / f"gradients {name}"
    model.save_pretrained(gradients / "published")
    megacore.convert("llama" if name == LLAMA else "falcon", gradients / "published", gradients / "native")
    rows = torch.cat(logits).detach().unflatten(0, batch.loss_mask.shape)
    return Truth(rows, loss.item(), tiny_run.weights(gradients / "native"))


def first_batch(place: Path, model: str) -> Batch:
    run = run_of(place, place / "first batch", model)
    return segmented(next(batches(run, Checkpoint(run.model.checkpoint))))


# --- logits


@torch.no_grad()
@pytest.mark.parametrize("kernel", ["auto", "math", "flash"])
@pytest.mark.parametrize("name", MODELS)
def test_each_token_of_a_packed_row_has_the_logits_of_its_segment_alone(place, truths, name, kernel):
    batch = first_batch(place, name)
    model = load_model(Checkpoint(place / name), SINGLE, dtype=torch.float64)
    apply_options(model, ComputeOptions(attention=kernel))

    logits = model(batch.tokens[:, :-1], segments=batch.segments)

    assert 0.3 < logits.std() < 30
    assert_close(logits, truths[name].logits, **BOUND)


@torch.no_grad()
@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "dynamic", "factor": 2.0},
        {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 4},
    ],
    ids=lambda scaling: scaling["rope_type"],
)
def test_a_stretched_rotary_embedding_stretches_with_each_segment(place, tmp_path, scaling):
    settings = {"rope_parameters": scaling | {"rope_theta": 10000.0}, "max_position_embeddings": 4}
    published_model(tmp_path / "published", num_hidden_layers=2, **settings)
    megacore.convert("llama", tmp_path / "published", tmp_path / "native")
    batch = first_batch(place, LLAMA)

    logits = load_model(Checkpoint(tmp_path / "native"), SINGLE, dtype=torch.float64)(
        batch.tokens[:, :-1], segments=batch.segments
    )

    # Frequencies are computed in float32, here and there by other formulas.
    assert_close(logits, logits_alone(reference(tmp_path / "published"), batch), rtol=1e-6, atol=1e-7)


def without_new_positions(config, lengths, **options):
    return positions.rotary_table(config, sum(lengths), **options)


def over_the_row(attend, query, key, value, mask, dropout, segments=None):
    return attend(query, key, value, mask, dropout)


@torch.no_grad()
@pytest.mark.parametrize(
    ("module", "function", "wrong", "shows"),
    [
        # A rotary embedding turns by distances: in exact arithmetic this would not show at all.
        (positions, "segmented_rotary_table", without_new_positions, 1e-9),
        (kernels, "_each_segment", over_the_row, 1e-2),
    ],
    ids=["positions count on", "attention goes on"],
)
def test_positions_that_count_on_and_attention_that_goes_on_would_show(
    place, truths, monkeypatch, module, function, wrong, shows
):
    batch = first_batch(place, LLAMA)
    model = load_model(Checkpoint(place / LLAMA), SINGLE, dtype=torch.float64)

    monkeypatch.setattr(module, function, wrong)
    difference = (model(batch.tokens[:, :-1], segments=batch.segments) - truths[LLAMA].logits).abs()

    assert difference[0].max() > shows
    assert difference[1].max() < 1e-6  # a row that is one segment


# --- loss and gradients

LAYOUTS = {
    "one process": [],
    "4 at once, recompute selective": ["training.micro_batch_size=4", "recompute.granularity=selective"],
    "2 at once, recompute full": ["training.micro_batch_size=2", "recompute.granularity=full"],
    "math, 8 at once": ["kernels.attention=math", "training.micro_batch_size=8"],
    "flash": ["kernels.attention=flash"],
    "tp 2": ["parallel.tensor_parallel=2"],
    "tp 2, sequence parallel, selective, 2 at once": [
        "parallel.tensor_parallel=2", "parallel.sequence_parallel=true", "recompute.granularity=selective",
        "training.micro_batch_size=2",
    ],
    "pp 2, 1F1B, 2 at once": ["parallel.pipeline_parallel=2", "training.micro_batch_size=2"],
    "pp 2, zero bubble, full": [
        "parallel.pipeline_parallel=2", "parallel.pipeline_schedule=ZBVZeroBubble", "recompute.granularity=full",
    ],
    "tp 2, sequence parallel × pp 2, zero bubble": [
        "parallel.tensor_parallel=2", "parallel.sequence_parallel=true", "parallel.pipeline_parallel=2",
        "parallel.pipeline_schedule=InterleavedZeroBubble",
    ],
    "dp 2": ["parallel.nproc_per_node=2"],
    "dp 2, sharded, 2 at once, selective": [
        "parallel.nproc_per_node=2", "parallel.data_parallel=sharded", "training.micro_batch_size=2",
        "recompute.granularity=selective",
    ],
}  # fmt: skip


ORDINARY = {(name, "one process") for name in MODELS} | {
    (LLAMA, layout) for layout in ("math, 8 at once", "flash", "tp 2, sequence parallel × pp 2, zero bubble")
}
"""The other layouts are compared with a single process, with segments of each model, in test_layouts.py."""


@pytest.mark.parametrize(
    ("layout", "name"),
    [
        pytest.param(layout, name, marks=() if (name, layout) in ORDINARY else pytest.mark.soak)
        for layout in LAYOUTS
        for name in MODELS
    ],
)
def test_the_loss_and_its_gradients_are_those_of_the_segments_alone_in_any_layout(
    place, truths, ranks, tmp_path, layout, name
):
    check(place, truths, ranks, tmp_path / "out", name, *LAYOUTS[layout])


@pytest.mark.soak
@pytest.mark.parametrize("name", MODELS)
def test_compiled_layers_on_two_processes_have_them_too(place, truths, ranks, tmp_path, name):
    check(place, truths, ranks, tmp_path / "out", name, "parallel.tensor_parallel=2", "kernels.compile=true")


def check(place: Path, truths: dict[str, Truth], ranks, out: Path, name: str, *overrides: str) -> None:
    run = run_of(place, out, name, *overrides)

    results = ranks.run(segmented_gradients, run, sizes=parallel_sizes(run.parallel), timeout=240)

    assert all(loss == pytest.approx(truths[name].loss, rel=1e-12) for loss, _ in results)
    gradients = {name: gradient for _, found in reversed(results) for name, gradient in found.items()}
    assert gradients.keys() == truths[name].gradients.keys()
    for parameter, expected in truths[name].gradients.items():
        assert_close(gradients[parameter].reshape(expected.shape), expected, **BOUND)


@pytest.mark.parametrize(("dtype", "bound"), [("fp32", 1e-5), ("bf16", 0.05), ("fp16", 0.01)])
def test_other_precisions_have_the_loss_as_far_as_they_go(place, truths, tmp_path, dtype, bound):
    loss, _ = segmented_gradients(SINGLE, run_of(place, tmp_path / "out", LLAMA, f"model.dtype={dtype}"))

    assert loss == pytest.approx(truths[LLAMA].loss, rel=bound)


def test_compiled_layers_have_the_gradients_and_are_not_compiled_again_for_other_segments(place, truths, tmp_path):
    run = run_of(place, tmp_path / "out", LLAMA, "kernels.compile=true", "recompute.granularity=selective")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()

    loss, gradients = segmented_gradients(SINGLE, run)

    # Samples of one segment and of several, each with the part before attention and that after it.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 4
    assert loss == pytest.approx(truths[LLAMA].loss, rel=1e-12)
    for parameter, expected in truths[LLAMA].gradients.items():
        assert_close(gradients[parameter].reshape(expected.shape), expected, **BOUND)


# --- dropout


@pytest.mark.parametrize("name", [LLAMA, ALIBI])
def test_attention_dropout_in_segments_is_repeatable_and_the_same_when_computed_again(place, truths, tmp_path, name):
    def loss(*overrides: str) -> float:
        return segmented_gradients(SINGLE, run_of(place, tmp_path / "out", name, *overrides))[0]

    once, again = loss("dropout.attention=0.3"), loss("dropout.attention=0.3", "recompute.granularity=selective")

    assert once == again
    assert abs(once - truths[name].loss) > 1e-3


def test_attention_dropout_lets_no_segment_see_another_one():
    segments = Segments.from_numbers(torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 2, 2]]), device=CPU)
    assert segments is not None
    own = torch.block_diag(*(torch.ones(length, length) for length in segments.lengths))
    query, key = torch.randn(2, 2, 5, 1, 10)
    value = torch.eye(10).reshape(2, 5, 1, 10)
    torch.manual_seed(0)

    weights = kernels.attention_kernel()(query, key, value, None, 0.4, segments).reshape(10, 10)

    assert (weights[own.tril() == 0] == 0).all()
    assert 0 < (weights[own.tril() == 1] == 0).sum() < own.tril().sum()


# --- without segments


def test_rows_that_are_one_segment_each_are_computed_as_without_segments(place, tmp_path, monkeypatch):
    monkeypatch.setattr(positions, "segmented_rotary_table", None)
    monkeypatch.setattr(kernels, "_each_segment", None)
    run = run_of(place, tmp_path / "out", LLAMA, "training.micro_batch_size=4")
    checkpoint = Checkpoint(run.model.checkpoint)
    [batch] = islice(batches(run, checkpoint), 1)
    engine = Engine(resolve_run(run), SINGLE)
    plain = engine.accumulate(batch)
    engine.zero_gradients()

    numbers = torch.arange(8, dtype=torch.int32).unsqueeze(-1).expand(8, 12)
    assert engine.accumulate(replace(batch, segments=numbers)) == plain


@pytest.mark.parametrize("segment_numbers", [None, torch.zeros(3, 12, dtype=torch.int32)], ids=["none", "one a row"])
def test_no_mask_is_made_without_segments(place, segment_numbers):
    config = load_model(Checkpoint(place / LLAMA), SINGLE, dtype=torch.float32).config

    positions = Positions.for_sequences(
        config, 12, SINGLE, device=CPU, dtype=torch.float32, segment_numbers=segment_numbers
    )

    assert positions.mask is None
    assert positions.segments is None
    assert positions.cos is not None
    assert positions.cos.shape == (12, 8)


def test_segments_end_where_the_number_changes_and_where_a_row_ends():
    segments = Segments.from_numbers(torch.tensor([[0, 0, 3], [3, 3, 3], [0, 1, 2]]), device=CPU)

    assert segments is not None
    assert segments.lengths == (2, 1, 3, 1, 1, 1)
    assert segments.boundaries.tolist() == [0, 2, 3, 6, 7, 8, 9]
    assert segments.boundaries.dtype == torch.int32
