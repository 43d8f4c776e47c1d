"""Conversations as samples: what is learned of them, how they are padded, packed, cut."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megacore.data import IndexedDatasetWriter, InstructionDataset, InstructionSamples
from megacore.data.sampling.instruction_samples import padded
from megacore.errors import DataError

SYSTEM, PROMPTER, ASSISTANT = 0, 1, 2

CONVERSATIONS = [
    ([11, 12, 13, 14, 15], [SYSTEM, PROMPTER, ASSISTANT, ASSISTANT, PROMPTER]),
    ([21, 22, 23], [PROMPTER, ASSISTANT, ASSISTANT]),
    ([31, 32, 33, 34, 35, 36, 37], [ASSISTANT, PROMPTER, PROMPTER, PROMPTER, PROMPTER, PROMPTER, ASSISTANT]),
    ([41, 42], [PROMPTER, ASSISTANT]),
]


def dataset(place: Path, conversations=CONVERSATIONS) -> InstructionDataset:
    for name, column in (("text", 0), ("role", 1)):
        with IndexedDatasetWriter(place / f"chats-{name}", "uint16") as writer:
            for conversation in conversations:
                writer.add_document(conversation[column])
    return InstructionDataset(place / "chats")


def test_a_sample_is_a_conversation_and_padding_that_counts_nothing(tmp_path):
    samples = InstructionSamples(dataset(tmp_path), 8)
    assert len(samples) == 4
    assert samples[0].tokens.tolist() == [11, 12, 13, 14, 15, 0, 0, 0, 0]
    assert samples[0].loss_mask.tolist() == [0, 1, 1, 0, 0, 0, 0, 0]
    assert samples[0].segments is None
    assert samples[0].tokens.dtype == np.int64 and samples[0].loss_mask.dtype == np.float32


def test_what_is_not_the_assistants_counts_scalar_loss_mask_but_padding_nothing(tmp_path):
    samples = InstructionSamples(dataset(tmp_path), 8, scalar_loss_mask=0.25)
    assert samples[0].loss_mask.tolist() == [0.25, 1, 1, 0.25, 0, 0, 0, 0]


def test_a_conversation_whose_answers_are_cut_off_is_left_out_unless_the_rest_counts(tmp_path):
    data = dataset(tmp_path)
    samples = InstructionSamples(data, 5)
    assert (samples.num_overlong, samples.num_cut_short, len(samples)) == (1, 1, 3)
    assert InstructionSamples(data, 5, scalar_loss_mask=0.5).num_cut_short == 0
    only = InstructionSamples(data, 2)
    assert [only[number].tokens.tolist() for number in range(len(only))] == [[11, 12, 13], [21, 22, 23], [41, 42, 0]]


def test_a_conversation_that_fills_a_sample_exactly_is_whole(tmp_path):
    samples = InstructionSamples(dataset(tmp_path), 6)
    assert samples[2].tokens.tolist() == [31, 32, 33, 34, 35, 36, 37]
    assert samples[2].loss_mask.tolist() == [0, 0, 0, 0, 0, 1]
    assert samples.num_overlong == 0


def test_a_longer_one_is_truncated_and_counted(tmp_path):
    samples = InstructionSamples(dataset(tmp_path), 5, scalar_loss_mask=0.5)
    assert samples[2].tokens.tolist() == [31, 32, 33, 34, 35, 36]
    assert (samples.num_overlong, len(samples), samples.num_conversations) == (1, 4, 4)


def test_or_dropped_and_counted(tmp_path):
    samples = InstructionSamples(dataset(tmp_path), 5, overlong="drop")
    assert [sample.tokens[0] for sample in samples] == [11, 21, 41]
    assert (samples.num_overlong, samples.num_conversations) == (1, 3)


def test_a_conversation_with_nothing_to_predict_is_dropped_and_counted(tmp_path):
    found = dataset(tmp_path, [([5], [2]), ([], []), *CONVERSATIONS])
    for packing in (False, True):
        samples = InstructionSamples(found, 8, packing=packing)
        assert (samples.num_short, samples.num_conversations) == (2, 4)
        assert {int(sample.tokens[0]) for sample in samples} <= {11, 21, 31, 41}


@pytest.mark.parametrize("stranger", [3, 7, 1000])
def test_a_role_that_there_is_not_is_refused_when_it_is_read(tmp_path, stranger):
    samples = InstructionSamples(dataset(tmp_path, [*CONVERSATIONS, ([5, 6, 7], [1, stranger, 2])]), 8)
    with pytest.raises(
        DataError, match=rf"chats-role: conversation 4 has role {stranger}, and the format's are 0 system"
    ):
        list(samples)


def test_when_no_conversation_is_left_the_reason_is_told(tmp_path):
    with pytest.raises(DataError, match=r"none of its 4 conversations can be used: 4 have more than 1 tokens"):
        InstructionSamples(dataset(tmp_path), 0, overlong="drop")


def test_and_so_is_that_nothing_to_learn_would_remain_of_those_that_are_cut_short(tmp_path):
    found = dataset(tmp_path, [([1, 2, 3, 4, 5], [1, 1, 1, 2, 2]), ([6, 7, 8, 9], [0, 1, 1, 2]), ([5], [2])])
    message = (
        r"2 have more than 3 tokens \(2 with none of the assistant's before that\), 1 less than two; raise data.seq"
    )
    with pytest.raises(DataError, match=message):
        InstructionSamples(found, 2)


def test_without_padding_samples_are_as_long_as_what_they_hold(tmp_path):
    samples = InstructionSamples(dataset(tmp_path), 6, pads=False)
    assert [len(sample.loss_mask) for sample in samples] == [4, 2, 6, 1]
    assert [len(sample.tokens) for sample in samples] == [5, 3, 7, 2]


# --- packed


def test_packed_conversations_are_segments_and_no_first_token_is_predicted_by_another_conversation(tmp_path):
    # 7 + 3 of 10 tokens, and 5 + 2.
    samples = InstructionSamples(dataset(tmp_path), 9, packing=True, scalar_loss_mask=0.5)
    rows = {int(sample.tokens[0]): sample for sample in samples}
    assert len(samples) == 2
    assert rows[31].tokens.tolist() == [31, 32, 33, 34, 35, 36, 37, 21, 22, 23]
    assert rows[31].segments.tolist() == [0, 0, 0, 0, 0, 0, 0, 1, 1]
    assert rows[31].loss_mask.tolist() == [0.5, 0.5, 0.5, 0.5, 0.5, 1, 0, 1, 1]
    assert rows[11].tokens.tolist() == [11, 12, 13, 14, 15, 41, 42, 0, 0, 0]
    assert rows[11].loss_mask.tolist() == [0.5, 1, 1, 0.5, 0, 1, 0, 0, 0]
    assert rows[11].segments.tolist() == [0, 0, 0, 0, 0, 1, 2, 2, 2]
    assert rows[11].segments.dtype == np.int32


def random_conversations(rng: np.random.Generator, number: int) -> list[tuple[list[int], list[int]]]:
    """None of their ids is 0 or in two of them."""
    lengths = rng.integers(2, 40, number)
    ends = np.cumsum(lengths)
    return [
        (list(range(end - length + 1, end + 1)), rng.integers(0, 3, length).tolist())
        for length, end in zip(lengths, ends, strict=True)
    ]


@pytest.mark.parametrize("overlong", ["truncate", "drop"])
@pytest.mark.parametrize("packing", [False, True])
def test_each_pair_of_input_and_target_is_in_exactly_one_sample_with_its_weight(tmp_path, packing, overlong):
    conversations = random_conversations(np.random.default_rng(3), 97)
    found = dataset(tmp_path, conversations)
    samples = InstructionSamples(found, 29, packing=packing, overlong=overlong, scalar_loss_mask=0.125)
    learned = sorted(
        (int(sample.tokens[place]), int(sample.tokens[place + 1]), float(weight))
        for sample in samples
        for place, weight in enumerate(sample.loss_mask)
        if weight
    )
    kept = [(ids[:30], roles) for ids, roles in conversations if overlong == "truncate" or len(ids) <= 30]
    expected = sorted(
        (ids[place], ids[place + 1], 1.0 if roles[place + 1] == ASSISTANT else 0.125)
        for ids, roles in kept
        for place in range(len(ids) - 1)
    )
    assert learned == expected
    num_inputs = sum(np.count_nonzero(sample.tokens) - 1 for sample in samples)
    assert samples.fill == pytest.approx(num_inputs / (29 * len(samples)), rel=1e-12)


def test_the_rows_of_two_processes_are_the_same(tmp_path):
    found = dataset(tmp_path, random_conversations(np.random.default_rng(4), 97))
    one, other = (InstructionSamples(InstructionDataset(found.prefix), 64, packing=True) for _ in range(2))
    assert all(np.array_equal(one[row].tokens, other[row].tokens) for row in range(len(one)))


def test_padding_a_sample_by_nothing_leaves_it_as_it_is(tmp_path):
    sample = InstructionSamples(dataset(tmp_path), 9, packing=True, pads=False)[0]
    same = padded(sample, len(sample.loss_mask))
    assert same.tokens.tolist() == sample.tokens.tolist() and same.segments.tolist() == sample.segments.tolist()


def test_another_loss_weight_keeps_the_samples(tmp_path):
    """A new selection would drop the first conversation, of whose first five tokens none is the assistant's."""
    for name, columns in (("text", [[1, 2, 3, 4, 5, 6], [7, 8, 9]]), ("role", [[1, 1, 1, 1, 1, 2], [1, 2, 2]])):
        with IndexedDatasetWriter(tmp_path / f"chats-{name}", "uint16") as writer:
            for column in columns:
                writer.add_document(column)
    samples = InstructionSamples(InstructionDataset(tmp_path / "chats"), 4, scalar_loss_mask=0.5)

    assistant_only = samples.with_scalar_loss_mask(0.0)

    assert [list(assistant_only[i].tokens) for i in range(2)] == [list(samples[i].tokens) for i in range(2)]
    assert [list(assistant_only[i].loss_mask) for i in range(2)] == [[0, 0, 0, 0], [1, 1, 0, 0]]
    assert [list(samples[i].loss_mask) for i in range(2)] == [[0.5, 0.5, 0.5, 0.5], [1, 1, 0, 0]]
