"""How long training stands still for a checkpoint that is written beside it, next to one that is waited for.

    python benchmarks/checkpoint.py [--rounds N] [--steps N] [--directory DIR]

The model: 4 layers, hidden size 1024, ffn 2816, 16 heads, vocabulary 2048, random weights, float32, in one process;
with AdamW's state a checkpoint is 0.67 GB. In each round ``--steps`` steps are taken without a checkpoint, then as many
after one that is waited for, then as many after one that is written beside them, which includes the wait until it is
whole. The medians over the rounds are told, of

    pause        the time of the call that saves, in which no step is taken
    in all       that, and what the steps after it took longer than without a checkpoint

The goal is a pause of at most 20 % of that of a checkpoint that is waited for. What it costs in all depends on how much
of the machine training leaves to the writing: on a CPU, whose cores compute, hashing and writing slow the steps down.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from parallel import write_inputs

from megacore.checkpoint import Checkpoint
from megacore.parallel import ParallelContext
from megacore.training import Batch, Engine, RunConfig, batches
from megacore.training.checkpointing.final_model import ReservedOutput
from megacore.training.checkpointing.manager import RunCheckpoints
from megacore.training.resolved import resolve_run
from megacore.training.schedule import Progress
from megacore.training.step_guard import StepGuard

GOAL = 0.20


def run_in(directory: Path, num_steps: int) -> RunConfig:
    return RunConfig.model_validate(
        {
            "model": {"checkpoint": directory / "checkpoint"},
            "data": {"prefix": directory / "data", "seq_length": 256},
            "optimizer": {"lr": 1e-4},
            "training": {"train_iters": num_steps, "global_batch_size": 2},
            "checkpoints": {"interval": 1, "keep_last": 1, "directory": directory / "checkpoints"},
            "output": {"checkpoint": directory / "out"},
        }
    )


def seconds_of_steps(engine: Engine, own_batches: Iterator[Batch], num_steps: int) -> float:
    started = time.perf_counter()
    for batch in islice(own_batches, num_steps):
        engine.step(batch, lr=1e-4)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--directory", type=Path, help="where to write; by default the system's temporary directory")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.directory) as name:
        directory = Path(name)
        num_steps = 3 * options.steps * (options.rounds + 1)
        write_inputs(directory, num_steps)
        run = run_in(directory, num_steps)
        checkpoint = Checkpoint(run.model.checkpoint)
        engine = Engine(resolve_run(run), ParallelContext.single())
        saved = RunCheckpoints(
            engine,
            StepGuard(run.faults),
            checkpoint,
            run_id="benchmark",
            datasets={},
            output=ReservedOutput(directory / "out", directory, {}),
        )
        own_batches = batches(run, checkpoint)
        progress = Progress()
        times: dict[str, list[float]] = {"steps": [], "sync": [], "sync in all": [], "async": [], "async in all": []}
        with saved.opened():
            for number in range(options.rounds + 1):  # the first is to warm up
                without = seconds_of_steps(engine, own_batches, options.steps)
                measured = {"steps": without}
                for kind in ("sync", "async"):
                    progress.iteration += 1
                    started = time.perf_counter()
                    saved.save(progress, waits=kind == "sync")
                    measured[kind] = time.perf_counter() - started
                    seconds_of_steps(engine, own_batches, options.steps)
                    saved.wait()
                    measured[f"{kind} in all"] = time.perf_counter() - started - without
                if number:
                    for key, seconds in measured.items():
                        times[key].append(seconds)
        size = Checkpoint(saved.directory.path / "latest").num_bytes
    median = {key: statistics.median(values) for key, values in times.items()}
    print(f"{size / 1e9:.2f} GB; {options.steps} steps without a checkpoint: {median['steps']:.3f} s")
    print(f"waited for:     pause {median['sync']:.3f} s, in all {median['sync in all']:.3f} s")
    print(f"written beside: pause {median['async']:.3f} s, in all {median['async in all']:.3f} s")
    ratio = statistics.median(one / other for one, other in zip(times["async"], times["sync"], strict=True))
    in_all = median["async in all"] / median["sync in all"]
    verdict = "met" if ratio <= GOAL else "MISSED"
    print(f"pause {ratio:.1%} of that of one that is waited for (goal {GOAL:.0%}: {verdict}); in all {in_all:.0%}")


if __name__ == "__main__":
    main()
