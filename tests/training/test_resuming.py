"""Resuming a run: to the bit at the same layout, exactly in the order of the data at any other; and what is refused."""

from __future__ import annotations

import os
import re
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

import megacore
import tiny_run
from megacore.checkpoint import Checkpoint
from megacore.cli import cli
from megacore.errors import CheckpointError, ConfigError, CorruptCheckpointError, OutputError
from megacore.parallel import ParallelContext
from megacore.training import RunConfig
from megacore.training.checkpointing.directory import CheckpointDirectory
from megacore.training.config import OptimizerSection
from megacore.training.resolved import parallel_sizes
from recorded_steps import steps_on_rank, train_steps
from tiny_llama import write_dataset
from tiny_models import tied_multi_query_falcon
from tiny_run import weights
from training_on_rank import num_bytes_to_save

STEPS = 6

LAYOUTS = {
    "one process": (),
    "tp 2": ("parallel.tensor_parallel=2",),
    "pp 2, interleaved": (
        "parallel.pipeline_parallel=2",
        "parallel.pipeline_schedule=Interleaved1F1B",
    ),
    "dp 2": ("parallel.nproc_per_node=2",),
    "dp 2, sharded": ("parallel.nproc_per_node=2", "parallel.data_parallel=sharded"),
    "tp 2, dp 2, sharded": (
        "parallel.tensor_parallel=2",
        "parallel.nproc_per_node=4",
        "parallel.data_parallel=sharded",
    ),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A dataset, and native checkpoints: ``checkpoint``, with 3 key-value heads, and ``falcon``, tied, with one."""
    place = tiny_run.prepare(tmp_path_factory.mktemp("resuming"))
    tied_multi_query_falcon(place / "published falcon")
    megacore.convert("falcon", place / "published falcon", place / "falcon")
    return place


def run_of(place: Path, out: Path, *overrides: str, checkpoint: str = "checkpoint") -> RunConfig:
    base = (f"training.train_iters={STEPS}", "optimizer.weight_decay=0.1", "optimizer.warmup_iters=1")
    return tiny_run.run_of(place, out, *base, *overrides, checkpoint=checkpoint)


def train(ranks, run: RunConfig, load: Path | None = None) -> list[megacore.training.Step]:
    """What rank 0 returns of a run that goes on from ``load``, or begins."""
    sizes = parallel_sizes(run.parallel)
    if sizes.world == 1:
        return train_steps(run, load=load)
    return ranks.run(steps_on_rank, run, load, sizes=sizes)[0]


def checkpoint_of(out: Path, iteration: int) -> Path:
    return out.with_name(f"{out.name}-checkpoints") / f"iteration-{iteration:07d}"


def kept(checkpoint: Path) -> dict[str, Tensor]:
    """Each tensor of a training checkpoint, put together."""
    opened = Checkpoint(checkpoint)
    assert opened.manifest.training is not None
    whole = {}
    for name, tensor in opened.manifest.training.tensors.items():
        parts = [(chunk, opened.chunk(name, chunk)) for chunk in tensor.chunks]
        whole[name] = torch.full(tensor.shape, 7, dtype=parts[0][1].dtype)
        for chunk, part in parts:
            box = tuple(slice(at, at + size) for at, size in zip(chunk.offsets, chunk.sizes, strict=True))
            whole[name][box] = part
    return whole


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor], *, tolerance: float = 0.0) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        if tolerance:
            torch.testing.assert_close(tensor, other[name], rtol=tolerance, atol=tolerance, msg=name)
        else:
            assert torch.equal(tensor, other[name]), name


# --- exactly


@pytest.mark.parametrize(
    ("layout", "model", "dtype"),
    [
        ("one process", "checkpoint", "fp16"),
        ("pp 2, interleaved", "checkpoint", "bf16"),
        ("dp 2, sharded", "falcon", "bf16"),
        pytest.param("tp 2", "falcon", "fp32", marks=pytest.mark.soak),
        pytest.param("dp 2", "checkpoint", "fp32", marks=pytest.mark.soak),
        pytest.param("tp 2, dp 2, sharded", "checkpoint", "fp32", marks=pytest.mark.soak),
        pytest.param("pp 2, interleaved", "falcon", "fp16", marks=pytest.mark.soak),
        pytest.param("dp 2, sharded", "checkpoint", "fp16", marks=pytest.mark.soak),
    ],
)
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit_at_the_same_layout(
    ranks, place, tmp_path, layout, model, dtype
):
    settings = (*LAYOUTS[layout], f"model.dtype={dtype}", "checkpoints.interval=3", "loss_scale.initial=1e7")
    settings += ("loss_scale.hysteresis=1", "loss_scale.window=2", "dropout.hidden=0.1")
    out, resumed_out = tmp_path / "out", tmp_path / "resumed"
    uninterrupted = train(ranks, run_of(place, out, *settings, checkpoint=model))

    resumed = train(ranks, run_of(place, resumed_out, *settings, checkpoint=model), checkpoint_of(out, 3))

    figures = [(s.iteration, s.loss, s.grad_norm, s.lr, s.loss_scale, s.num_skipped) for s in uninterrupted]
    assert [(s.iteration, s.loss, s.grad_norm, s.lr, s.loss_scale, s.num_skipped) for s in resumed] == figures[3:]
    assert_equal(weights(out), weights(resumed_out))
    assert_equal(kept(checkpoint_of(out, STEPS)), kept(checkpoint_of(resumed_out, STEPS)))


@pytest.mark.parametrize("model", [pytest.param("checkpoint", marks=pytest.mark.soak), "falcon"])
def test_a_run_goes_on_at_other_layouts_as_if_nothing_had_happened(ranks, place, tmp_path, model):
    base = ("model.dtype=fp64", "checkpoints.interval=2")
    single = train(ranks, run_of(place, tmp_path / "single", *base, checkpoint=model))
    losses = []
    load = None
    for number, layout in enumerate(["tp 2", "pp 2, interleaved", "dp 2, sharded"], start=1):
        out = tmp_path / layout.replace(" ", "")

        steps = train(ranks, run_of(place, out, *base, *LAYOUTS[layout], checkpoint=model), load)

        load = checkpoint_of(out, 2 * number)
        losses += [(step.loss, step.grad_norm) for step in steps if step.iteration in (2 * number - 1, 2 * number)]
    assert load is not None
    expected = [(step.loss, step.grad_norm) for step in single]
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=1e-10, atol=0)
    states = [
        {name: tensor for name, tensor in kept(path).items() if not name.startswith("random.")}
        for path in (load, checkpoint_of(tmp_path / "single", STEPS))
    ]
    assert len([name for name in states[0] if name.startswith("optimizer.exp_avg_sq.")]) > 20
    assert_equal(*states, tolerance=1e-10)


@pytest.mark.parametrize(
    "layout",
    [
        ("parallel.nproc_per_node=2",),
        ("parallel.nproc_per_node=4", "parallel.data_parallel=hybrid", "parallel.shard_size=2"),
    ],
    ids=["replicated", "hybrid"],
)
def test_each_replica_copies_its_own_share_of_the_state_and_no_more(ranks, place, tmp_path, layout):
    run = run_of(place, tmp_path / "out", *layout)
    whole = num_bytes_to_save(ParallelContext.single(), run_of(place, tmp_path / "single"))

    of_ranks = ranks.run(num_bytes_to_save, run, sizes=parallel_sizes(run.parallel))

    together = sum(map(Counter, of_ranks), Counter())
    of_each = ("random.", "optimizer.step.")  # each has random numbers of its own, and each shard counts the steps
    shared = [name for name in whole if not name.startswith(of_each)]
    assert {name: together[name] for name in shared} == {name: whole[name] for name in shared}
    assert max(sum(of_rank.values()) for of_rank in of_ranks) < 1.3 * sum(together.values()) / len(of_ranks)


@pytest.mark.soak
def test_replicas_of_a_key_value_head_are_saved_once_and_read_by_any_layout(ranks, place, tmp_path):
    base = ("model.dtype=fp64", "checkpoints.interval=3")
    more = ("parallel.tensor_parallel=4",)  # of one key-value head
    steps = train(ranks, run_of(place, tmp_path / "out", *base, *more, checkpoint="falcon"))

    alone = train(
        ranks, run_of(place, tmp_path / "alone", *base, checkpoint="falcon"), checkpoint_of(tmp_path / "out", 3)
    )
    again = train(
        ranks, run_of(place, tmp_path / "again", *base, *more, checkpoint="falcon"), checkpoint_of(tmp_path / "out", 3)
    )

    assert [s.loss for s in again] == [s.loss for s in steps[3:]]
    assert [s.loss for s in alone] == pytest.approx([s.loss for s in steps[3:]], rel=1e-10)


def test_the_state_of_torchs_random_numbers_goes_on_at_the_same_layout(place, tmp_path):
    run = run_of(place, tmp_path / "out", "checkpoints.interval=3")
    torch.manual_seed(5)
    torch.rand(3)
    expected = torch.get_rng_state()
    megacore.train(run)
    torch.manual_seed(6)

    megacore.train(run_of(place, tmp_path / "resumed"), load=checkpoint_of(tmp_path / "out", 3))

    assert torch.equal(torch.get_rng_state(), expected)


# --- a training checkpoint is a checkpoint


@pytest.fixture(scope="module")
def trained(place, ranks) -> Path:
    """The output of a run of three checkpoints on two processes, that ended with what is in the last."""
    run = run_of(place, place / "trained", "checkpoints.interval=2", *LAYOUTS["tp 2"])
    ranks.run(steps_on_rank, run, sizes=parallel_sizes(run.parallel))
    return place / "trained"


def test_split_merges_a_training_checkpoint_to_what_the_run_made(trained, tmp_path):
    megacore.split(checkpoint_of(trained, STEPS), tmp_path / "merged")

    assert_equal(weights(tmp_path / "merged"), weights(trained))
    assert Checkpoint(tmp_path / "merged").manifest.training is None


def test_export_and_inspect_read_a_training_checkpoint_by_the_link_to_the_latest(trained, tmp_path):
    latest = checkpoint_of(trained, STEPS).with_name("latest")

    megacore.export(latest, tmp_path / "from the run")
    megacore.export(trained, tmp_path / "from the result")

    exported = (tmp_path / "from the run" / "model.safetensors").read_bytes()
    assert exported == (tmp_path / "from the result" / "model.safetensors").read_bytes()
    found = megacore.checkpoint.inspect(latest, check=True)
    assert found["history"][-1]["iterations"] == STEPS


def test_blocks_of_parameters_in_boxes_are_those_of_the_whole(ranks, place, tmp_path):
    run = run_of(place, tmp_path / "out", "checkpoints.interval=3", *LAYOUTS["tp 2, dp 2, sharded"])
    ranks.run(steps_on_rank, run, sizes=parallel_sizes(run.parallel))
    opened, whole = Checkpoint(checkpoint_of(tmp_path / "out", STEPS)), weights(tmp_path / "out")

    for name, expected in whole.items():
        matrix = opened.matrix(name)
        rows = torch.arange(matrix.rows).flip(0)[::2]
        columns = slice(matrix.columns // 3, matrix.columns)
        assert torch.equal(matrix.read(rows, columns), expected[rows][:, columns])
        assert torch.equal(matrix.read(slice(1, matrix.rows), columns), expected[1:, columns])


# --- which checkpoint


def test_there_are_as_many_checkpoints_as_are_to_be_kept_and_latest_is_the_last(place, tmp_path):
    settings = ("checkpoints.interval=1", "checkpoints.keep_last=2", "checkpoints.keep_every=2")
    megacore.train(run_of(place, tmp_path / "out", *settings))

    directory = tmp_path / "out-checkpoints"
    assert sorted(path.name for path in directory.iterdir()) == [
        "iteration-0000002", "iteration-0000004", "iteration-0000005", "iteration-0000006", "latest",
    ]  # fmt: skip
    assert (directory / "latest").resolve() == directory / "iteration-0000006"


def test_without_an_interval_there_is_no_checkpoint(place, tmp_path):
    megacore.train(run_of(place, tmp_path / "out"))

    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.toml"]


@pytest.fixture
def begun(trained, tmp_path) -> Path:
    """The run of ``trained`` before its end: its output, which is not there, beside its checkpoints up to 4."""
    shutil.copytree(checkpoint_of(trained, 4).parent, tmp_path / "trained-checkpoints", symlinks=True)
    shutil.rmtree(checkpoint_of(tmp_path / "trained", 6))
    return tmp_path / "trained"


def again(place: Path, out: Path, *overrides: str) -> RunConfig:
    """The run of ``trained`` with another output, and on one process."""
    return run_of(place, out, "checkpoints.interval=2", *overrides)


def test_a_run_file_after_resume_is_told_where_it_belongs():
    refused = CliRunner().invoke(cli, ["train", "--resume", "run.toml"])

    assert refused.exit_code == 2
    assert "the only value is auto. Did you mean: megacore train run.toml --resume" in refused.stderr


def test_a_run_that_has_checkpoints_is_neither_begun_anew_nor_silently_resumed(place, begun):
    with pytest.raises(
        ConfigError, match=r"already holds checkpoints of this run, up to iteration-0000004: .*--resume"
    ):
        megacore.train(again(place, begun))


def test_the_newest_checkpoint_and_another_one_at_once_are_a_mistake(place, begun):
    with pytest.raises(ConfigError, match=r"--resume resumes from the newest .* use one of them"):
        megacore.train(again(place, begun), resume=True, load=checkpoint_of(begun, 2))


@pytest.mark.parametrize("resume", [True, "auto"])
def test_a_run_is_resumed_from_its_newest_checkpoint(place, trained, begun, resume):
    steps = train_steps(again(place, begun), resume=resume)

    assert [step.iteration for step in steps] == [5, 6]
    assert_equal(weights(begun), weights(trained), tolerance=1e-4)


def test_there_must_be_something_to_resume_from_unless_it_is_auto(place, tmp_path):
    with pytest.raises(CheckpointError, match=r"nothing to resume from: .*out-checkpoints holds no checkpoint"):
        megacore.train(again(place, tmp_path / "out"), resume=True)
    assert len(train_steps(again(place, tmp_path / "out"), resume="auto")) == STEPS


def test_a_run_that_ended_without_checkpoints_says_what_it_would_have_taken_to_go_on(place, tmp_path):
    megacore.train(run_of(place, tmp_path / "out"))

    with pytest.raises(CheckpointError, match=r"no checkpoint; a run saves one at its end if checkpoints\.interval is"):
        megacore.train(run_of(place, tmp_path / "out", "training.train_iters=7"), resume=True)


def test_what_torchrun_starts_anew_goes_on_by_itself(place, begun, monkeypatch):
    monkeypatch.setattr("megacore.training.starting_point.was_restarted", lambda timeout: True)

    steps = train_steps(again(place, begun), load=checkpoint_of(begun, 2))

    assert [step.iteration for step in steps] == [5, 6]


def test_a_directory_of_checkpoints_stands_for_the_newest_and_a_native_one_for_its_weights(place, trained, begun):
    directory = checkpoint_of(begun, 4).parent
    out = begun.with_name("out")

    assert [step.iteration for step in train_steps(again(place, out), load=directory)] == [5, 6]
    fresh = train_steps(run_of(place, begun.with_name("fresh")), load=trained)
    assert [step.iteration for step in fresh] == list(range(1, STEPS + 1))


def test_a_run_that_goes_back_keeps_what_came_after_under_another_name(place, begun):
    steps = train_steps(again(place, begun), load=checkpoint_of(begun, 2))

    directory = checkpoint_of(begun, 2).parent
    aside = directory / "aside-1-iteration-0000004"
    assert [step.iteration for step in steps] == [3, 4, 5, 6]
    assert steps[0].notes == (f"a checkpoint after iteration 2 is kept as {aside}",)
    Checkpoint(aside).check()
    assert iterations_in(directory) == [2, 4, 6]


def test_a_run_that_is_killed_while_it_goes_back_leaves_a_link_to_the_checkpoint_that_it_goes_back_to(
    begun, monkeypatch
):
    def killed(path: Path, target: Path) -> Path:
        raise KeyboardInterrupt

    directory = CheckpointDirectory(checkpoint_of(begun, 2).parent)
    monkeypatch.setattr(Path, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        directory.set_aside_after(2)

    assert (directory.path / "latest").resolve() == checkpoint_of(begun, 2).resolve()


def test_no_link_is_left_where_all_checkpoints_are_set_aside(begun):
    directory = CheckpointDirectory(checkpoint_of(begun, 2).parent)

    assert [path.name for path in directory.set_aside_after(1)] == [
        "aside-1-iteration-0000002",
        "aside-1-iteration-0000004",
    ]

    assert not (directory.path / "latest").is_symlink()


def iterations_in(directory: Path) -> list[int]:
    return sorted(int(path.name[10:]) for path in directory.iterdir() if re.fullmatch(r"iteration-\d+", path.name))


def test_a_finished_run_is_extended_by_more_iterations_and_its_first_result_is_kept(place, tmp_path):
    out = tmp_path / "out"
    megacore.train(again(place, out))
    first = weights(out)

    with pytest.raises(ConfigError, match=r"after iteration 6, and the run has 6 iterations: it is over"):
        megacore.train(again(place, out), resume=True)
    steps = train_steps(again(place, out, "training.train_iters=8"), resume=True)

    assert [step.iteration for step in steps] == [7, 8]
    assert_equal(weights(tmp_path / "out-iteration-0000006"), first)
    assert Checkpoint(out).manifest.history[-1]["iterations"] == 8
    convert, train = Checkpoint(out).manifest.history
    assert (convert["command"], train["command"]) == ("convert", "train")
    assert train["source"] == str(place / "checkpoint")

    megacore.train(again(place, out, "training.train_iters=9"), resume=True)
    (tmp_path / "out-iteration-0000009").mkdir()
    with pytest.raises(OutputError, match="out-iteration-0000009 exists already"):  # before anything is computed
        megacore.train(again(place, out, "training.train_iters=10"), resume=True, on_step=pytest.fail)


def test_another_output_is_not_taken_for_an_earlier_result(place, trained, begun):
    shutil.copytree(place / "checkpoint", begun)

    with pytest.raises(OutputError, match="exists already"):
        megacore.train(again(place, begun), resume=True)


def test_two_runs_do_not_save_into_one_directory(place, tmp_path):
    with (
        megacore.training.checkpointing.directory.CheckpointDirectory(tmp_path / "out-checkpoints").locked(),
        pytest.raises(OutputError, match=r"another run saves its checkpoints in .*out-checkpoints"),
    ):
        megacore.train(again(place, tmp_path / "out"))


def test_what_a_killed_run_left_is_removed(place, begun):
    directory = checkpoint_of(begun, 4).parent
    for name in (".iteration-0000006.incomplete", ".iteration-0000002.removed"):
        (directory / name).mkdir()
    (directory / ".iteration-0000006.lock").touch()

    megacore.train(again(place, begun), resume=True)

    assert sorted(path.name for path in directory.iterdir() if path.name.startswith(".")) == []


# --- what has changed


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("data.seq_length=10", r"data\.seq_length was 12 and is 10"),
        ("data.seed=3", r"data\.seed was 1234 and is 3"),
        ("data.prefix={elsewhere}", r"data\.prefix was '.*/data' and is '.*/elsewhere'"),
    ],
)
def test_other_data_are_refused_unless_that_is_asked_for(place, begun, tmp_path, change, told):
    write_dataset(tmp_path / "elsewhere", num_tokens=800)
    change = change.format(elsewhere=tmp_path / "elsewhere")

    with pytest.raises(ConfigError, match=rf"cannot resume with other data than it began with: {told}\.") as refused:
        megacore.train(again(place, begun, change), resume=True)

    [allowed] = re.findall(r"--set '(.*)'", str(refused.value))
    assert len(train_steps(again(place, begun, change, allowed), resume=True)) == 2


@pytest.mark.parametrize(
    ("named", "told"),
    [
        ("data.sed", r"data\.sed is unknown; did you mean data\.seed\?"),
        ("seed", r"seed is unknown; did you mean data\.seed\?"),
        ("data.prefix[0", r"data\.prefix\[0 is unknown; did you mean data\.prefix\?"),
        ("*", r"\* is unknown: it takes section\.key, for example data\.seed"),
    ],
)
def test_what_may_change_is_refused_where_there_is_no_such_key(place, tmp_path, named, told):
    with pytest.raises(ConfigError, match=rf"checkpoints\.may_change: {told}"):
        run_of(place, tmp_path / "out", f'checkpoints.may_change=["data.seed", "{named}"]')


def test_one_dataset_of_several_and_one_file_of_conversations_may_change(place, tmp_path):
    listed = ("data.prefix[1]", "data.valid_prefix, role", "data.test_prefix[0], text")

    run = run_of(place, tmp_path / "out", f"checkpoints.may_change={list(listed)}")

    assert run.checkpoints.may_change == listed


def test_other_settings_are_told_and_the_same_data_may_be_elsewhere(place, begun, tmp_path):
    for suffix in (".bin", ".idx"):
        shutil.copy(place / f"data{suffix}", tmp_path / f"moved{suffix}")
    told: list[str] = []

    megacore.train(
        again(
            place, begun, f"data.prefix={tmp_path / 'moved'}", "optimizer.lr=0.02", "data.prefetch=0",
            "training.global_batch_size=4",
        ),
        resume=True,
        on_note=told.append,
    )  # fmt: skip

    assert [note for note in told if "iteration 5 on" in note] == [
        "optimizer.lr is 0.02 from iteration 5 on, and was 0.01",
        "training.global_batch_size is 4 from iteration 5 on, and was 8",
    ]


MIXTURES = {
    "one dataset more": '[{prefix="P/data", weight=0.7}, {prefix="P/data", weight=0.3}]',
    "another dataset in a list": '[{prefix="P/valid", weight=1}]',
}


@pytest.mark.parametrize("mixture", MIXTURES.values(), ids=MIXTURES)
def test_another_mixture_is_other_data(place, begun, mixture):
    write_dataset(begun.with_name("valid"), num_tokens=900)
    prefix = mixture.replace("P/valid", str(begun.with_name("valid"))).replace("P", str(place))
    with pytest.raises(ConfigError, match=r"cannot resume with other data than it began with: data\.prefix"):
        megacore.train(again(place, begun, f"data.prefix={prefix}"), resume=True)


def test_the_weights_of_a_mixture_are_what_the_data_are(place, tmp_path):
    def mixture(one: float, other: float) -> str:
        return f'data.prefix=[{{prefix="{place}/data", weight={one}}}, {{prefix="{place}/data", weight={other}}}]'

    megacore.train(again(place, tmp_path / "out", mixture(0.7, 0.3), "training.exit_interval=2"))
    with pytest.raises(ConfigError, match=r"cannot resume with other data than it began with: data\.prefix was"):
        megacore.train(again(place, tmp_path / "out", mixture(0.3, 0.7)), resume=True)
    assert len(train_steps(again(place, tmp_path / "out", mixture(0.7, 0.3)), resume=True)) == 4


@pytest.mark.parametrize("kinds", [("adamw", "sgd"), ("sgd", "adamw")])
def test_another_optimizer_begins_anew_with_the_weights(place, tmp_path, kinds):
    def run(kind: str, *overrides: str) -> RunConfig:
        section = OptimizerSection(kind=kind, lr=0.01)
        return again(place, tmp_path / "out", *overrides).model_copy(update={"optimizer": section})

    megacore.train(run(kinds[0], "training.exit_interval=2"))
    steps = train_steps(run(kinds[1]), resume=True)
    assert [step.iteration for step in steps] == [3, 4, 5, 6]
    other = {"adamw": "optimizer.exp_avg.", "sgd": "optimizer.momentum_buffer."}[kinds[0]]
    assert not [name for name in kept(checkpoint_of(tmp_path / "out", 6)) if name.startswith(other)]


def test_checkpoints_lie_in_the_directory_of_the_run_if_it_has_one(place, tmp_path):
    run = again(place, tmp_path / "out", f"output.directory={tmp_path / 'runs' / 'first'}")
    megacore.train(run)
    assert iterations_in(tmp_path / "runs/first/checkpoints") == [2, 4, 6]


# --- broken checkpoints


def damaged(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (damaged, r"damaged since written: .*rank-00000-000\.safetensors"),
        (lambda file: os.truncate(file, 1000), r"rank-00000-000\.safetensors has 1000 bytes instead of"),
        (Path.unlink, r"rank-00000-000\.safetensors is missing"),
        (lambda file: damaged(file.with_name("megacore.json")), "megacore.json is damaged"),
        (lambda file: file.with_name("megacore.json").unlink(), "is not a megacore checkpoint"),
    ],
    ids=["bit flipped", "truncated", "missing", "manifest damaged", "no manifest"],
)
def test_a_broken_checkpoint_is_an_error_that_offers_the_one_before(place, begun, harm, told):
    harm(checkpoint_of(begun, 4) / "rank-00000-000.safetensors")
    earlier = checkpoint_of(begun, 2)

    with pytest.raises(CheckpointError, match=told) as refused:
        megacore.train(again(place, begun), resume="auto")
    assert isinstance(refused.value, CorruptCheckpointError) or "is not a megacore checkpoint" in told
    assert str(refused.value).endswith(f"resume from there with --load {earlier}")
    assert not begun.exists()


def test_the_one_before_a_broken_checkpoint_can_be_gone_on_from(place, begun):
    damaged(checkpoint_of(begun, 4) / "megacore.json")

    steps = train_steps(again(place, begun), load=checkpoint_of(begun, 2))

    assert [step.iteration for step in steps] == [3, 4, 5, 6]


def test_a_manifest_whose_parts_are_not_the_whole_is_refused(trained):
    manifest = Checkpoint(checkpoint_of(trained, 4)).manifest.to_json()
    name = "optimizer.exp_avg.output_layer.weight"
    for change in ([["rank-00000-000.safetensors", [0, 0], [1, 24]]], [["elsewhere", [0, 0], [99, 24]]]):
        manifest["training"]["tensors"][name]["chunks"] = change
        with pytest.raises(ValueError, match=name):
            megacore.checkpoint.Manifest.from_json(manifest)
