"""What the loss and recomputed layers take, as ``benchmarks/memory.py`` measures it."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

BENCHMARK = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "memory.py"))

measured = BENCHMARK["measure_in_new_process"]


def test_the_loss_needs_less_than_half_of_the_logits_beyond_hidden_states_and_gradients():
    logits = BENCHMARK["BATCH"] * BENCHMARK["SEQUENCE"] * BENCHMARK["VOCAB"] * 4

    beyond = measured("loss")

    assert 0 < beyond < 100e6 < logits / 2


@pytest.mark.parametrize("mode", ["full", "full, 2 at a time"])
def test_full_recomputation_keeps_the_inputs_of_its_blocks_and_little_else(mode):
    expected = BENCHMARK["bytes_by_formula"](mode)

    kept = measured("activations", mode)

    assert kept == pytest.approx(expected, rel=0.1)


def test_selective_recomputation_keeps_less_than_none():
    assert measured("activations", "selective") < 0.97 * measured("activations", "none")
