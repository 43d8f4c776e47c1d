"""A run is resolved once per process, whatever it is asked for afterwards."""

from __future__ import annotations

import itertools
import pickle
import resource
from pathlib import Path

import pytest
import torch

import megacore
from counted_calls import calls_on_rank, counted_calls
from megacore.checkpoint import Checkpoint
from megacore.parallel import ParallelContext
from megacore.training import Batch, RunConfig, Step, TrainResult
from megacore.training.engine import StepResult
from megacore.training.resolved import resolve_run
from megacore.training.trainer import train_on_rank
from recorded_steps import StepRecorder
from tiny_llama import write_dataset
from tiny_run import prepare, run_of

EVALUATED = ("evaluation.interval=2", "evaluation.iters=1", "checkpoints.interval=2")
ONCE = {"checkpoint": 1, "specs": 1, "spans": 1, "samples to train": 1, "samples to valid": 1, "samples to test": 1}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("resolved")
    write_dataset(place / "valid")
    return prepare(place)


def evaluated_run(place: Path, out: Path, *overrides: str) -> RunConfig:
    data = (f"data.valid_prefix={place / 'valid'}", f"data.test_prefix={place / 'valid'}")
    return run_of(place, out, *data, *EVALUATED, *overrides)


# --- once per process


def test_a_run_is_resolved_once(place, tmp_path):
    with counted_calls() as counts:
        megacore.train(evaluated_run(place, tmp_path / "out"))
    assert counts == ONCE


@pytest.mark.parametrize("how", ["resume", "load"])
def test_a_resumed_run_is_resolved_once(place, tmp_path, how):
    run = evaluated_run(place, tmp_path / "out")
    megacore.train(evaluated_run(place, tmp_path / "out", "training.exit_interval=2"))
    newest = tmp_path / "out-checkpoints" / "iteration-0000002"
    with counted_calls() as counts:
        result = megacore.train(run, **({"resume": True} if how == "resume" else {"load": newest}))
    assert result.num_steps == 3
    assert counts == ONCE


def test_an_evaluation_is_resolved_once(place, tmp_path):
    with counted_calls() as counts:
        megacore.evaluate(evaluated_run(place, tmp_path / "out"))
    assert counts == {key: number for key, number in ONCE.items() if key not in ("spans", "samples to train")}


def test_started_ranks_resolve_nothing_again(place, tmp_path, ranks):
    resolved = resolve_run(evaluated_run(place, tmp_path / "out", "parallel.tensor_parallel=2"))
    of_ranks = ranks.run(calls_on_rank, resolved, sizes=resolved.sizes)
    assert of_ranks == [{"samples to train": 1, "samples to valid": 1, "samples to test": 1}] * 2


def test_what_ranks_receive_has_no_samples_and_no_open_files(place, tmp_path):
    resolved = resolve_run(evaluated_run(place, tmp_path / "out"))
    name = next(iter(resolved.specs))
    resolved.checkpoint.read_local(name, resolved.specs[name], tp_size=1, tp_rank=0)
    content = pickle.dumps(resolved)
    assert len(content) < 100_000
    copy = pickle.loads(content)
    assert (copy.run, copy.config, copy.specs, copy.stages, copy.spans, copy.notes) == (
        resolved.run,
        resolved.config,
        resolved.specs,
        resolved.stages,
        resolved.spans,
        resolved.notes,
    )
    assert copy.samples["valid"].samples_per_epoch == resolved.samples["valid"].samples_per_epoch
    assert torch.equal(
        copy.checkpoint.read_local(name, copy.specs[name], tp_size=1, tp_rank=0),
        resolved.checkpoint.read_local(name, resolved.specs[name], tp_size=1, tp_rank=0),
    )


# --- the result


def test_the_result_tells_what_was_done_and_where_it_is(place, tmp_path):
    recorder = StepRecorder(tmp_path / "steps")
    run = evaluated_run(place, tmp_path / "out", "training.skip_iters=[2]")
    result = megacore.train(run, on_step=recorder)
    steps = recorder.steps()
    assert result == TrainResult(
        last_step=steps[-1],
        num_steps=5,
        num_taken=4,
        num_tokens=sum(step.num_tokens for step in steps),
        seconds=pytest.approx(sum(step.seconds for step in steps)),
        stopped_by=None,
        output=tmp_path / "out",
        training_checkpoint=tmp_path / "out-checkpoints" / "iteration-0000005",
    )
    assert result.num_skipped == 1
    Checkpoint(result.output)


def test_the_result_of_a_stopped_run_has_no_output(place, tmp_path):
    result = megacore.train(evaluated_run(place, tmp_path / "out", "training.exit_interval=3"))
    assert (result.num_steps, result.stopped_by, result.output) == (3, "training.exit_interval (3)", None)
    assert result.training_checkpoint == tmp_path / "out-checkpoints" / "iteration-0000003"
    assert result.last_step.iteration == 3


def test_started_ranks_return_the_result_to_the_caller(place, tmp_path):
    result = megacore.train(evaluated_run(place, tmp_path / "out", "parallel.tensor_parallel=2"))
    assert (result.num_steps, result.output) == (5, tmp_path / "out")


# --- a long run


NUM_STEPS = 1_000_000


class FakeEngine:
    """An engine whose steps take no time."""

    loss_scale = None
    stages = ()
    all_stages = ()

    def __init__(self, resolved, parallel):
        self.run, self.parallel = resolved.run, parallel
        self._result = StepResult(1.0, 1.0, is_taken=True)

    def step(self, batch, **keywords):
        return self._result


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def test_neither_memory_nor_the_end_of_a_run_grows_with_its_length(place, tmp_path, monkeypatch):
    batch = Batch(torch.zeros(8, 13, dtype=torch.int64), torch.ones(8, 12), torch.arange(8))
    monkeypatch.setattr("megacore.training.trainer.Engine", FakeEngine)
    monkeypatch.setattr("megacore.training.trainer.save_stages", lambda *arguments, **keywords: None)
    monkeypatch.setattr(
        "megacore.training.trainer.batches", lambda *arguments, **keywords: itertools.repeat(batch, NUM_STEPS)
    )
    run = run_of(place, tmp_path / "out", f"training.train_iters={NUM_STEPS}", "data.prefetch=0")
    resident = {}

    def on_step(step: Step) -> None:
        if step.iteration in (NUM_STEPS // 100, NUM_STEPS):
            resident[step.iteration] = resident_bytes()

    run = run.model_copy(update={"logging": run.logging.model_copy(update={"measure_peak": False})})
    result = train_on_rank(ParallelContext.single(), resolve_run(run), on_step)

    assert (result.num_steps, result.last_step.iteration) == (NUM_STEPS, NUM_STEPS)
    assert resident[NUM_STEPS] - resident[NUM_STEPS // 100] < 10 * 2**20
    assert len(pickle.dumps(result)) < 2000
