"""Which worlds the sizes of the parallel axes fit, and what is said of the others."""

from __future__ import annotations

import re

import pytest

from megacore.errors import LayoutError
from megacore.parallel import ParallelSizes


def test_what_tensor_and_pipeline_parallelism_leave_is_data_parallel():
    sizes = ParallelSizes.of_world(16, tp=4, pp=2)

    assert sizes == ParallelSizes(tp=4, pp=2, dp_replicate=2)
    assert (sizes.dp, sizes.world) == (2, 16)


@pytest.mark.parametrize(
    ("dp_shard", "replicas", "shard"),
    [(1, 4, 1), (None, 1, 4), (2, 2, 2)],
    ids=["replicated", "sharded", "hybrid"],
)
def test_the_data_parallel_processes_hold_whole_copies_or_parts_of_one(dp_shard, replicas, shard):
    sizes = ParallelSizes.of_world(8, tp=2, dp_shard=dp_shard)

    assert (sizes.dp_replicate, sizes.dp_shard) == (replicas, shard)
    assert (sizes.dp, sizes.world) == (4, 8)


@pytest.mark.parametrize(
    ("world", "tp", "pp", "message"),
    [
        (
            6,
            4,
            1,
            "6 processes cannot be laid out as tp 4 × pp 1, which takes a multiple of 4. Start 4, 8, 12 …, or choose "
            "tp and pp so that tp × pp is 1, 2, 3 or 6; the rest is data-parallel",
        ),
        (
            2,
            2,
            2,
            "2 processes cannot be laid out as tp 2 × pp 2, which takes a multiple of 4. Start 4, 8, 12 …, or choose "
            "tp and pp so that tp × pp is 1 or 2; the rest is data-parallel",
        ),
        (
            1,
            2,
            1,
            "1 process cannot be laid out as tp 2 × pp 1, which takes a multiple of 2. Start 2, 4, 6 …, or choose tp 1 "
            "and pp 1",
        ),
    ],
)
def test_a_world_that_the_model_cannot_be_cut_over_is_refused_with_the_sizes_that_would_do(world, tp, pp, message):
    with pytest.raises(LayoutError, match=f"^{re.escape(message)}$"):
        ParallelSizes.of_world(world, tp=tp, pp=pp)


def test_shards_that_the_data_parallel_processes_cannot_be_grouped_into_are_refused():
    message = (
        "12 processes at tp 2 × pp 1 leave a data-parallel size of 6, which shards of 4 processes do not divide. "
        "Sizes of a shard that would: 1, 2, 3, 6"
    )
    with pytest.raises(LayoutError, match=f"^{message}$"):
        ParallelSizes.of_world(12, tp=2, dp_shard=4)


def test_a_world_of_the_right_size_passes_and_any_other_is_refused():
    sizes = ParallelSizes(tp=2, pp=2)

    sizes.check_world(4)
    with pytest.raises(LayoutError) as too_many:
        sizes.check_world(8)
    with pytest.raises(LayoutError) as too_few:
        sizes.check_world(1)

    assert str(too_many.value) == (
        "8 processes were started for tp 2 × pp 2, which takes 4. Start 4, or choose tp and pp so that tp × pp is "
        "1, 2, 4 or 8; the rest is data-parallel"
    )
    assert str(too_few.value) == (
        "1 process was started for tp 2 × pp 2, which takes 4. Start 4, or choose tp 1 and pp 1"
    )


def test_a_layout_is_named_by_the_axes_that_have_several_processes():
    assert str(ParallelSizes(tp=2, dp_replicate=2, dp_shard=3)) == "tp 2 × dp 6"
    assert str(ParallelSizes()) == "tp 1"
