"""``megacore translate``: what it takes besides a directory, and what its progress bar is told."""

from __future__ import annotations

import json

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

import megacore
from megacore.cli import cli
from megacore.cli.progress import published_bytes
from megacore.cli.published_options import FORMAT_NAMES
from megacore.errors import CheckpointError, ConfigError
from megacore.weights.formats import FORMATS
from megatron_llm_files import TRACKER, model_of, write_megatron_llm


@pytest.fixture
def padded(publish, shapes, tmp_path):
    """A directory in the format megatron-llm whose vocabulary of 99 is padded to 128, and the model that is in it."""
    published = publish(**shapes["2 key-value heads"])
    write_megatron_llm(tmp_path / "meg", model_of(published.tensors(), published.model.config), tp=2, vocab_rows=128)
    return tmp_path / "meg", published


def test_padding_is_dropped_when_the_true_vocabulary_is_given(padded, tmp_path):
    directory, published = padded

    command = ["translate", "--model", "llama", "--from", str(directory), "--out", str(tmp_path / "hf")]
    done = CliRunner().invoke(cli, [*command, "--true-vocab-size", "99"])

    assert done.exit_code == 0, done.output
    assert "the last 29 rows of the vocabulary are padding and were dropped" in done.stderr
    found, expected = load_file(tmp_path / "hf" / "model.safetensors"), published.tensors()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["vocab_size"] == 99


def test_a_true_vocabulary_for_a_format_that_does_not_pad_is_refused(padded, tmp_path):
    with pytest.raises(ConfigError, match="leave out --true-vocab-size"):
        megacore.translate("llama", padded[1].directory, tmp_path / "out", format="meta", true_vocab_size=9)


@pytest.mark.parametrize(
    "command, option",
    [("convert", "--source"), ("translate", "--source"), ("translate", "--format"), ("export", "--format")],
)
def test_the_formats_are_named_in_the_help(command, option):
    assert tuple(FORMATS) == FORMAT_NAMES

    help = " ".join(CliRunner().invoke(cli, [command, "--help"]).output.split()).replace("- ", "-")  # of broken lines

    assert ", ".join(FORMATS) in help.partition(f" {option} ")[2].partition(" --")[0]


def test_progress_counts_the_weights_of_a_hugging_face_directory(padded):
    directory = padded[1].directory
    (directory / "training.pth").write_bytes(bytes(100))

    assert published_bytes(directory) == (directory / "model.safetensors").stat().st_size


def test_progress_counts_the_files_of_all_of_metas_ranks(tmp_path):
    (tmp_path / "params.json").write_text("{}")
    for name in ("consolidated.00.pth", "consolidated.01.pth", "training.pth", "model.safetensors"):
        (tmp_path / name).write_bytes(bytes(100))

    assert published_bytes(tmp_path) == 200


@pytest.mark.parametrize("tracked, folder", [("release", "release"), ("20", "iter_0000020")])
def test_progress_counts_the_tracked_iteration_alone(tmp_path, tracked, folder):
    (tmp_path / TRACKER).write_text(f"{tracked}\n")
    for name in ("release", "iter_0000010", "iter_0000020"):
        for rank in ("mp_rank_00", "mp_rank_01"):
            (tmp_path / name / rank).mkdir(parents=True)
            (tmp_path / name / rank / "model_optim_rng.pt").write_bytes(bytes(100 if name == folder else 7))

    assert published_bytes(tmp_path) == 200


def test_progress_of_what_is_no_checkpoint_is_refused_as_the_work_would_be(tmp_path):
    with pytest.raises(CheckpointError, match="in a known format"):
        published_bytes(tmp_path)
