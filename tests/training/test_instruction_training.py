"""Training on conversations. The truth is transformers on each conversation alone, with labels of -100 elsewhere."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F  # noqa: N812
from transformers import AutoModelForCausalLM

import megacore
import tiny_chat
from in_soak import all_but
from instruction_on_rank import losses_and_norms
from megacore.checkpoint import Checkpoint
from megacore.data import (
    IndexedDatasetWriter,
    InstructionDataset,
    InstructionDescription,
    InstructionSamples,
    SampleOrder,
)
from megacore.errors import ConfigError, DataError
from megacore.parallel import ParallelContext
from megacore.training import Engine, RunConfig, batches, read_run_config, train
from megacore.training.batches import open_samples
from megacore.training.resolved import parallel_sizes, resolve_run
from recorded_steps import train_steps
from tiny_chat import write_tokenizer
from tiny_llama import VOCAB, published_model
from tiny_models import tied_multi_query_falcon
from tiny_run import weights
from training_on_rank import evaluated, whole_gradients

NUM_CONVERSATIONS, SEQ_LENGTH, BATCH = 13, 40, 8

RUN_FILE = """
model = {{ checkpoint = "{place}/{family}", dtype = "fp64" }}
data = {{ prefix = "{place}/chats", seq_length = 40, kind = "instruction" }}
optimizer = {{ lr = 0.01 }}
training = {{ train_iters = 3, global_batch_size = 8 }}
output.checkpoint = "{out}"
"""


def write_conversations(prefix: Path) -> list[tuple[list[int], list[int]]]:
    """One fills a sample exactly, one is longer, one has nothing of the assistant's."""
    rng = np.random.default_rng(0)
    lengths = [SEQ_LENGTH + 1, SEQ_LENGTH + 9, 2, 17, *rng.integers(3, 34, NUM_CONVERSATIONS - 4)]
    conversations = [(rng.integers(0, VOCAB, n).tolist(), rng.integers(0, 3, n).tolist()) for n in lengths]
    conversations[4] = (conversations[4][0], [1] * len(conversations[4][0]))
    for name, column in (("text", 0), ("role", 1)):
        with IndexedDatasetWriter(f"{prefix}-{name}", "uint16") as writer:
            for conversation in conversations:
                writer.add_document(conversation[column])
    return conversations


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("chats")
    published_model(place / "published-llama")
    tied_multi_query_falcon(place / "published-falcon")
    for family in ("llama", "falcon"):
        megacore.convert(family, place / f"published-{family}", place / family)
    write_conversations(place / "chats")
    return place


def run_of(place: Path, out: Path, *overrides: str, family: str = "llama") -> RunConfig:
    file = out.with_suffix(".toml")
    file.write_text(RUN_FILE.format(place=place, family=family, out=out))
    return read_run_config(file, overrides)


@pytest.fixture(scope="module")
def expected(place, tmp_path_factory):
    """By family and by what other tokens count, the loss and the gradient's norm of each batch, from transformers."""
    conversations = write_conversations(tmp_path_factory.mktemp("again") / "chats")
    order = SampleOrder(NUM_CONVERSATIONS, 1234)
    found: dict[tuple[str, float], list[tuple[float, float]]] = {}

    def of(family: str, scalar_loss_mask: float = 0.0) -> list[tuple[float, float]]:
        if (family, scalar_loss_mask) not in found:
            model = AutoModelForCausalLM.from_pretrained(place / f"published-{family}", dtype=torch.float64)
            found[family, scalar_loss_mask] = [
                of_batch(
                    model, [conversations[order[number]] for number in range(first, first + BATCH)], scalar_loss_mask
                )
                for first in range(0, 3 * BATCH, BATCH)
            ]
        return found[family, scalar_loss_mask]

    return of


def of_batch(model, batch, scalar_loss_mask: float) -> tuple[float, float]:
    model.zero_grad()
    loss, weight = torch.zeros((), dtype=torch.float64), 0.0
    for ids, roles in batch:
        ids, roles = torch.tensor([ids[: SEQ_LENGTH + 1]]), torch.tensor([roles[: SEQ_LENGTH + 1]])
        for role_counts, counts in ((roles == 2, 1.0), (roles != 2, scalar_loss_mask)):
            labels = torch.where(role_counts, ids, -100)
            number = int((labels[:, 1:] != -100).sum())
            if number and counts:
                # Not the loss that the model returns, which is computed in 32 bit.
                logits = model(input_ids=ids).logits[0, :-1]
                loss = loss + counts * F.cross_entropy(logits, labels[0, 1:], ignore_index=-100, reduction="sum")
                weight += counts * number
    (loss / weight).backward()
    squares = [parameter.grad.square().sum() for parameter in model.parameters() if parameter.grad is not None]
    return loss.item() / weight, torch.stack(squares).sum().sqrt().item()


PADDED = {
    "one process": [],
    "one process, 4 at once": ["training.micro_batch_size=4"],
    "variable lengths": ["data.variable_seq_lengths=true"],
    "variable lengths, 2 at once": ["data.variable_seq_lengths=true", "training.micro_batch_size=2"],
    "variable lengths, dp 4": ["data.variable_seq_lengths=true", "parallel.nproc_per_node=4"],
    "variable lengths, pp 2": ["data.variable_seq_lengths=true", "parallel.pipeline_parallel=2"],
    "variable lengths, pp 2, interleaved, dp 2": [
        "data.variable_seq_lengths=true", "parallel.pipeline_parallel=2", "parallel.nproc_per_node=4",
        "parallel.pipeline_schedule=Interleaved1F1B",
    ],
    "variable lengths, tp 2, sequence parallelism, pp 2": [
        "data.variable_seq_lengths=true", "parallel.pipeline_parallel=2", "parallel.tensor_parallel=2",
        "parallel.sequence_parallel=true", "training.micro_batch_size=2",
    ],
    "variable lengths, sharded": [
        "data.variable_seq_lengths=true", "parallel.nproc_per_node=2", "parallel.data_parallel=sharded",
    ],
}  # fmt: skip


# Conversations, padded and packed, are in every kind of layout in test_layouts.py.
@pytest.mark.parametrize(
    "layout",
    all_but(["one process", "variable lengths, 2 at once", "variable lengths, pp 2, interleaved, dp 2"], PADDED),
)
def test_losses_and_gradients_are_those_of_each_conversation_alone(place, expected, ranks, tmp_path, layout):
    """Of a Falcon, which has no token for padding."""
    run = run_of(place, tmp_path / "out", *PADDED[layout], family="falcon")
    for found in ranks.run(losses_and_norms, run, sizes=parallel_sizes(run.parallel)):
        np.testing.assert_allclose(found, expected("falcon"), rtol=1e-9)


PACKED = {
    "one process": [],
    "variable lengths": ["data.variable_seq_lengths=true"],
    "pp 2, dp 2": ["parallel.pipeline_parallel=2", "parallel.nproc_per_node=4"],
    "tp 2, sequence parallelism": ["parallel.tensor_parallel=2", "parallel.sequence_parallel=true"],
}


@pytest.mark.parametrize("layout", all_but(["one process", "pp 2, dp 2"], PACKED))
def test_packed_conversations_have_the_loss_and_gradients_of_each_alone(place, ranks, tmp_path, layout):
    """A batch of all rows, so of all conversations once."""
    conversations = write_conversations(tmp_path / "chats")
    model = AutoModelForCausalLM.from_pretrained(place / "published-falcon", dtype=torch.float64)
    samples = InstructionSamples(InstructionDataset(place / "chats"), SEQ_LENGTH, packing=True)
    num_rows = len(samples)
    assert num_rows < len(conversations) - 3
    settings = ("data.packing=true", f"training.global_batch_size={num_rows}", "training.train_iters=2")
    if num_rows % 4:  # two samples of a replica at least, and as many on each
        settings = (*settings, f"training.global_batch_size={num_rows * 4}")
    run = run_of(place, tmp_path / "out", *settings, *PACKED[layout], family="falcon")

    for found in ranks.run(losses_and_norms, run, sizes=parallel_sizes(run.parallel)):
        np.testing.assert_allclose(found, [of_batch(model, conversations, 0.0)] * 2, rtol=1e-9)


def packed_run(place: Path, out: Path) -> RunConfig:
    """One whose first batch is all rows, so all conversations once."""
    num_rows = len(InstructionSamples(InstructionDataset(place / "chats"), SEQ_LENGTH, packing=True))
    settings = ("data.packing=true", f"training.global_batch_size={num_rows}", "training.micro_batch_size=1")
    return run_of(place, out, *settings, family="falcon")


def test_each_gradient_of_packed_conversations_is_the_sum_of_those_of_each_alone(place, tmp_path):
    """Those of transformers take the way of the weights: through a checkpoint that is converted."""
    model = AutoModelForCausalLM.from_pretrained(place / "published-falcon", dtype=torch.float64)
    expected_loss, _ = of_batch(model, write_conversations(tmp_path / "chats"), 0.0)
    for parameter in model.parameters():
        parameter.data = parameter.grad
    model.save_pretrained(tmp_path / "gradients")
    megacore.convert("falcon", tmp_path / "gradients", tmp_path / "native")

    loss, gradients = whole_gradients(ParallelContext.single(), packed_run(place, tmp_path / "out"))

    assert loss == pytest.approx(expected_loss, rel=1e-12)
    expected = weights(tmp_path / "native")
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient.reshape(expected[name].shape), expected[name], rtol=1e-9, atol=1e-12)


def test_each_token_of_packed_conversations_has_the_loss_that_it_has_alone(place, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(place / "published-falcon", dtype=torch.float64)
    alone: dict[tuple[int, ...], torch.Tensor] = {}
    for conversation, _ in write_conversations(tmp_path / "chats"):
        ids = torch.tensor(conversation[: SEQ_LENGTH + 1])
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0, :-1]
        alone[tuple(ids.tolist())] = F.cross_entropy(logits, ids[1:], reduction="none")
    run = packed_run(place, tmp_path / "out")
    checkpoint = Checkpoint(run.model.checkpoint)
    batch = next(batches(run, checkpoint))

    scores = Engine(resolve_run(run), ParallelContext.single()).score(batch)

    found = 0
    for row, segments in enumerate(batch.segments):
        for segment in segments.unique():
            places = (segments == segment).nonzero().flatten()
            targets = batch.tokens[row, places + 1]
            ids = (int(batch.tokens[row, places[0]]), *targets.tolist())
            # The last target of a segment is the first token of the next one, but for one that fills the row.
            own = next((ids[:n] for n in range(len(ids), 1, -1) if ids[:n] in alone), None)
            if own is not None:
                torch.testing.assert_close(scores[row, places, 0][: len(own) - 1], alone[own], rtol=1e-9, atol=1e-12)
                found += 1
    assert found == NUM_CONVERSATIONS


def test_so_they_are_of_a_llama_whose_norms_transformers_computes_in_32_bit(place, expected, ranks, tmp_path):
    run = run_of(place, tmp_path / "out", "training.micro_batch_size=2", family="llama")
    [found] = ranks.run(losses_and_norms, run, sizes=parallel_sizes(run.parallel))
    np.testing.assert_allclose(found, expected("llama"), rtol=1e-6)


def test_other_tokens_than_the_assistants_count_what_the_run_file_says(place, expected, ranks, tmp_path):
    run = run_of(place, tmp_path / "out", "data.scalar_loss_mask=0.25", family="falcon")
    [found] = ranks.run(losses_and_norms, run, sizes=parallel_sizes(run.parallel))
    np.testing.assert_allclose(found, expected("falcon", 0.25), rtol=1e-9)


def test_a_batch_without_anything_to_learn_has_a_loss_and_gradients_of_zero(place, ranks, tmp_path):
    for name, column in (("text", [5, 6, 7]), ("role", [1, 1, 1])):
        with IndexedDatasetWriter(tmp_path / f"chats-{name}", "uint16") as writer:
            writer.add_document(column)
    run = run_of(place, tmp_path / "out", f"data.prefix={tmp_path}/chats")
    [found] = ranks.run(losses_and_norms, run, sizes=parallel_sizes(run.parallel))
    assert found == [(0.0, 0.0)] * 3


# --- batches


def test_a_packed_batch_has_the_segments_of_its_samples(place, tmp_path):
    run = run_of(place, tmp_path / "out", "data.packing=true")
    for batch in batches(run, Checkpoint(place / "llama")):
        assert batch.segments.shape == batch.loss_mask.shape == (BATCH, SEQ_LENGTH)
        assert batch.segments.dtype == torch.int32
        steps = batch.segments.diff(dim=1)
        assert ((steps == 0) | (steps == 1)).all() and (batch.segments[:, 0] == 0).all()


@pytest.mark.parametrize("packing", ["true", "false"])
def test_the_samples_of_a_batch_are_the_same_for_any_number_of_processes(place, tmp_path, packing):
    run = run_of(place, tmp_path / "out", f"data.packing={packing}")
    checkpoint = Checkpoint(place / "llama")
    for number, whole in enumerate(batches(run, checkpoint)):
        parts = [next(islice(batches(run, checkpoint, dp_rank=rank, dp_size=4), number, None)) for rank in range(4)]
        for name in ("tokens", "loss_mask", "sample_ids"):
            assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name))


def test_variable_lengths_are_the_least_multiples_of_16_that_a_micro_batch_fits_or_the_whole_length(place, tmp_path):
    run = run_of(place, tmp_path / "out", "data.variable_seq_lengths=true", "training.micro_batch_size=2")
    fixed = run_of(place, tmp_path / "fixed", "training.micro_batch_size=2")
    checkpoint = Checkpoint(place / "llama")
    seen = set()
    for batch, whole in zip(batches(run, checkpoint), batches(fixed, checkpoint), strict=True):
        lengths = batch.micro_batch_lengths
        assert batch.tokens.shape[1] == max(lengths) + 1 and len(lengths) == BATCH // 2
        for number, length in enumerate(lengths):
            rows = slice(2 * number, 2 * number + 2)
            needed = max(int(row.nonzero().max()) if row.any() else 0 for row in whole.tokens[rows])
            assert needed <= length and (length == SEQ_LENGTH or length % 16 == 0)
            assert length == min(SEQ_LENGTH, -(-needed // 16) * 16) or whole.tokens[rows, needed + 1 :].numel() == 0
            seen.add(length)
        assert F.pad(batch.tokens, (0, SEQ_LENGTH - max(lengths))).equal(whole.tokens)
    assert seen == {16, 32, 40}


def test_with_pipeline_parallelism_all_micro_batches_of_a_step_are_of_one_length(place, tmp_path):
    run = run_of(place, tmp_path / "out", "data.variable_seq_lengths=true", "parallel.pipeline_parallel=2")
    for batch in batches(run, Checkpoint(place / "llama")):
        assert set(batch.micro_batch_lengths) == {batch.tokens.shape[1] - 1}


# --- the whole run, and what is refused


def test_a_run_says_what_it_trains_on_and_saves_a_checkpoint(place, tmp_path):
    run = run_of(place, tmp_path / "out", "data.variable_seq_lengths=true")
    notes: list[str] = []
    steps = train_steps(run, on_note=notes.append)
    assert steps[-1].loss < steps[0].loss and (tmp_path / "out/megacore.json").is_file()
    assert any("13 conversations in 13 samples, " in note and "of their 40 tokens filled" in note for note in notes)
    assert f"{place}/chats: 1 conversations of more than 41 tokens are truncated" in notes


def test_from_records_to_the_loss_all_is_as_transformers_has_it(tmp_path, ranks):
    tokenizer = write_tokenizer(tmp_path / "tokenizer", tiny_chat.CHATML)
    records = tiny_chat.write_conversations(tmp_path / "chats.jsonl", tiny_chat.CONVERSATIONS)
    megacore.tokenize_chat(records, tokenizer=tmp_path / "tokenizer", out=tmp_path / "chats")
    published_model(tmp_path / "published", vocab_size=420)
    megacore.convert("llama", tmp_path / "published", tmp_path / "llama")
    overrides = ["data.seq_length=200", "training.train_iters=1", "training.global_batch_size=5"]
    run = run_of(tmp_path, tmp_path / "out", *overrides)

    [[(found, _)]] = ranks.run(losses_and_norms, run, sizes=parallel_sizes(run.parallel))

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "published", dtype=torch.float64)
    losses = []
    for chat in tiny_chat.CONVERSATIONS:
        encoded = tokenizer.apply_chat_template(
            chat, return_dict=True, return_assistant_tokens_mask=True, chat_template=tiny_chat.MARKED_CHATML
        )
        ids, mask = torch.tensor(encoded["input_ids"]), torch.tensor(encoded["assistant_masks"])
        logits = model(input_ids=ids.unsqueeze(0)).logits[0, :-1]
        losses.append(F.cross_entropy(logits, ids[1:], reduction="none")[mask[1:] == 1])
    assert found == pytest.approx(torch.cat(losses).mean().item(), rel=1e-6)


def test_dropped_conversations_are_told_too(place, tmp_path):
    run = run_of(place, tmp_path / "out", "data.overlong=drop", "training.train_iters=1")
    notes: list[str] = []
    train(run, on_note=notes.append)
    assert f"{place}/chats: 1 conversations of more than 41 tokens are dropped" in notes


def test_keys_for_text_are_refused_for_conversations(place, tmp_path):
    with pytest.raises(ConfigError, match=r'eod_mask_loss and split belong to data.kind = "text"'):
        run_of(place, tmp_path / "out", "data.split=[9, 1]", "data.eod_mask_loss=true")


def test_conversations_of_several_datasets_are_mixed(place, ranks, tmp_path):
    mixture = f'data.prefix=[{{prefix="{place}/chats",weight=1}},{{prefix="{place}/chats",weight=3}}]'
    run = run_of(place, tmp_path / "out", mixture, "data.variable_seq_lengths=true", family="falcon")
    notes: list[str] = []
    steps = train_steps(run, on_note=notes.append)
    assert steps[-1].loss < steps[0].loss
    assert any(note.startswith("to train on: ") and "75.00% of the samples" in note for note in notes)


def test_keys_for_conversations_are_refused_for_text(place, tmp_path):
    with pytest.raises(
        ConfigError, match=r'overlong and packing belong to data.kind = "instruction", and that is "text"'
    ):
        run_of(place, tmp_path / "out", "data.kind=text", "data.packing=true", "data.overlong=drop")


def test_a_dataset_of_text_is_refused_where_conversations_are_asked_for(place, tmp_path):
    with IndexedDatasetWriter(tmp_path / "text", "uint16") as writer:
        writer.add_document([1, 2])
    with pytest.raises(
        DataError, match="is a dataset of text, not of conversations; make those with megacore tokenize"
    ):
        train(run_of(place, tmp_path / "out", f"data.prefix={tmp_path}/text"))


def test_conversations_of_a_larger_vocabulary_are_refused(place, tmp_path):
    for suffix in ("text.bin", "text.idx", "role.bin", "role.idx"):
        (tmp_path / f"chats-{suffix}").symlink_to(place / f"chats-{suffix}")
    description = InstructionDescription(
        tokenizer_file="tokenizer.json", tokenizer_sha256="0", vocab_size=VOCAB + 1, markup="template",
        template_sha256=None, num_conversations=1, num_tokens=1, num_assistant_tokens=1, megacore_version="0",
    )  # fmt: skip
    (tmp_path / "chats.json").write_text(description.to_json())
    with pytest.raises(DataError, match="made with a tokenizer of 100 ids, and the checkpoint's vocabulary has 99"):
        train(run_of(place, tmp_path / "out", f"data.prefix={tmp_path}/chats"))


# --- evaluation

EVALUATED = {
    "one process, variable lengths": ["data.variable_seq_lengths=true"],
    "dp 2, packed": ["data.packing=true", "parallel.nproc_per_node=2"],
    "pp 2, interleaved, variable lengths, 2 at once": [
        "data.variable_seq_lengths=true", "parallel.pipeline_parallel=2", "training.micro_batch_size=2",
        "parallel.pipeline_schedule=Interleaved1F1B",
    ],
    "tp 2 with sequence parallelism, packed, all tokens counted": [
        "data.packing=true", "parallel.tensor_parallel=2", "parallel.sequence_parallel=true", "data.scalar_loss_mask=1",
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    "layout",
    all_but(["one process, variable lengths", "tp 2 with sequence parallelism, packed, all tokens counted"], EVALUATED),
)
def test_an_evaluation_has_the_figures_of_transformers_on_each_conversation_alone(place, ranks, tmp_path, layout):
    conversations = write_conversations(tmp_path / "again")
    model = AutoModelForCausalLM.from_pretrained(place / "published-llama", dtype=torch.float64)
    counts = 1.0 if "all tokens" in layout else 0.0
    overrides = [f"data.valid_prefix={place / 'chats'}", "evaluation.iters=all", 'evaluation.metrics=["all"]']
    run = run_of(place, tmp_path / "out", *overrides, *EVALUATED[layout])

    evaluations = ranks.run(evaluated, run, sizes=parallel_sizes(run.parallel))

    expected = figures_of(model, conversations, counts)
    for evaluation in evaluations:
        values = dict(evaluation.values)
        samples = len(open_samples(run, Checkpoint(place / "llama"), "valid").sources[0])
        for name in ("count_loss_mask", "count_instruct_mask"):
            values[name] *= samples  # how many conversations are in one depends on packing
        assert values == pytest.approx(expected, rel=1e-6)


def figures_of(model, conversations, scalar_loss_mask: float) -> dict[str, float]:
    """Loss and metrics over the tokens of all conversations; the counts are of all of them together."""
    losses, is_top, is_assistant = [], [], []
    for ids, roles in conversations:
        tokens = torch.tensor([ids[: SEQ_LENGTH + 1]])
        with torch.no_grad():
            logits = model(input_ids=tokens).logits[0, :-1]
        losses.append(F.cross_entropy(logits, tokens[0, 1:], reduction="none"))
        is_top.append(logits.argmax(-1) == tokens[0, 1:])
        is_assistant.append(torch.tensor(roles[1 : SEQ_LENGTH + 1]) == 2)
    loss, right, of_assistant = torch.cat(losses), torch.cat(is_top), torch.cat(is_assistant)
    is_learned = torch.ones_like(of_assistant) if scalar_loss_mask else of_assistant
    return {
        "loss": loss[is_learned].mean().item(),
        "perplexity": loss[is_learned].mean().exp().item(),
        "accuracy": right[is_learned].double().mean().item(),
        "instruct_accuracy": right[of_assistant].double().mean().item(),
        "count_loss_mask": is_learned.sum().item(),
        "count_instruct_mask": of_assistant.sum().item(),
    }
