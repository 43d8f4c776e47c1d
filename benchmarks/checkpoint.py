"""The pause of training for an asynchronous checkpoint, compared with a synchronous one.

    python benchmarks/checkpoint.py [--rounds N] [--steps N] [--directory DIR]

The model: 4 layers, hidden size 1024, ffn 2816, 16 heads, vocabulary 2048, random weights, float32, in one process;
with AdamW's state a checkpoint is 0.67 GB. Each round takes ``--steps`` steps without a checkpoint, then as many after
a synchronous one, then as many after an asynchronous one, including the wait until it is complete. The medians over
the rounds are printed:

    pause        the time of the call that saves, in which no step is taken
    total        the pause, and the slowdown of the steps after it

The goal is a pause of at most 20 % of that of a synchronous checkpoint. The total depends on the resources that
training leaves for writing: on a CPU, hashing and writing slow down the steps.
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
    parser.add_argument("--directory", type=Path, help="where to write; by default the temporary directory")
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
        times: dict[str, list[float]] = {"steps": [], "sync": [], "sync total": [], "async": [], "async total": []}
        with saved.opened():
            for number in range(options.rounds + 1):  # the first is a warm-up
                without = seconds_of_steps(engine, own_batches, options.steps)
                measured = {"steps": without}
                for kind in ("sync", "async"):
                    progress.iteration += 1
                    started = time.perf_counter()
                    saved.save(progress, waits=kind == "sync")
                    measured[kind] = time.perf_counter() - started
                    seconds_of_steps(engine, own_batches, options.steps)
                    saved.wait()
                    measured[f"{kind} total"] = time.perf_counter() - started - without
                if number:
                    for key, seconds in measured.items():
                        times[key].append(seconds)
        size = Checkpoint(saved.directory.path / "latest").num_bytes
    median = {key: statistics.median(values) for key, values in times.items()}
    print(f"{size / 1e9:.2f} GB; {options.steps} steps without a checkpoint: {median['steps']:.3f} s")
    print(f"synchronous:  pause {median['sync']:.3f} s, total {median['sync total']:.3f} s")
    print(f"asynchronous: pause {median['async']:.3f} s, total {median['async total']:.3f} s")
    ratio = statistics.median(own / sync for own, sync in zip(times["async"], times["sync"], strict=True))
    total_ratio = median["async total"] / median["sync total"]
    verdict = "met" if ratio <= GOAL else "MISSED"
    print(f"pause {ratio:.1%} of a synchronous one (goal {GOAL:.0%}: {verdict}); total {total_ratio:.0%}")


if __name__ == "__main__":
    main()
