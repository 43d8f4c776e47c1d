"""Training for a longer context: what the run file changes about the rotary embedding, and where it ends up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F  # noqa: N812
from transformers import AutoConfig, AutoModelForCausalLM

import megacore
import tiny_run
from megacore.checkpoint import Checkpoint
from megacore.errors import ConfigError
from megacore.model import load_model
from megacore.parallel import ParallelContext
from megacore.training import RunConfig, batches
from recorded_steps import train_steps
from tiny_llama import write_dataset
from tiny_models import falcon_with_linear_biases


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tiny_run.prepare(tmp_path_factory.mktemp("context"))


def run_of(place: Path, out: Path, *overrides: str, checkpoint: str = "checkpoint") -> RunConfig:
    base = ("training.train_iters=1", "data.seq_length=24")
    return tiny_run.run_of(place, out, *base, *overrides, checkpoint=checkpoint)


CHANGES: dict[str, tuple[list[str], dict[str, Any], int]] = {
    "scaled": (["model.rope_scaling_factor=4"], {"rope_type": "linear", "factor": 4.0}, 128),
    "of another base": (["model.rope_theta=2e5", "model.max_position_embeddings=64"], {"rope_theta": 2e5}, 64),
    "both": (
        ["model.rope_theta=500.0", "model.rope_scaling_factor=1.5", "model.max_position_embeddings=40"],
        {"rope_type": "linear", "factor": 1.5, "rope_theta": 500.0},
        40,
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_model_is_trained_and_exported_with_a_rotary_embedding_that_is(place, tmp_path, change):
    overrides, parameters, positions = CHANGES[change]
    run = run_of(place, tmp_path / "out", *overrides)
    [batch] = batches(run, Checkpoint(place / "checkpoint"))
    config = AutoConfig.from_pretrained(place / "published")
    config.rope_parameters = {**config.rope_parameters, **parameters}
    published = AutoModelForCausalLM.from_pretrained(place / "published", config=config, dtype=torch.float32)
    logits = published(batch.tokens[:, :-1]).logits
    expected = F.cross_entropy(logits.flatten(0, 1), batch.tokens[:, 1:].flatten())

    [step] = train_steps(run)
    megacore.export(tmp_path / "out", tmp_path / "exported")

    assert step.loss == pytest.approx(expected.item(), rel=1e-5)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "exported", dtype=torch.float32)
    assert exported.config.max_position_embeddings == positions
    assert exported.config.rope_parameters.items() >= parameters.items()
    trained = load_model(Checkpoint(tmp_path / "out"), ParallelContext.single(), dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(
            exported(batch.tokens[:, :-1]).logits, trained(batch.tokens[:, :-1]), rtol=1e-4, atol=1e-4
        )


def test_a_factor_replaces_that_of_the_checkpoint(place, tmp_path):
    megacore.train(run_of(place, tmp_path / "twice", "model.rope_scaling_factor=2"))
    megacore.train(run_of(tmp_path, tmp_path / "out", "model.rope_scaling_factor=3", f"data.prefix={place / 'data'}",
                          checkpoint="twice"))  # fmt: skip

    config = Checkpoint(tmp_path / "out").manifest.config
    assert config["rope_scaling"] == {"method": "linear", "factor": 3.0}
    assert config["max_position_embeddings"] == 96


def test_without_any_change_the_checkpoint_says_what_it_said(place, tmp_path):
    megacore.train(run_of(place, tmp_path / "out"))

    assert Checkpoint(tmp_path / "out").manifest.config == Checkpoint(place / "checkpoint").manifest.config


def test_a_model_without_a_rotary_embedding_or_with_another_scaling_is_refused(tmp_path):
    write_dataset(tmp_path / "data")
    falcon_with_linear_biases(tmp_path / "published")
    megacore.convert("falcon", tmp_path / "published", tmp_path / "checkpoint")
    with pytest.raises(ConfigError, match=r"change a rotary embedding, and the positions of this model are alibi"):
        megacore.train(run_of(tmp_path, tmp_path / "out", "model.rope_theta=1e5"))

    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    tiny_run.prepare(tmp_path / "other", rope_parameters=dynamic)
    with pytest.raises(ConfigError, match=r"is of linear scaling, and the checkpoint has dynamic_ntk scaling"):
        megacore.train(run_of(tmp_path / "other", tmp_path / "out", "model.rope_scaling_factor=2"))
