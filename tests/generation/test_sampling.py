"""Which token comes next: the distribution that transformers draws from, and how often each is drawn."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close
from transformers.generation import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from megacore.errors import GenerationError
from megacore.generation import Sampling

VOCAB = 99


def some_logits(num_rows: int = 5) -> torch.Tensor:
    return torch.randn(num_rows, VOCAB, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 1.0},
        {"temperature": 0.3},
        {"temperature": 2.5, "top_k": 7},
        {"temperature": 1.0, "top_k": 1},
        {"temperature": 1.0, "top_k": 1000},
        {"temperature": 1.3, "top_p": 0.8},
        {"temperature": 1.0, "top_p": 1e-9},
        {"temperature": 0.8, "top_k": 20, "top_p": 0.9},
    ],
    ids=str,
)
def test_tokens_are_drawn_from_the_distribution_that_transformers_draws_from(settings):
    logits = some_logits()
    warped = TemperatureLogitsWarper(settings["temperature"])(None, logits)
    if "top_k" in settings:
        warped = TopKLogitsWarper(settings["top_k"])(None, warped)
    if "top_p" in settings:
        warped = TopPLogitsWarper(settings["top_p"])(None, warped)

    assert_close(Sampling(**settings).probabilities(logits), warped.softmax(dim=-1), rtol=1e-12, atol=1e-15)


def test_logits_in_16_bit_do_not_make_the_distribution_coarse():
    logits = some_logits().bfloat16()
    assert_close(Sampling(temperature=1.0).probabilities(logits), logits.double().softmax(dim=-1))


def test_tokens_are_drawn_as_often_as_they_are_probable():
    """Chi-squared of 6000 draws, 6 degrees of freedom: above 30 in one of 25 thousand runs, and the seed is fixed."""
    sampling = Sampling(temperature=1.5, top_k=7, seed=0)
    logits = some_logits(1)
    expected = sampling.probabilities(logits)[0] * 6000
    generator = sampling.generator(0)
    drawn = [sampling.choose(logits, [generator])[0] for _ in range(6000)]

    counts = torch.bincount(torch.tensor(drawn), minlength=VOCAB)

    kept = expected > 0
    assert int(kept.sum()) == 7
    assert int(counts[~kept].sum()) == 0
    assert float(((counts[kept] - expected[kept]) ** 2 / expected[kept]).sum()) < 30


def test_at_temperature_0_the_first_of_the_most_likely_tokens_is_taken():
    logits = torch.zeros(2, VOCAB)
    logits[0, [30, 70]] = 1.0
    assert Sampling().choose(logits, []) == [30, 0]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nothing_is_chosen_by_logits_that_are_not_numbers(temperature):
    logits = some_logits(2)
    logits[1, 5] = torch.nan
    with pytest.raises(GenerationError, match=r"the model's logits are not numbers \(NaN\): .* try --dtype fp32"):
        Sampling(temperature=temperature).choose(logits, [torch.Generator()] * 2)


def test_a_seed_that_is_not_given_is_another_one_each_time():
    assert Sampling(temperature=1.0).seed != Sampling(temperature=1.0).seed
