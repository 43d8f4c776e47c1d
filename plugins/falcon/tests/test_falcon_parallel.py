"""A Falcon that is cut over two ranks computes what it does on one."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.testing import assert_close

from megacore.checkpoint import Checkpoint, split
from megacore.errors import LayoutError
from megacore.parallel import ParallelContext, ParallelSizes
from megacore.weights import convert
from model_on_rank import logits_and_gradients

FP32 = {"rtol": 1.3e-6, "atol": 1e-5}

CAN_BE_CUT = (
    "40B, untied, biases",
    "7B, multi-head",
    "RW, 7 heads",
    "ALiBi on 12 grouped heads",
    "40B, one group",
)
"""What the conformance kit does not cut. 3 groups, and 7 heads, are cut unevenly over two ranks; 6 heads on one group
give each rank 3 and the group's key."""


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


CUT_FINER = [
    ("7B: multi-query, one norm, parallel", 7),
    ("7B, biases", 7),
    ("7B, sequential", 7),
    ("40B, one group", 3),
    ("40B, one group", 6),
    ("ALiBi on a parallel multi-query layer", 7),
    ("40B: grouped, two norms, parallel", 6),
    ("40B, untied, biases", 6),
    ("ALiBi on 12 grouped heads", 6),
]


@pytest.mark.parametrize(
    ("name", "tp", "sequence_parallel"),
    [
        pytest.param(name, tp, is_cut, marks=() if number % 2 == is_cut else pytest.mark.soak)
        for number, (name, tp) in enumerate(CUT_FINER)
        for is_cut in (False, True)
    ],
)
def test_more_ranks_than_groups_each_have_the_key_and_value_of_their_group(
    publish, tmp_path, ranks, shapes, name, tp, sequence_parallel
):
    published = publish(dtype=torch.float64, **shapes[name])
    convert("falcon", published.directory, tmp_path / "ckpt")
    tokens = torch.randint(0, 99, (2, 43), generator=torch.Generator().manual_seed(1))
    expected, expected_gradients = logits_and_gradients(
        ParallelContext.single(), tmp_path / "ckpt", tokens, torch.float64
    )

    sizes = ParallelSizes(tp=tp, sequence_parallel=sequence_parallel)
    results = ranks.run(logits_and_gradients, tmp_path / "ckpt", tokens, torch.float64, sizes=sizes)

    for logits, gradients in results:
        assert_close(logits, expected, rtol=1e-11, atol=1e-11)
        for parameter, gradient in expected_gradients.items():
            assert_close(gradients[parameter], gradient, rtol=1e-10, atol=1e-10)


def test_a_checkpoint_cut_finer_than_its_groups_holds_each_key_and_value_once_and_merges_to_the_same_bytes(
    publish, tmp_path, shapes
):
    published = publish(**shapes["7B, biases"])
    convert("falcon", published.directory, tmp_path / "whole")

    convert("falcon", published.directory, tmp_path / "cut", tp=7)
    split(tmp_path / "cut", tmp_path / "cut otherwise", tp=1, pp=3)

    def weight_bytes(name: str) -> int:
        files = (tmp_path / name).glob("*.safetensors")
        return sum(tensor.nbytes for file in files for tensor in load_file(file).values())

    assert weight_bytes("cut") == weight_bytes("whole")
    for name in ("cut", "cut otherwise"):
        cut, whole = Checkpoint(tmp_path / name), Checkpoint(tmp_path / "whole")
        for parameter, spec in whole.manifest.specs.items():
            expected = whole.read_local(parameter, spec, tp_size=1, tp_rank=0)
            assert torch.equal(cut.read_local(parameter, spec, tp_size=1, tp_rank=0), expected)


@pytest.mark.parametrize(("name", "tp"), [("7B: multi-query, one norm, parallel", 2), ("40B, one group", 4)])
def test_a_single_group_is_not_cut_where_its_query_heads_do_not_divide(publish, tmp_path, shapes, name, tp):
    published = publish(**shapes[name])

    with pytest.raises(
        LayoutError,
        match=r"linear_qkv.* can be cut into 1 along axis 0, and each of these only into equal parts of its [67]",
    ):
        convert("falcon", published.directory, tmp_path / "ckpt", tp=tp)
    assert not (tmp_path / "ckpt").exists()
