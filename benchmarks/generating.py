"""The speed of generation, compared with transformers' ``generate`` and its cache in the same run.

    python benchmarks/generating.py [--rounds N] [--tokens N] [--prompt-tokens N] [--batch N]

The model: 30 layers, hidden size 576, ffn 1536, 9 query heads on 3 key-value heads, vocabulary 49152, tied
embeddings, like SmolLM2-135M, random weights, float32, greedy decoding, as many threads as there are cores. Both
continue the same random prompts of one length by the same number of tokens, none of which ends a text; the time is that
of the whole call, including the prompts and without loading. They alternate, ``--rounds`` times; the ratio is that of
tokens/s, ours over theirs, as the median over the rounds. Nearly all of the time is spent in products with the weights,
which are torch's on both sides: the goal is to lose no more than 5 % to anything else.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from megacore import Checkpoint, convert
from megacore.generation import Limits, Sampling, TextGenerator
from megacore.parallel import ParallelContext

GOAL = 0.95
CONFIG = LlamaConfig(
    num_hidden_layers=30,
    hidden_size=576,
    intermediate_size=1536,
    num_attention_heads=9,
    num_key_value_heads=3,
    vocab_size=49152,
    max_position_embeddings=8192,
    tie_word_embeddings=True,
    eos_token_id=None,
)


def seconds(generate: Callable[[], list[list[int]]]) -> float:
    started = time.perf_counter()
    generate()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4])
    options = parser.parse_args()
    logging.disable_progress_bar()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory(prefix="benchmark-") as directory:
        published, checkpoint = Path(directory) / "published", Path(directory) / "checkpoint"
        LlamaForCausalLM(CONFIG).save_pretrained(published)
        convert("llama", published, checkpoint)
        theirs = AutoModelForCausalLM.from_pretrained(published, dtype=torch.float32)
        ours = TextGenerator(Checkpoint(checkpoint), ParallelContext.single())
    print("batch  tokens/s  transformers' tokens/s  ratio  goal")
    for batch in options.batch:
        prompts = torch.randint(0, CONFIG.vocab_size, (batch, options.prompt_tokens))
        limits = Limits(max_new_tokens=options.tokens, end_ids=())

        def generate(prompts: torch.Tensor = prompts, limits: Limits = limits) -> list[list[int]]:
            return [result.ids for result in ours.generate(prompts.tolist(), limits, Sampling())]

        def generate_theirs(prompts: torch.Tensor = prompts) -> list[list[int]]:
            whole = theirs.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                do_sample=False,
                max_new_tokens=options.tokens,
                pad_token_id=0,
            )
            return whole[:, options.prompt_tokens :].tolist()

        assert generate() == generate_theirs(), "they generate different tokens"  # also a warm-up
        times: dict[str, list[float]] = {"ours": [], "theirs": []}
        for number in range(options.rounds):
            ways = [("ours", generate), ("theirs", generate_theirs)]
            for name, way in ways if number % 2 == 0 else reversed(ways):
                times[name].append(seconds(way))
        ratio = statistics.median(
            reference / own for own, reference in zip(times["ours"], times["theirs"], strict=True)
        )
        rates = [batch * options.tokens / statistics.median(measured) for measured in times.values()]
        verdict = "met" if ratio >= GOAL else "MISSED"
        print(f"{batch:>5}{rates[0]:>10.1f}{rates[1]:>24.1f}{ratio:>7.2f}  {GOAL:>4.2f} {verdict}")


if __name__ == "__main__":
    main()
