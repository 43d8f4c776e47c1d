"""A Falcon that is cut over two ranks computes what it does on one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from megacore.errors import LayoutError
from megacore.parallel import ParallelContext
from megacore.weights import convert
from model_on_rank import logits_and_gradients

FP32 = {"rtol": 1.3e-6, "atol": 1e-5}

CAN_BE_CUT = (
    "40B: grouped, two norms, parallel",
    "40B, untied, biases",
    "11B: grouped, one norm, untied",
    "7B, multi-head",
    "RW: ALiBi, biases, multi-head, sequential",
    "RW, 7 heads",
    "ALiBi on 12 grouped heads",
)
"""The shapes with several groups. 3 of them, and 7 heads, are cut unevenly."""


def some_tokens() -> Tensor:
    return torch.randint(0, 99, (2, 31), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", CAN_BE_CUT)
def test_logits_and_gradients_on_two_ranks_are_those_on_one(publish, tmp_path, ranks, shapes, name):
    published = publish(dtype=torch.float64, **shapes[name])
    convert("falcon", published.directory, tmp_path / "ckpt")
    tokens = some_tokens()
    expected, expected_gradients = logits_and_gradients(
        ParallelContext.single(), tmp_path / "ckpt", tokens, torch.float64
    )

    results = ranks.run(logits_and_gradients, tmp_path / "ckpt", tokens, torch.float64)

    for logits, gradients in results:
        assert_close(logits, expected, rtol=1e-11, atol=1e-11)
        assert gradients.keys() == expected_gradients.keys()
        for parameter, gradient in expected_gradients.items():
            assert gradient.abs().max() > 1e-3, f"{parameter} has nothing to compare"
            assert_close(gradients[parameter], gradient, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["40B: grouped, two norms, parallel", "RW, 7 heads"])
def test_logits_on_two_ranks_are_those_of_transformers(publish, tmp_path, ranks, shapes, name):
    published = publish(**shapes[name])
    convert("falcon", published.directory, tmp_path / "ckpt", tp=2, pp=2)
    tokens = some_tokens()

    results = ranks.run(logits_and_gradients, tmp_path / "ckpt", tokens, torch.float32)

    expected = published.model(tokens[:, :-1]).logits.detach()
    assert 0.3 < expected.std() < 3
    for logits, _ in results:
        assert_close(logits, expected, **FP32)


@pytest.mark.parametrize("name", ["7B: multi-query, one norm, parallel", "40B, one group"])
def test_a_single_group_is_not_cut(publish, tmp_path, shapes, name):
    published = publish(**shapes[name])

    with pytest.raises(LayoutError, match="linear_qkv"):
        convert("falcon", published.directory, tmp_path / "ckpt", tp=2)
    assert not (tmp_path / "ckpt").exists()
