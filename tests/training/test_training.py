"""Training: alone, on two ranks, and against transformers and torch; what a run file may say, and what comes out."""

from __future__ import annotations

import itertools
import math
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from torch import Tensor
from transformers import LlamaForCausalLM

import megacore
from megacore.checkpoint import Checkpoint
from megacore.cli import cli
from megacore.data import DatasetDescription, IndexedDataset, IndexedDatasetWriter, SampleOrder, TokenWindows
from megacore.errors import ConfigError, CorruptCheckpointError, DataError, TrainingError
from megacore.model import load_model
from megacore.parallel import ParallelContext, ParallelSizes, parameter_specs
from megacore.testing.ranks import RankError
from megacore.training import RunConfig, Step, read_run_config, trainer
from megacore.training.config import OptimizerSection
from megacore.training.optimizer import build_optimizer
from megacore.training.schedule import Spans, learning_rate
from recorded_steps import steps_on_rank, train_steps
from tiny_llama import VOCAB, published_model, write_dataset
from tiny_run import weights
from training_on_rank import train_on_what_each_sees, trained_replicas, whole_gradients
from warm_commands import run as run_command

STEPS = 10

MODELS = {"untied": {}, "tied, with biases": {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}}
LAYOUTS = {"unsplit": (1, 1), "tp 2": (2, 1), "tp 2, pp 2": (2, 2)}

RUN_FILE = """
[model]
checkpoint = "{checkpoint}"

[data]
prefix = "{data}"
seq_length = 8

[optimizer]
lr = 0.01
min_lr = 0.001
warmup_iters = 3
weight_decay = 0.1

[training]
train_iters = 10
micro_batch_size = 2
global_batch_size = 4

[output]
checkpoint = "{out}"
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """The dataset; and of each model what was published, and native checkpoints in every layout."""
    place = tmp_path_factory.mktemp("training")
    write_dataset(place / "data")
    for model, settings in MODELS.items():
        published_model(place / model / "published", **settings)
        for layout, (tp, pp) in LAYOUTS.items():
            megacore.convert("llama", place / model / "published", place / model / layout, tp=tp, pp=pp)
    return place


def run_file(place: Path, out: Path, model: str = "untied", layout: str = "unsplit") -> Path:
    """A run file beside ``out``."""
    file = out.with_suffix(".toml")
    file.write_text(RUN_FILE.format(checkpoint=place / model / layout, data=place / "data", out=out))
    return file


def run_of(place: Path, out: Path, *overrides: str, model: str = "untied", layout: str = "unsplit") -> RunConfig:
    return read_run_config(run_file(place, out, model, layout), overrides)


def two_ranks(sequence_parallel: bool) -> ParallelSizes:
    return ParallelSizes(tp=2, sequence_parallel=sequence_parallel)


def worst_relative_error(actual: list[float], expected: list[float]) -> float:
    return max(abs(one - other) / abs(other) for one, other in zip(actual, expected, strict=True))


def megacore_command(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


# --- the same on two ranks


@pytest.fixture(scope="module")
def single(place) -> dict[str, list[Step]]:
    """Each model trained by a single process in float64."""
    return {
        model: train_steps(run_of(place, place / f"{model} trained", "model.dtype=fp64", model=model))
        for model in MODELS
    }


@pytest.mark.parametrize(
    ("model", "layout", "sequence_parallel"),
    [
        # Half of them, which have every pair.
        pytest.param(model, layout, is_cut, marks=() if (i + j + is_cut) % 2 == 0 else pytest.mark.soak)
        for (i, model), (j, layout), is_cut in itertools.product(enumerate(MODELS), enumerate(LAYOUTS), [False, True])
    ],
)
def test_two_ranks_train_as_a_single_process_does_from_any_layout(
    ranks, place, single, tmp_path, model, layout, sequence_parallel
):
    run = run_of(place, tmp_path / "out", "model.dtype=fp64", model=model, layout=layout)

    steps, same_steps = ranks.run(steps_on_rank, run, sizes=two_ranks(sequence_parallel))

    assert len(steps) == STEPS
    expected = single[model]
    assert worst_relative_error([s.loss for s in steps], [s.loss for s in expected]) < 1e-10
    assert worst_relative_error([s.grad_norm for s in steps], [s.grad_norm for s in expected]) < 1e-10
    assert [(s.loss, s.grad_norm, s.lr) for s in steps] == [(s.loss, s.grad_norm, s.lr) for s in same_steps]
    trained, expected_weights = weights(tmp_path / "out"), weights(place / f"{model} trained")
    assert trained.keys() == expected_weights.keys()
    for name, matrix in trained.items():
        torch.testing.assert_close(matrix, expected_weights[name], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["whole sequence", "sequence parallel"])
@pytest.mark.parametrize("model", MODELS)
def test_two_ranks_have_the_gradients_of_a_single_process(ranks, place, tmp_path, model, sequence_parallel):
    run = run_of(place, tmp_path / "out", "model.dtype=fp64", model=model)

    (loss, gradients), _ = ranks.run(whole_gradients, run, sizes=two_ranks(sequence_parallel))

    expected_loss, expected = whole_gradients(ParallelContext.single(), run)
    assert loss == pytest.approx(expected_loss, rel=1e-13)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=1e-13)


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["whole sequence", "sequence parallel"])
def test_parameters_that_every_rank_holds_stay_equal_to_the_bit(ranks, place, tmp_path, sequence_parallel):
    run = run_of(place, tmp_path / "out", model="tied, with biases")

    first, second = ranks.run(trained_replicas, run, 5, sizes=two_ranks(sequence_parallel))

    per_layer = {"input_layernorm.weight", "pre_mlp_layernorm.weight",
                 "self_attention.linear_proj.bias", "mlp.linear_fc2.bias"}  # fmt: skip
    expected = {f"decoder.layers.{layer}.{name}" for layer in range(5) for name in per_layer}
    assert first.keys() == second.keys() == expected | {"decoder.final_layernorm.weight"}
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


# --- the same as others compute


@pytest.mark.parametrize("model", MODELS)
def test_losses_and_gradient_norms_are_those_of_transformers_and_torch_on_the_same_batches(place, tmp_path, model):
    steps = train_steps(run_of(place, tmp_path / "out", model=model))

    expected = train_with_transformers(place / model / "published", place / "data")

    assert worst_relative_error([s.lr for s in steps], [lr for lr, _, _ in expected]) < 1e-12
    assert worst_relative_error([s.loss for s in steps], [loss for _, loss, _ in expected]) < 1e-5
    assert worst_relative_error([s.grad_norm for s in steps], [norm for _, _, norm in expected]) < 1e-4


def train_with_transformers(published: Path, data: Path) -> list[tuple[float, float, float]]:
    """The run file's training, written out: learning rate, loss and gradient norm of each step."""
    model = LlamaForCausalLM.from_pretrained(published, dtype=torch.float32, attn_implementation="eager")
    named = list(model.named_parameters())
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for name, p in named if "norm" not in name and "bias" not in name], "weight_decay": 0.1},
            {"params": [p for name, p in named if "norm" in name or "bias" in name], "weight_decay": 0.0},
        ],
        betas=(0.9, 0.95),
        eps=1e-8,
    )
    windows = TokenWindows(IndexedDataset(data), 8)
    order = SampleOrder(len(windows), seed=1234)
    steps = []
    for step in range(1, STEPS + 1):
        lr = 0.01 * step / 4 if step <= 3 else 0.001 + 0.009 * (1 + math.cos(math.pi * (step - 4) / 7)) / 2
        for group in optimizer.param_groups:
            group["lr"] = lr
        batch = torch.stack([torch.from_numpy(windows[order[4 * (step - 1) + i]]) for i in range(4)])
        logits = model(input_ids=batch[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        steps.append((lr, loss.item(), norm.item()))
    return steps


@pytest.mark.parametrize("micro_batch_size", [1, 2])
def test_loss_and_gradients_do_not_depend_on_the_micro_batch_size(place, tmp_path, micro_batch_size):
    def gradients(size: int) -> tuple[float, dict[str, Tensor]]:
        run = run_of(place, tmp_path / "out", "model.dtype=fp64", f"training.micro_batch_size={size}")
        return whole_gradients(ParallelContext.single(), run)

    (loss, in_parts), (expected_loss, at_once) = gradients(micro_batch_size), gradients(4)

    assert loss == pytest.approx(expected_loss, rel=1e-12)
    for name, gradient in in_parts.items():
        torch.testing.assert_close(gradient, at_once[name], rtol=0, atol=1e-12)


def test_a_run_repeated_gives_the_same_losses_to_the_bit(place, tmp_path):
    one, other = (train_steps(run_of(place, tmp_path / name)) for name in ("one", "other"))

    assert [step.loss for step in one] == [step.loss for step in other]


def test_another_seed_gives_other_batches(place, tmp_path):
    one, other = (train_steps(run_of(place, tmp_path / seed, f"data.seed={seed}")) for seed in ("1", "2"))

    assert one[0].loss != other[0].loss


def test_gradients_are_clipped_unless_clip_grad_is_0_and_their_norm_is_that_before(place, tmp_path):
    settings = ("training.train_iters=4", "optimizer.weight_decay=0", "optimizer.eps=1e-3")
    before = weights(place / "untied" / "unsplit")

    def trained(clip_grad: float) -> tuple[float, float]:
        """The gradient norm of the first step, and the furthest that a weight moved in all."""
        out = tmp_path / str(clip_grad)
        steps = train_steps(run_of(place, out, f"optimizer.clip_grad={clip_grad}", *settings))
        after = weights(out)
        return steps[0].grad_norm, max((after[name] - before[name]).abs().max().item() for name in before)

    (clipped_norm, clipped_distance), (free_norm, free_distance) = trained(1e-9), trained(0)
    loose = trained(1e9)

    assert clipped_norm == free_norm > 1
    assert clipped_distance < 1e-6 < 1e-3 < free_distance
    assert loose == (free_norm, free_distance)


# --- optimizer and schedule


def test_weight_decay_shrinks_matrices_and_leaves_norms_and_biases_alone(place):
    checkpoint = Checkpoint(place / "tied, with biases" / "unsplit")
    model = load_model(checkpoint, ParallelContext.single(), dtype=torch.float64)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    settings = OptimizerSection(lr=0.5, weight_decay=0.25)
    optimizer = build_optimizer(model.named_parameters(), parameter_specs(model), settings)

    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()

    for name, parameter in model.named_parameters():
        is_matrix = "norm" not in name and not name.endswith("bias")
        torch.testing.assert_close(parameter.detach(), before[name] * (1 - 0.5 * 0.25 if is_matrix else 1.0))
    assert model.get_parameter("decoder.layers.0.self_attention.linear_qkv.bias").dim() == 2  # a bias, for all that


def test_the_learning_rate_rises_to_the_peak_and_falls_along_half_a_cosine():
    settings = OptimizerSection(lr=1.0, min_lr=0.1)
    spans = Spans(train_iters=8, warmup_iters=4, lr_decay_iters=8)

    rates = [learning_rate(iteration, optimizer=settings, spans=spans) for iteration in range(1, 9)]

    assert rates == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 0.8681980515, 0.55, 0.2318019485], abs=1e-10)


@pytest.mark.parametrize("warmup_iters", [0, 1, 3, 99])
def test_no_step_is_at_0_and_the_one_after_the_warmup_is_at_the_peak(warmup_iters):
    settings = OptimizerSection(lr=1.0, min_lr=0.0)
    spans = Spans(train_iters=100, warmup_iters=warmup_iters, lr_decay_iters=100)

    rates = [learning_rate(iteration, optimizer=settings, spans=spans) for iteration in range(1, 101)]

    assert min(rates) > 0
    assert rates[warmup_iters] == max(rates) == 1.0


def test_the_step_after_the_last_would_be_at_the_minimum():
    settings = OptimizerSection(lr=1.0, min_lr=0.125)
    spans = Spans(train_iters=100, warmup_iters=3, lr_decay_iters=100)

    assert learning_rate(101, optimizer=settings, spans=spans) == 0.125


# --- the run file


def refusal(place: Path, tmp_path: Path, *arguments: str, old: str = "", new: str = "") -> str:
    """What ``megacore train`` says to the run file with ``old`` replaced by ``new``; it must refuse it."""
    file = run_file(place, tmp_path / "out")
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new, 1))

    result = megacore_command("train", file, *arguments)

    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit)
    assert "iteration" not in result.stdout  # refused before training
    assert not (tmp_path / "out").exists()
    return result.stderr


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("seq_length", "seqlength", r"data\.seqlength is unknown; did you mean seq_length\?"),
        ("[optimizer]", "[optimiser]", r"optimiser is unknown; did you mean optimizer\?"),
        ("seq_length = 8", "seq_length = 8\nx = 1", r"data\.x is unknown; known: prefix, seq_length, seed"),
        ("lr = 0.01", "", r"optimizer\.lr is missing"),
        ("[output]", "", r"output is missing"),
        ("seq_length = 8", "seq_length = 8\nmin_lr = 0", r"data\.min_lr is unknown; did you mean optimizer\.min_lr\?"),
        ("lr = 0.01", 'lr = "fast"', r"optimizer\.lr: must be a number, not 'fast'"),
        ("train_iters = 10", "train_iters = 1.5", r"training\.train_iters: must be a whole number, not 1\.5"),
        ("train_iters = 10", "train_iters = 0", r"training\.train_iters: must be greater than 0, not 0"),
        ("[data]", "dtype = 'fp8'\n[data]", r"model\.dtype: must be 'fp32', .* or 'fp16', not 'fp8'"),
        ("lr = 0.01", "lr = nan", r"optimizer\.lr: "),
        ("min_lr = 0.001", "min_lr = 0.1", r"optimizer: min_lr \(0\.1\) must not be above lr \(0\.01\)"),
        ("warmup_iters = 3", "warmup_iters = 10", r"the 10 iterations of the warm-up must be fewer than the 10 after"),
        ("[output]", "[recompute]\nnum_layers = 2\n[output]", r"num_layers \(2\) belongs to .* \"full\", and that is"),
        ("[output]", "[dropout]\nlima = true\n[output]", r"dropout\.lima lets dropout\.hidden rise .* and that is 0"),
        ("[output]", "[parallel]\nstages_per_rank = 2\n[output]", r"stages_per_rank is 2, .* leave .* out"),
        ("batch_size = 2", "batch_size = 3", r"global_batch_size \(4\) must be a multiple of.*micro_batch_size \(3\)"),
        ("[data]", "[data", r"out\.toml is not TOML: .*line 5"),
    ],
)  # fmt: skip
def test_a_run_file_with_a_mistake_is_refused_with_its_place(place, tmp_path, old, new, message):
    assert re.search(message, refusal(place, tmp_path, old=old, new=new))


def test_all_mistakes_of_a_run_file_are_told_at_once(place, tmp_path):
    said = refusal(place, tmp_path, old="lr = 0.01\nmin_lr", new="minlr")

    assert "optimizer.lr is missing" in said
    assert "optimizer.minlr is unknown; did you mean min_lr?" in said


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("lr=1", r"--set takes section\.key=value, for example optimizer\.lr=1e-4; not 'lr=1'"),
        ("optimizer.lr", r"--set takes section\.key=value"),
        ("optimizer.lr.x=1", r"--set takes section\.key=value"),
        ("optimizer.=1", r"--set takes section\.key=value"),
        ("optimizer.learning_rate=1", r"optimizer\.learning_rate is unknown"),
        ("optimiser.lr=1", r"optimiser is unknown; did you mean optimizer\? \(given beside the file\)$"),
        ("optimizer.lrr=1", r"optimizer\.lrr is unknown; did you mean lr\? \(given beside the file\)$"),
        ("optimizer.lr=fast", r"optimizer\.lr: .*, not 'fast'"),
    ],
)
def test_a_malformed_override_is_refused(place, tmp_path, override, message):
    assert re.search(message, refusal(place, tmp_path, "--set", override))


def test_an_override_of_a_section_that_is_no_table_is_refused(place, tmp_path):
    said = refusal(place, tmp_path, "--set", "parallel.tensor_parallel=2", old="\n[model]", new="parallel = 2\n[model]")

    assert "parallel is 2 in the run file, and must be a table" in said


def test_overrides_are_numbers_booleans_and_strings_with_or_without_quotes(place, tmp_path):
    run = run_of(
        place,
        tmp_path / "out",
        "optimizer.lr=2e-3",
        "training.train_iters = 20",
        "parallel.sequence_parallel=true",
        "parallel.tensor_parallel=2",
        "model.dtype=fp64",
        'output.checkpoint="2024"',
        "data.prefix=some/where",
    )

    assert run.optimizer.lr == 0.002
    assert run.training.train_iters == 20
    assert run.parallel.sequence_parallel is True
    assert run.model.dtype == "fp64"
    assert run.output.checkpoint == Path("2024")
    assert run.data.prefix == Path("some/where")


def test_the_last_of_several_overrides_of_a_key_holds_and_tp_is_one_of_them(place, tmp_path):
    said = refusal(place, tmp_path, "--set", "parallel.tensor_parallel=1", "--tp", "4")

    assert "cannot be cut over tp 4" in said


def test_a_run_file_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.toml cannot be read: No such file"):
        read_run_config(tmp_path / "nowhere.toml")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("parallel.tensor_parallel=4", r"cannot be cut over tp 4: .*tp sizes that work: 1, 2, 3$"),
        ("model.checkpoint=nowhere", r"nowhere"),
        ("data.prefix=nowhere", r"nowhere\.idx: no such file"),
        ("data.seq_length=1009", r"1009 tokens give no sample of sequence length 1009"),
    ],
)
def test_what_does_not_fit_is_refused_before_training(place, tmp_path, override, message):
    assert re.search(message, refusal(place, tmp_path, "--set", override), re.MULTILINE)


def test_sequence_parallel_needs_a_sequence_that_tp_divides(place, tmp_path):
    said = refusal(
        place, tmp_path, "--tp", "2", "--set", "parallel.sequence_parallel=true", "--set", "data.seq_length=7"
    )

    assert "data.seq_length (7) must be a multiple of parallel.tensor_parallel (2)" in said


def test_an_output_that_exists_is_refused_before_training_and_left_alone(place, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("work of years")

    result = megacore_command("train", run_file(place, tmp_path / "out"))

    assert result.exit_code == 2
    assert "exists already" in result.stderr
    assert "iteration" not in result.stdout
    assert (tmp_path / "out" / "precious").read_text() == "work of years"


def test_a_dataset_of_a_larger_vocabulary_is_refused_before_training(place, tmp_path):
    prefix = write_dataset(tmp_path / "data")
    description = DatasetDescription(
        tokenizer_file="tokenizer.json", tokenizer_sha256="", vocab_size=VOCAB + 1, eod_id=None, append_eod=False,
        num_documents=20, num_tokens=1000, megacore_version="0.1.0",
    )  # fmt: skip
    Path(f"{prefix}.json").write_text(description.to_json())

    said = refusal(place, tmp_path, "--set", f"data.prefix={prefix}")

    assert "was made with a tokenizer of 100 ids, and the checkpoint's vocabulary has 99" in said


def test_token_ids_beyond_the_vocabulary_are_refused_in_a_dataset_that_does_not_describe_itself(place, tmp_path):
    prefix = write_dataset(tmp_path / "data", num_tokens=33, vocab_size=VOCAB + 1)

    said = refusal(place, tmp_path, "--set", f"data.prefix={prefix}")

    assert "has token id 99, and the checkpoint's vocabulary is 0 to 98" in said


# --- the whole command, on two processes of its own


@pytest.fixture(scope="module")
def trained(place) -> tuple[Path, subprocess.CompletedProcess]:
    out = place / "trained on two"
    return out, run_command("train", run_file(place, out, layout="tp 2, pp 2"), "--tp", "2")


def test_the_command_prints_one_line_a_step_and_where_it_saved(trained):
    out, completed = trained

    *steps, saved = completed.stdout.splitlines()

    number = r"\d+\.\d+"
    assert completed.returncode == 0
    assert saved == f"Saved {out}."
    assert len(steps) == STEPS
    for iteration, line in enumerate(steps, start=1):
        pattern = (
            rf"iteration {iteration:>5}/10 \| loss {number} \| lr {number}e-\d\d \| "
            rf"grad norm {number} \| [\d,]+ tokens/s \| [\d.]+ [kMG]?FLOP/s, {number}% of peak"
        )
        if 1 < iteration < STEPS:
            pattern += r" \| (\d+ min )?\d+ s left"
        assert re.fullmatch(pattern, line)


def test_the_command_says_on_stderr_what_computes_and_how_the_model_is_cut_and_nothing_else(trained):
    _, completed = trained

    layout, computes, note, peak = completed.stderr.splitlines()

    assert layout == "Note: 2 processes: tp 2."
    assert computes == "Note: kernels: attention torch (auto), norm torch, optimizer torch fused AdamW."
    assert note.startswith("Note: tp 2 cuts unevenly: ")
    assert "word_embeddings 99 as 50 + 49" in note
    assert "linear_qkv 3 as 2 + 1" in note
    assert re.fullmatch(
        r"Note: matrix products were measured at [\d.]+ [MGT]FLOP/s, the reference for % of peak\.", peak
    )


def test_the_command_prints_the_losses_that_the_library_returns(place, trained, tmp_path):
    _, completed = trained

    steps = train_steps(run_of(place, tmp_path / "out"))

    printed = [float(loss) for loss in re.findall(r"loss (\S+)", completed.stdout)]
    assert printed == pytest.approx([step.loss for step in steps], abs=1e-4)


def test_the_trained_checkpoint_passes_its_check_and_says_how_it_was_made(trained):
    out, _ = trained

    result = megacore_command("inspect", out, "--check")

    assert result.exit_code == 0
    assert "Every file matches its digest." in result.stdout
    assert [entry["command"] for entry in Checkpoint(out).manifest.history] == ["convert", "train"]


def test_the_exported_model_has_the_logits_of_the_trained_one_and_they_differ_from_the_untrained(
    place, trained, tmp_path
):
    out, _ = trained

    assert megacore_command("export", out, "--out", tmp_path / "exported").exit_code == 0

    same: Any = ["--random-ids", "--seq-length", 16, "--tp", 1]
    assert megacore_command("verify", out, "--reference", tmp_path / "exported", *same).exit_code == 0
    untrained = megacore_command("verify", out, "--reference", place / "untied" / "published", *same)
    assert untrained.exit_code == 1
    assert "NOT VERIFIED" in untrained.stdout


# --- what would otherwise end badly


def test_a_dataset_with_a_negative_id_is_refused_at_any_tensor_parallel_size(place, tmp_path):
    with IndexedDatasetWriter(tmp_path / "strange", np.int32) as writer:
        writer.add_document([5] * 400 + [-1] * 400)

    with pytest.raises(DataError, match="strange has token id -1, and the checkpoint's vocabulary is 0 to 98"):
        megacore.train(run_of(place, tmp_path / "out", f"data.prefix={tmp_path / 'strange'}"))
    assert not (tmp_path / "out").exists()


def test_a_run_whose_numbers_are_no_longer_finite_ends_without_a_result(place, tmp_path):
    settings = ("optimizer.lr=1e200", "optimizer.warmup_iters=0", "faults.max_skipped_in_a_row=2")
    with pytest.raises(TrainingError, match=r"iteration [34]: the loss is .*nan.*lower optimizer\.lr may help"):
        megacore.train(run_of(place, tmp_path / "out", *settings))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out-checkpoints", "out.toml"]


def test_training_refuses_damaged_weights_instead_of_passing_them_on(place, tmp_path):
    damaged = shutil.copytree(place / "untied" / "unsplit", tmp_path / "damaged")
    file = damaged / "model-tp00-pp00.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)

    with pytest.raises(CorruptCheckpointError, match=r"damaged since written: .*model-tp00-pp00\.safetensors"):
        megacore.train(run_of(place, tmp_path / "out", f"model.checkpoint={damaged}"))
    assert not (tmp_path / "out").exists()


def test_the_output_is_taken_before_training_begins(place, tmp_path, monkeypatch):
    taken = []
    monkeypatch.setattr(trainer, "Engine", lambda *arguments, **options: taken.extend(tmp_path.iterdir()) or 1 / 0)

    with pytest.raises(ZeroDivisionError):
        megacore.train(run_of(place, tmp_path / "out"))
    assert {path.name for path in taken} == {".out.incomplete", ".out.lock", "out.toml"}


def test_a_run_file_may_be_given_by_its_path(place, tmp_path):
    file = run_file(place, tmp_path / "out")
    file.write_text(file.read_text().replace("train_iters = 10", "train_iters = 4"))

    assert len(train_steps(file)) == 4


def test_a_checkpoint_that_is_not_there_is_named_with_its_key(place, tmp_path):
    with pytest.raises(ConfigError, match=r"model\.checkpoint: nowhere is not a directory \(paths in a run file"):
        megacore.train(run_of(place, tmp_path / "out", "model.checkpoint=nowhere"))


# --- processes that see different files


@pytest.fixture(scope="module")
def elsewhere(place, tmp_path_factory) -> Path:
    """Files that have the names and the sizes of those in ``place``, and other contents; one that is the same."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    for suffix in (".idx", ".bin"):
        shutil.copy(f"{place / 'data'}{suffix}", f"{elsewhere / 'same'}{suffix}")
        shutil.copy(f"{place / 'data'}{suffix}", f"{elsewhere / 'data'}{suffix}")
    with (elsewhere / "data.bin").open("r+b") as file:
        file.write(b"\x05\x00")
    published_model(elsewhere / "published", initializer_range=0.5)
    model = LlamaForCausalLM.from_pretrained(elsewhere / "published")
    model.model.norm.weight.data[0] += 1
    model.save_pretrained(elsewhere / "published")
    megacore.convert("llama", elsewhere / "published", elsewhere / "checkpoint")
    return elsewhere


@pytest.mark.parametrize("sizes", [ParallelSizes(dp_replicate=2), ParallelSizes(tp=2)], ids=["dp 2", "tp 2"])
@pytest.mark.parametrize(
    ("key", "name", "told"),
    [("data.prefix", "data", r"data\.prefix "), ("model.checkpoint", "checkpoint", "the weights in ")],
)
def test_processes_that_see_other_weights_or_data_under_the_same_name_do_not_train(
    ranks, place, elsewhere, tmp_path, key, name, told, sizes
):
    runs = [run_of(place, tmp_path / "out"), run_of(place, tmp_path / "out", f"{key}={elsewhere / name}")]

    with pytest.raises(RankError, match=rf"ConfigError: rank 1 does not see the same as rank 0 in {told}"):
        ranks.run(train_on_what_each_sees, runs, sizes=sizes)
    assert not (tmp_path / "out").exists()


def test_processes_that_see_another_dataset_of_a_mixture_do_not_train(ranks, place, elsewhere, tmp_path):
    def mixture(second: Path) -> str:
        return f'data.prefix=[{{prefix="{place / "data"}", weight=1}}, {{prefix="{second}", weight=2}}]'

    runs = [run_of(place, tmp_path / "out", mixture(path / "data")) for path in (place, elsewhere)]

    with pytest.raises(RankError, match=r"rank 1 does not see the same as rank 0 in data\.prefix\[1\] "):
        ranks.run(train_on_what_each_sees, runs, sizes=ParallelSizes(dp_replicate=2))


def test_processes_may_see_the_same_under_other_names(ranks, place, elsewhere, tmp_path):
    runs = [run_of(place, tmp_path / "out"), run_of(place, tmp_path / "out", f"data.prefix={elsewhere / 'same'}")]

    ranks.run(train_on_what_each_sees, runs, sizes=ParallelSizes(dp_replicate=2))

    assert (tmp_path / "out").exists()
