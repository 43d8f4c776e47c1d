"""How parameters are cut over tensor-parallel ranks. The truth is ``torch.chunk`` on a real tensor."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from megacore.errors import LayoutError
from megacore.parallel import ParameterSpec, check_tensor_parallel, chunk_bounds, describe_imbalance, join_parts

KV_GROUPS, GROUP_ROWS, HEADS_WIDTH, HIDDEN, FFN, VOCAB = 3, 8, 4, 10, 22, 99

SPECS = {
    "embedding": ParameterSpec((VOCAB, HIDDEN), shard_dim=0, row_dims=1),
    "qkv weight": ParameterSpec((KV_GROUPS, GROUP_ROWS, HIDDEN), shard_dim=0, row_dims=2),
    "qkv bias": ParameterSpec((KV_GROUPS, GROUP_ROWS), shard_dim=0, row_dims=2),
    "proj weight": ParameterSpec((HIDDEN, KV_GROUPS, HEADS_WIDTH), shard_dim=1, row_dims=1),
    "proj bias": ParameterSpec((HIDDEN,), shard_dim=None, row_dims=1),
    "fc1 weight": ParameterSpec((2, FFN, HIDDEN), shard_dim=1, row_dims=2),
    "fc1 bias": ParameterSpec((2, FFN), shard_dim=1, row_dims=2),
    "fc2 weight": ParameterSpec((HIDDEN, FFN), shard_dim=1, row_dims=1),
    "fc2 bias": ParameterSpec((HIDDEN,), shard_dim=None, row_dims=1),
    "norm": ParameterSpec((HIDDEN,), shard_dim=None, row_dims=1),
}


def chunks(whole: torch.Tensor, spec: ParameterSpec, tp_size: int) -> list[torch.Tensor]:
    """What each rank should hold, by ``torch.chunk``, which leaves out the parts that would be empty."""
    if spec.shard_dim is None:
        return [whole] * tp_size
    parts = list(whole.chunk(tp_size, dim=spec.shard_dim))
    empty = whole.narrow(spec.shard_dim, 0, 0)
    return parts + [empty] * (tp_size - len(parts))


# --- bounds


@pytest.mark.parametrize("parts", [1, 2, 3, 4, 5, 7, 8, 16, 100])
def test_bounds_are_those_of_torch_chunk(parts):
    for size in (*range(1, 70), 99, 100, 101, 49152, 50257):
        expected = [part.tolist() for part in torch.arange(size).chunk(parts)]
        expected += [[]] * (parts - len(expected))

        found = [list(range(*chunk_bounds(size, parts, index))) for index in range(parts)]

        assert found == expected, (size, parts)


@pytest.mark.parametrize("size, parts", [(99, 2), (3, 2), (7, 4), (5, 4), (2, 5)])
def test_parts_lie_one_behind_the_other_and_cover_everything(size, parts):
    bounds = [chunk_bounds(size, parts, index) for index in range(parts)]

    assert bounds[0][0] == 0
    assert bounds[-1][1] == size
    assert all(stop == start for (_, stop), (start, _) in pairwise(bounds))


# --- parameters


@pytest.mark.parametrize("tp_size", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("kind", SPECS)
def test_a_rank_holds_the_shape_that_torch_chunk_gives(kind, tp_size):
    spec = SPECS[kind]
    expected = [tuple(part.shape) for part in chunks(torch.empty(spec.shape), spec, tp_size)]

    assert [spec.local_shape(tp_size, rank) for rank in range(tp_size)] == expected


@pytest.mark.parametrize("tp_size", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("kind", SPECS)
def test_the_block_of_the_matrix_is_the_part_that_torch_chunk_gives(kind, tp_size):
    spec = SPECS[kind]
    whole = torch.arange(math.prod(spec.shape)).view(spec.shape)
    matrix = whole.view(spec.matrix_shape)

    for rank, expected in enumerate(chunks(whole, spec, tp_size)):
        rows, columns = spec.block(tp_size, rank)
        assert torch.equal(matrix[rows, columns].reshape(expected.shape), expected), f"rank {rank}"


@pytest.mark.parametrize(
    "kind, matrix_shape, flat_shape",
    [
        ("embedding", (VOCAB, HIDDEN), (VOCAB, HIDDEN)),
        ("qkv weight", (KV_GROUPS * GROUP_ROWS, HIDDEN), (KV_GROUPS * GROUP_ROWS, HIDDEN)),
        ("qkv bias", (KV_GROUPS * GROUP_ROWS, 1), (KV_GROUPS * GROUP_ROWS,)),
        ("proj weight", (HIDDEN, KV_GROUPS * HEADS_WIDTH), (HIDDEN, KV_GROUPS * HEADS_WIDTH)),
        ("fc1 weight", (2 * FFN, HIDDEN), (2 * FFN, HIDDEN)),
        ("fc1 bias", (2 * FFN, 1), (2 * FFN,)),
        ("fc2 weight", (HIDDEN, FFN), (HIDDEN, FFN)),
        ("norm", (HIDDEN, 1), (HIDDEN,)),
    ],
)
def test_files_hold_a_parameter_as_a_matrix_or_a_vector(kind, matrix_shape, flat_shape):
    assert SPECS[kind].matrix_shape == matrix_shape
    assert SPECS[kind].flat_shape == flat_shape


def test_a_contiguous_part_is_a_slice_so_that_reading_it_needs_no_row_numbers():
    for kind in ("embedding", "qkv weight", "qkv bias", "proj weight", "fc2 weight", "norm"):
        rows, _ = SPECS[kind].block(2, 1)
        assert isinstance(rows, slice), kind


# --- refusals


@pytest.mark.parametrize("tp_size", [1, 2, 3])
def test_a_size_that_leaves_every_rank_something_is_accepted(tp_size):
    check_tensor_parallel(SPECS, tp_size)


@pytest.mark.parametrize("tp_size", [0, -1, 4, 5, 99])
def test_a_size_that_leaves_a_rank_empty_is_refused_with_those_that_work(tp_size):
    with pytest.raises(
        LayoutError,
        match=rf"cannot be cut over tp {tp_size}: qkv weight \[3, 8, 10\] can be cut into 3 along axis 0, "
        r".*tp sizes that work: 1, 2, 3$",
    ):
        check_tensor_parallel(SPECS, tp_size)


def test_a_size_within_the_units_is_refused_where_chunking_leaves_the_last_rank_none():
    specs = {"qkv": ParameterSpec((5, 2, 4), shard_dim=0, row_dims=2)}  # over 4: 2 + 2 + 1 + 0
    assert len(torch.empty(5).chunk(4)) == 3

    with pytest.raises(LayoutError, match=r"tp sizes that work: 1, 2, 3, 5$"):
        check_tensor_parallel(specs, 4)


def test_the_parameter_at_fault_is_named_and_the_sizes_that_work_for_every_parameter():
    specs = {"groups": ParameterSpec((4, 6), shard_dim=0, row_dims=1), "ffn": ParameterSpec((5,), 0, 1)}
    with pytest.raises(LayoutError, match=r"tp 4: ffn \[5\] can be cut into 5 along axis 0.*tp sizes that work: 1, 2$"):
        check_tensor_parallel(specs, 4)  # 5 over 4 is 2 + 2 + 1 + 0, and 4 over 3 is 2 + 2 + 0


def test_a_model_without_any_cut_parameter_runs_at_any_size():
    check_tensor_parallel({"norm": SPECS["norm"]}, 7)


# --- imbalance


def test_an_even_cut_is_not_remarked_on():
    assert describe_imbalance(SPECS, 1) is None
    assert describe_imbalance({"decoder.layers.0.mlp.linear_fc1.weight": SPECS["fc1 weight"]}, 2) is None


def test_an_uneven_cut_is_described_once_for_all_layers():
    specs = {"embedding.word_embeddings.weight": SPECS["embedding"]}
    for layer in range(5):
        prefix = f"decoder.layers.{layer}"
        specs |= {
            f"{prefix}.self_attention.linear_qkv.weight": SPECS["qkv weight"],
            f"{prefix}.self_attention.linear_qkv.bias": SPECS["qkv bias"],
            f"{prefix}.mlp.linear_fc1.weight": SPECS["fc1 weight"],
            f"{prefix}.input_layernorm.weight": SPECS["norm"],
        }

    assert describe_imbalance(specs, 2) == "tp 2 cuts unevenly: word_embeddings 99 as 50 + 49, linear_qkv 3 as 2 + 1"
    assert describe_imbalance(specs, 3) == "tp 3 cuts unevenly: linear_fc1 22 as 8 + 8 + 6"


# --- more ranks than units

HEAD = 2
GROUPED = {
    "qkv weight": ParameterSpec((3, (4 + 2) * HEAD, HIDDEN), 0, 2, num_subunits=4, num_shared=2 * HEAD),
    "qkv bias": ParameterSpec((3, (4 + 2) * HEAD), 0, 2, num_subunits=4, num_shared=2 * HEAD),
    "proj weight": ParameterSpec((HIDDEN, 3, 4 * HEAD), 1, 1, num_subunits=4),
}
"""3 groups of 4 query heads each, which share a key and a value."""


def part_of_a_group(whole: torch.Tensor, name: str, tp_size: int, tp_rank: int, *, replicas: bool) -> torch.Tensor:
    """What a rank has, written out: its group, of that its query heads, and of the qkv the key and the value."""
    ranks_per_group = tp_size // 3
    group, part = divmod(tp_rank, ranks_per_group)
    heads = 4 // ranks_per_group
    own = slice(part * heads * HEAD, (part + 1) * heads * HEAD)
    if name == "proj weight":
        return whole[:, group : group + 1, own]
    queries, shared = whole[group : group + 1, own], whole[group : group + 1, 4 * HEAD :]
    return torch.cat([queries, shared], dim=1) if replicas or part == 0 else queries


@pytest.mark.parametrize("tp_size", [6, 12])
@pytest.mark.parametrize("name", GROUPED)
def test_a_group_is_dealt_out_by_query_heads_and_each_rank_has_the_key_and_the_value(name, tp_size):
    spec = GROUPED[name]
    whole = torch.arange(math.prod(spec.shape)).view(spec.shape)
    parts = [part_of_a_group(whole, name, tp_size, rank, replicas=True) for rank in range(tp_size)]

    for rank, expected in enumerate(parts):
        rows, columns = spec.block(tp_size, rank)
        found = whole.view(spec.matrix_shape)[rows, columns]
        assert spec.local_shape(tp_size, rank) == tuple(expected.shape)
        assert torch.equal(found.reshape(expected.shape), expected)
    assert spec.global_shape(tp_size) == tuple(torch.cat(parts, spec.shard_dim).shape)
    assert torch.equal(join_parts(parts, spec), whole)


@pytest.mark.parametrize("tp_size", [6, 12])
@pytest.mark.parametrize("name", GROUPED)
def test_of_what_several_ranks_hold_the_file_of_the_first_has_it_and_together_the_files_have_everything_once(
    name, tp_size
):
    spec = GROUPED[name]
    whole = torch.arange(math.prod(spec.shape)).view(spec.shape)

    stored = []
    for rank in range(tp_size):
        rows, columns = spec.stored_block(tp_size, rank)
        expected = part_of_a_group(whole, name, tp_size, rank, replicas=False)
        assert spec.stored_shape(tp_size, rank) == tuple(expected.shape)
        stored.append(whole.view(spec.matrix_shape)[rows, columns].flatten())
        assert torch.equal(stored[-1], expected.flatten())
    assert torch.equal(torch.cat(stored).sort().values, whole.flatten())


def test_sizes_that_the_query_heads_of_a_group_divide_are_accepted_and_others_refused_with_those():
    for tp_size in (1, 2, 3, 6, 12):
        check_tensor_parallel(GROUPED, tp_size)
    for tp_size in (4, 5, 8, 9, 24):
        with pytest.raises(
            LayoutError,
            match=r"into 3 along axis 0, and each of these only into equal parts of its 4, .*1, 2, 3, 6, 12$",
        ):
            check_tensor_parallel(GROUPED, tp_size)


def test_ranks_hold_the_query_heads_in_their_order():
    spec = GROUPED["qkv weight"]

    assert [spec.subunit_bounds(6, rank) for rank in range(6)] == [(0, 2), (2, 4), (4, 6), (6, 8), (8, 10), (10, 12)]
    assert [spec.subunit_bounds(2, rank) for rank in range(2)] == [(0, 8), (8, 12)]


def test_ranks_that_share_a_group_are_no_imbalance():
    by_native_names = {f"attention.{name.replace(' ', '.')}": spec for name, spec in GROUPED.items()}

    assert describe_imbalance(by_native_names, 6) is None
    assert describe_imbalance(by_native_names, 2) == "tp 2 cuts unevenly: qkv 3 as 2 + 1, proj 3 as 2 + 1"
