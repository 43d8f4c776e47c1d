"""Which layers each pipeline stage has, and which stages each process."""

from __future__ import annotations

import itertools

import pytest
import torch

from megacore.errors import LayoutError
from megacore.parallel import (
    SCHEDULES,
    ParallelContext,
    ParallelSizes,
    Stage,
    balanced_stages,
    check_schedule,
    local_stages,
    stages_from_counts,
)


def heaviest(counts: tuple[int, ...], embedding: float, head: float) -> float:
    weights = [float(count) for count in counts]
    weights[0] += embedding
    weights[-1] += head
    return max(weights)


@pytest.mark.parametrize(("embedding", "head"), [(0, 0), (0.6, 0.6), (2.5, 2.5), (0, 7), (30, 1)])
@pytest.mark.parametrize("num_stages", [1, 2, 3, 4])
@pytest.mark.parametrize("num_layers", [4, 5, 8, 11])
def test_no_other_way_to_spread_the_layers_has_a_lighter_heaviest_stage(num_layers, num_stages, embedding, head):
    stages = balanced_stages(num_layers, num_stages, embedding=embedding, head=head)

    counts = tuple(len(stage.layers) for stage in stages)
    others = (
        other for other in itertools.product(range(1, num_layers + 1), repeat=num_stages) if sum(other) == num_layers
    )
    assert sum(counts) == num_layers
    assert min(counts) >= 1
    assert heaviest(counts, embedding, head) == min(heaviest(other, embedding, head) for other in others)


def test_stages_follow_each_other_and_know_their_ends():
    first, middle, last = stages_from_counts([2, 1, 3])

    assert [list(stage.layers) for stage in (first, middle, last)] == [[0, 1], [2], [3, 4, 5]]
    assert [stage.is_first for stage in (first, middle, last)] == [True, False, False]
    assert [stage.is_last for stage in (first, middle, last)] == [False, False, True]
    assert Stage.whole(5).is_first
    assert Stage.whole(5).is_last


def test_more_stages_than_layers_are_refused():
    with pytest.raises(LayoutError, match=r"6 pipeline stages are more than the model's 5 layers.*can be 1 to 5"):
        balanced_stages(5, 6)


def on_rank(rank: int, pp: int) -> ParallelContext:
    class AtRank(ParallelContext):
        pp_rank = rank

    return AtRank(device=torch.device("cpu"), sizes=ParallelSizes(pp=pp))


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("Interleaved1F1B", [[0, 2], [1, 3]]),
        ("InterleavedZeroBubble", [[0, 2], [1, 3]]),
        ("ZBVZeroBubble", [[0, 3], [1, 2]]),
        ("DualPipeV", [[0, 3], [1, 2]]),
    ],
)
def test_a_process_has_every_second_stage_or_those_of_a_v(schedule, expected):
    stages = balanced_stages(5, 4)

    found = [[stage.index for stage in local_stages(schedule, stages, on_rank(rank, 2))] for rank in (0, 1)]

    assert found == expected


@pytest.mark.parametrize(
    ("schedule", "stages_per_rank", "num_micro_batches", "message"),
    [
        ("1F1B", 2, 8, r"1F1B takes stages_per_rank 1, not 2: set parallel\.stages_per_rank to 1"),
        ("ZBVZeroBubble", 3, 8, r"ZBVZeroBubble takes stages_per_rank 2, not 3"),
        ("1F1B", 1, 3, r"1F1B at pp 4 needs at least 4 micro-batches, and a global batch gives each replica 3: raise"),
        ("DualPipeV", 2, 7, r"DualPipeV at pp 4 needs at least 8 micro-batches"),
        ("Interleaved1F1B", 2, 9, r"takes micro-batches in 2 equal rounds, and .* each replica 9: .* a multiple of 4"),
    ],
)
def test_a_schedule_whose_demands_are_not_met_is_refused(schedule, stages_per_rank, num_micro_batches, message):
    with pytest.raises(LayoutError, match=message):
        check_schedule(schedule, pp=4, stages_per_rank=stages_per_rank, num_micro_batches=num_micro_batches)


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_is_accepted_with_what_it_needs(name):
    check_schedule(name, pp=4, stages_per_rank=SCHEDULES[name].stages_per_rank or 2, num_micro_batches=8)
