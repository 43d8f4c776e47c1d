"""The training speed of two processes with one thread each, compared with one process with two threads in the same run.

    python benchmarks/parallel.py [--rounds N] [--steps N] [layout ...]

The model: 4 layers, hidden size 1024, ffn 2816, 16 heads, vocabulary 2048, random weights, float32; a step is 8 samples
of 256 tokens in micro-batches of one, with AdamW. Each layout starts its processes, takes two steps to warm up and
then times ``--steps`` more, of which the median counts; the layouts alternate, ``--rounds`` times. The efficiency is
the time of the single process over that of the layout, as the median over the rounds.

The efficiency of ``pp 2`` is bounded by its bubble: ``m / (m + p - 1)`` for ``m`` micro-batches on ``p`` stages, in a
schedule in which stages wait for each other at the beginning and at the end.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

from megacore import ModelConfig, get_family
from megacore.checkpoint import Checkpoint, Layout, ModelDescription
from megacore.checkpoint.matrix import StoredMatrix
from megacore.checkpoint.writing import Parameter, write_checkpoint
from megacore.data import IndexedDatasetWriter
from megacore.model import model_specs
from megacore.parallel import ParallelContext, ParallelSizes, run_on_ranks
from megacore.training import Engine, RunConfig, batches
from megacore.training.resolved import resolve_run

NUM_MICRO_BATCHES = 8
CONFIG = ModelConfig(
    family="llama",
    num_layers=4,
    hidden_size=1024,
    ffn_hidden_size=2816,
    num_attention_heads=16,
    num_kv_heads=16,
    head_dim=64,
    vocab_size=2048,
    max_position_embeddings=256,
    norm_eps=1e-5,
)
BUBBLE = NUM_MICRO_BATCHES / (NUM_MICRO_BATCHES + 1)

LAYOUTS: dict[str, dict[str, object]] = {
    "one process": {},
    "tp 2": {"tensor_parallel": 2},
    "tp 2, sequence parallel": {"tensor_parallel": 2, "sequence_parallel": True},
    "pp 2, 1F1B": {"pipeline_parallel": 2},
    "pp 2, Interleaved1F1B": {"pipeline_parallel": 2, "pipeline_schedule": "Interleaved1F1B"},
    "pp 2, ZBVZeroBubble": {"pipeline_parallel": 2, "pipeline_schedule": "ZBVZeroBubble"},
    "dp 2": {"nproc_per_node": 2},
    "dp 2, sharded": {"nproc_per_node": 2, "data_parallel": "sharded"},
}
GOALS = {"tp 2": 0.90, "pp 2, 1F1B": 0.85 * BUBBLE, "dp 2": 0.90}


def write_inputs(directory: Path, num_steps: int) -> None:
    """Write a checkpoint of random weights, and a dataset of random tokens for ``num_steps`` steps."""
    generator = torch.Generator().manual_seed(0)
    parameters = {}
    for name, spec in model_specs(CONFIG, get_family(CONFIG.family).build_layer).items():
        tensor = torch.randn(spec.matrix_shape, generator=generator) / CONFIG.hidden_size**0.5
        matrix = StoredMatrix(*spec.matrix_shape, torch.float32, lambda tensor=tensor: tensor)
        parameters[name] = Parameter(spec, matrix, torch.float32)
    write_checkpoint(
        directory / "checkpoint",
        parameters,
        ModelDescription(family=CONFIG.family, config=CONFIG.to_dict()),
        layout=Layout.even(tp=1, pp=1, num_layers=CONFIG.num_layers),
        tokenizer_files={},
    )
    num_tokens = num_steps * NUM_MICRO_BATCHES * CONFIG.max_position_embeddings + 1
    with IndexedDatasetWriter(directory / "data", "uint16") as writer:
        writer.add_document(torch.randint(0, CONFIG.vocab_size, (num_tokens,), generator=generator).tolist())


def run_of(directory: Path, num_steps: int, parallel: dict[str, object]) -> RunConfig:
    return RunConfig.model_validate(
        {
            "model": {"checkpoint": directory / "checkpoint"},
            "data": {"prefix": directory / "data", "seq_length": CONFIG.max_position_embeddings},
            "parallel": parallel,
            "optimizer": {"lr": 1e-4},
            "training": {"train_iters": num_steps, "global_batch_size": NUM_MICRO_BATCHES},
            "output": {"checkpoint": directory / "trained"},
        }
    )


def step_seconds(parallel: ParallelContext, run: RunConfig) -> float:
    """Return the median time of a step, after two steps to warm up."""
    torch.set_num_threads(2 if parallel.mesh is None else 1)
    checkpoint = Checkpoint(run.model.checkpoint)
    engine = Engine(resolve_run(run), parallel)
    times = []
    for batch in batches(run, checkpoint, dp_rank=parallel.dp_rank, dp_size=parallel.dp_size):
        started = time.perf_counter()
        engine.step(batch, lr=1e-4)
        times.append(time.perf_counter() - started)
    return statistics.median(times[2:])


def measure(directory: Path, num_steps: int, layout: str) -> float:
    run = run_of(directory, num_steps, LAYOUTS[layout])
    world = 1 if layout == "one process" else 2
    sizes = ParallelSizes.of_world(
        world,
        tp=run.parallel.tensor_parallel,
        pp=run.parallel.pipeline_parallel,
        dp_shard=None if run.parallel.data_parallel == "sharded" else 1,
        sequence_parallel=run.parallel.sequence_parallel,
    )
    return run_on_ranks(step_seconds, run, sizes=sizes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("layouts", nargs="*", metavar="layout", help=f"one of {', '.join(LAYOUTS)}")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5)
    options = parser.parse_args()
    layouts = ["one process", *(options.layouts or [name for name in LAYOUTS if name != "one process"])]
    num_steps = options.steps + 2
    times: dict[str, list[float]] = {layout: [] for layout in layouts}
    with tempfile.TemporaryDirectory(prefix="benchmark-") as directory:
        write_inputs(Path(directory), num_steps)
        for number in range(options.rounds):
            for layout in layouts[number % len(layouts) :] + layouts[: number % len(layouts)]:
                times[layout].append(measure(Path(directory), num_steps, layout))
    print(f"{'':<26}seconds / step  efficiency  goal")
    for layout, measured in times.items():
        ratios = [alone / seconds for alone, seconds in zip(times["one process"], measured, strict=True)]
        goal = f"{GOALS[layout]:.2f}" if layout in GOALS else "-"
        efficiency = statistics.median(ratios)
        verdict = "" if layout not in GOALS else " met" if efficiency >= GOALS[layout] else " MISSED"
        print(f"{layout:<26}{statistics.median(measured):>14.2f}{efficiency:>12.2f}  {goal:>4}{verdict}")
    print(f"pp 2 with {NUM_MICRO_BATCHES} micro-batches: the bubble allows {BUBBLE:.2f}, the goal is 0.85 of that")


if __name__ == "__main__":
    main()
