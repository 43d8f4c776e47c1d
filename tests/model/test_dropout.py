"""Dropout: what is dropped, how much of it, and that it does not depend on how the work is spread."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import tiny_run
from layer_on_rank import attended_heads
from megacore import ModelConfig
from megacore.checkpoint import Checkpoint
from megacore.errors import PluginError
from megacore.model import ComputeOptions, DecoderModel, HiddenDropout, apply_options, load_model
from megacore.model.attention import AttentionOptions
from megacore.model.dropout import Dropout
from megacore.parallel import ParallelContext, ParallelSizes
from megacore.training import RunConfig
from recorded_steps import train_steps

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tiny_run.prepare(tmp_path_factory.mktemp("dropout"))


def run_of(place: Path, out: Path, *overrides: str) -> RunConfig:
    base = ("model.dtype=fp64", "training.train_iters=3", "training.global_batch_size=4")
    return tiny_run.run_of(place, out, *base, *overrides)


def losses(place: Path, tmp_path: Path, *overrides: str) -> list[float]:
    """The losses of a single process, to the bit."""
    out = tmp_path / str(len(list(tmp_path.iterdir())))
    return [step.loss for step in train_steps(run_of(place, out, *overrides))]


# --- masks


def test_the_share_of_what_is_dropped_is_the_probability_and_the_rest_is_scaled_up():
    dropout = HiddenDropout(ParallelContext.single())
    dropout.dropout = Dropout(0.3, seed=1, layer=2, place=1)

    dropped = dropout(torch.ones(4, 100, 500), torch.arange(4))

    assert sorted(dropped.unique().tolist()) == pytest.approx([0.0, 1 / 0.7])
    share = (dropped == 0).double().mean().item()
    assert abs(share - 0.3) < 4 * (0.3 * 0.7 / dropped.numel()) ** 0.5  # four standard deviations


def test_masks_differ_by_sample_layer_place_and_seed_and_are_the_same_when_drawn_again():
    reference = Dropout(0.5, seed=1, layer=2, place=1).keep_mask((8, 16), 7, device=CPU)

    assert torch.equal(Dropout(0.5, seed=1, layer=2, place=1).keep_mask((8, 16), 7, device=CPU), reference)
    assert not torch.equal(Dropout(0.5, seed=1, layer=2, place=1).keep_mask((8, 16), 8, device=CPU), reference)
    for other in (Dropout(0.5, 2, 2, 1), Dropout(0.5, 1, 3, 1), Dropout(0.5, 1, 2, 2)):
        assert not torch.equal(other.keep_mask((8, 16), 7, device=CPU), reference)


def test_attention_draws_otherwise_on_every_rank_and_leaves_the_generator_as_it_was():
    def drawn(first_head: int) -> torch.Tensor:
        with Dropout(0.5, 1, 2, -1).seeded(torch.tensor([3]), first_head, device=CPU):
            return torch.rand(4)

    before = torch.get_rng_state()
    one, again, other = drawn(0), drawn(0), drawn(2)

    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), before)


def test_hidden_dropout_rises_from_layer_to_layer_with_lima_and_is_none_at_the_embedding(place):
    model = load_model(Checkpoint(place / "checkpoint"), ParallelContext.single(), dtype=torch.float32)

    def probabilities(lima: bool) -> list[float]:
        apply_options(model, ComputeOptions(hidden_dropout=0.4, lima_dropout=lima))
        dropouts = [module.dropout for module in model.modules() if isinstance(module, HiddenDropout)]
        return [dropout.probability if dropout else 0.0 for dropout in dropouts]

    assert probabilities(lima=False) == [0.4] * 11
    assert probabilities(lima=True) == pytest.approx([0, 0, 0, 0.1, 0.1, 0.2, 0.2, 0.3, 0.3, 0.4, 0.4])


def test_a_model_without_sample_numbers_drops_nothing(place):
    model = load_model(Checkpoint(place / "checkpoint"), ParallelContext.single(), dtype=torch.float32)
    tokens = torch.arange(12).unsqueeze(0)
    before = model(tokens)

    apply_options(model, ComputeOptions(hidden_dropout=0.4))

    assert torch.equal(model(tokens), before)


# --- runs


@pytest.mark.parametrize("kind", ["hidden", "attention"])
def test_dropout_changes_the_losses_repeatably_and_by_its_seed(place, tmp_path, kind):
    without = losses(place, tmp_path)

    one, again = (losses(place, tmp_path, f"dropout.{kind}=0.3") for _ in range(2))
    other = losses(place, tmp_path, f"dropout.{kind}=0.3", "dropout.seed=99")

    assert one == again
    assert len({without[0], one[0], other[0]}) == 3


@pytest.mark.parametrize("granularity", ["selective", "full"])
def test_recomputing_drops_the_same(place, tmp_path, granularity):
    settings = ("dropout.hidden=0.3", "dropout.attention=0.3")

    expected = losses(place, tmp_path, *settings)
    found = losses(place, tmp_path, *settings, f"recompute.granularity={granularity}")

    assert found == expected


# --- attention, whose heads lie on several ranks


@pytest.mark.parametrize(("num_kv_heads", "tp"), [(4, 2), (1, 2), (1, 4)], ids=["cut", "replicas", "a head each"])
def test_heads_on_all_ranks_drop_different_weights_and_the_same_when_asked_again(ranks, num_kv_heads, tp):
    config = ModelConfig(
        family="any", num_layers=1, hidden_size=8, ffn_hidden_size=4, num_attention_heads=4, num_kv_heads=num_kv_heads,
        head_dim=6, vocab_size=9, max_position_embeddings=8, norm_eps=1e-5,
    )  # fmt: skip
    sizes = ParallelSizes(tp=tp)

    def heads(probability: float) -> list[Tensor]:
        options = AttentionOptions(dropout=Dropout(probability, seed=1, layer=0, place=-1))
        return [head for own in ranks.run(attended_heads, config, options, sizes=sizes) for head in own]

    whole, dropped, again = heads(0.0), heads(0.5), heads(0.5)

    assert len(whole) == 4
    assert all(torch.allclose(head, whole[0], atol=1e-5) for head in whole)
    assert all(torch.equal(one, other) for one, other in zip(dropped, again, strict=True))
    assert not any(torch.allclose(one, other, atol=1e-2) for one, other in itertools.combinations(dropped, 2))


# --- layers of a plugin that do not know of it


class Plain(nn.Module):
    def forward(self, hidden, positions):
        return hidden


def model_of(layer: nn.Module) -> DecoderModel:
    config = ModelConfig(
        family="any", num_layers=1, hidden_size=4, ffn_hidden_size=4, num_attention_heads=1, num_kv_heads=1,
        head_dim=4, vocab_size=9, max_position_embeddings=8, norm_eps=1e-5,
    )  # fmt: skip
    return DecoderModel(config, lambda config, layer_index, parallel: layer, ParallelContext.single())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (ComputeOptions(hidden_dropout=0.1), r"hidden_dropout is 0\.1, but the layers of any have no HiddenDropout"),
        (ComputeOptions(attention_dropout=0.1), r"SelfAttention, which the layers of any do not use"),
        (ComputeOptions(recompute="selective"), r"recompute to none or full"),
    ],
)
def test_what_the_layers_of_a_plugin_have_no_place_for_is_refused(options, message):
    with pytest.raises(PluginError, match=message):
        apply_options(model_of(Plain()), options)


@pytest.mark.parametrize("kind", [nn.Dropout, nn.AlphaDropout])
def test_torchs_own_dropout_in_a_layer_is_refused(kind):
    layer = Plain()
    layer.mlp = nn.Sequential(nn.Identity(), kind(0.1))

    with pytest.raises(
        PluginError,
        match=rf"^the layers of any have mlp\.1, a {kind.__name__} of p 0\.1, .*: use megacore\.model\.HiddenDropout",
    ):
        apply_options(model_of(layer), ComputeOptions())


def test_torchs_own_dropout_that_drops_nothing_is_not():
    layer = Plain()
    layer.dropout = nn.Dropout(0.0)

    apply_options(model_of(layer), ComputeOptions())
