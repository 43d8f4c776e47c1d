"""Files of ``torch.save``: torch reads what is written here; what torch wrote is read here, unless it could harm."""

from __future__ import annotations

import argparse
import enum
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from megacore.checkpoint.matrix import StoredMatrix, as_matrix
from megacore.checkpoint.safetensors_file import OutputTensor
from megacore.checkpoint.torch_file import (
    Foreign,
    foreign,
    output_tensor,
    read_torch_file,
    write_torch_file,
)
from megacore.errors import CheckpointError, CorruptCheckpointError


class Colour(enum.Enum):
    red = 1


def to_write(name: str, tensor: torch.Tensor) -> OutputTensor:
    matrix = tensor if tensor.dim() == 2 else tensor.view(-1, 1)
    return OutputTensor(
        name, tuple(tensor.shape), tensor.dtype, StoredMatrix(*matrix.shape, tensor.dtype, lambda: matrix)
    )


DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


# Writing


@pytest.mark.parametrize("mmap", [False, True])
def test_torch_reads_a_written_file(tmp_path, mmap):
    tensors = {str(dtype): torch.randn(5, 7).to(dtype) for dtype in DTYPES} | {"vector": torch.randn(9)}
    document = {name: to_write(name, tensor) for name, tensor in tensors.items()}

    write_torch_file(tmp_path / "f.pt", {"model": {"nested": document}, "iteration": 3, "names": ["a", None, 2.5]})

    read = torch.load(tmp_path / "f.pt", weights_only=True, mmap=mmap)
    assert read["iteration"] == 3
    assert read["names"] == ["a", None, 2.5]
    found = read["model"]["nested"]
    assert list(found) == list(tensors)
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert torch.equal(found[name], tensor)


def test_a_written_file_is_a_sound_archive_of_aligned_entries(tmp_path):
    write_torch_file(tmp_path / "f.pt", {str(size): to_write(str(size), torch.randn(size)) for size in (1, 3, 100, 7)})

    with zipfile.ZipFile(tmp_path / "f.pt") as archive:
        assert archive.testzip() is None
    reader = torch._C.PyTorchFileReader(str(tmp_path / "f.pt"))
    assert [reader.get_record_offset(f"data/{key}") % 64 for key in range(4)] == [0] * 4


def test_the_pickle_of_a_written_file_is_the_one_that_torch_writes(tmp_path):
    tensors = {"a": torch.randn(3, 2), "b": torch.randn(4)}
    torch.save(tensors, tmp_path / "theirs.pt")

    write_torch_file(tmp_path / "ours.pt", {name: to_write(name, tensor) for name, tensor in tensors.items()})

    ours, theirs = (torch._C.PyTorchFileReader(str(tmp_path / name)) for name in ("ours.pt", "theirs.pt"))
    for record in ("data/0", "data/1", "byteorder", "version"):
        assert ours.get_record(record) == theirs.get_record(record), record
    named = [torch.serialization.get_unsafe_globals_in_checkpoint(tmp_path / name) for name in ("ours.pt", "theirs.pt")]
    assert named == [[], []]


def test_progress_adds_up_to_the_bytes_of_the_tensors(tmp_path):
    told: list[int] = []

    write_torch_file(tmp_path / "f.pt", {"a": to_write("a", torch.randn(3000, 1000))}, advance=told.append)

    assert sum(told) == 12_000_000
    assert len(told) > 1


def test_one_tensor_under_two_names_is_written_once(tmp_path):
    shared = to_write("a", torch.randn(100))

    write_torch_file(tmp_path / "f.pt", {"a": shared, "b": shared})

    read = torch.load(tmp_path / "f.pt", weights_only=True)
    assert read["a"].data_ptr() == read["b"].data_ptr()


def test_a_tensor_in_memory_is_a_programmers_mistake(tmp_path):
    with pytest.raises(TypeError, match="must be an OutputTensor"):
        write_torch_file(tmp_path / "f.pt", {"a": torch.zeros(1)})


# Reading


def test_what_torch_wrote_is_read_block_by_block(tmp_path):
    matrix, vector = torch.randn(6, 5), torch.randn(4)
    torch.save({"m": matrix, "transposed": matrix.T, "v": vector}, tmp_path / "f.pt")

    read = read_torch_file(tmp_path / "f.pt")

    rows = torch.tensor([5, 0, 2])
    assert torch.equal(as_matrix(read["m"]).read(slice(1, 4), slice(2, 5)), matrix[1:4, 2:5])
    assert torch.equal(as_matrix(read["m"]).read(rows, slice(0, 5)), matrix[rows])
    assert torch.equal(as_matrix(read["transposed"]).read(slice(1, 3), slice(0, 6)), matrix.T[1:3])
    assert as_matrix(read["v"]).read(slice(1, 3), slice(0, 1)).tolist() == vector[1:3, None].tolist()


def test_what_was_read_can_be_written_again(tmp_path):
    tensors = {"a": torch.randn(2, 3, 4), "b": torch.randn(3, 5).T}
    torch.save(tensors, tmp_path / "f.pt")

    read = read_torch_file(tmp_path / "f.pt")
    write_torch_file(tmp_path / "g.pt", {name: output_tensor(name, tensor) for name, tensor in read.items()})

    again = torch.load(tmp_path / "g.pt", weights_only=True)
    assert all(torch.equal(again[name], tensor) for name, tensor in tensors.items())


def test_classes_that_are_allowed_are_read_and_others_stood_in_for(tmp_path):
    arguments = argparse.Namespace(layers=3, colour=Colour.red, dtype=torch.float32)
    torch.save({"args": arguments}, tmp_path / "f.pt")
    name = f"{Colour.__module__}.Colour"

    read = read_torch_file(tmp_path / "f.pt", allowed=[argparse.Namespace, foreign(name)])["args"]

    assert (read.layers, read.dtype) == (3, torch.float32)
    assert isinstance(read.colour, Foreign)
    assert (read.colour.qualified_name, read.colour.arguments) == (name, (1,))


def test_what_was_stood_in_for_is_written_back_under_its_own_name(tmp_path):
    arguments = argparse.Namespace(colour=Colour.red, again=Colour.red)
    torch.save({"args": arguments}, tmp_path / "f.pt")
    name = f"{Colour.__module__}.Colour"
    read = read_torch_file(tmp_path / "f.pt", allowed=[argparse.Namespace, foreign(name)])

    write_torch_file(tmp_path / "g.pt", read)

    with torch.serialization.safe_globals([argparse.Namespace, (Colour, name)]):
        assert torch.load(tmp_path / "g.pt", weights_only=True)["args"] == arguments


# Refusing


class Harmful:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_a_file_that_would_run_something_is_refused_and_runs_nothing(tmp_path):
    torch.save({"a": torch.zeros(1), "b": Harmful(tmp_path / "executed")}, tmp_path / "f.pt")

    with pytest.raises(CheckpointError) as caught:
        read_torch_file(tmp_path / "f.pt", allowed=[argparse.Namespace])

    assert str(caught.value) == (
        f"{tmp_path}/f.pt names posix.system, which a file of weights does not need. It was not loaded and nothing in "
        "it was executed: a file like this can run any program. If you trust its author, ask for a file with the "
        "tensors alone"
    )
    assert caught.value.exit_code == 2
    assert not (tmp_path / "executed").exists()


def test_what_is_allowed_once_is_not_allowed_for_good(tmp_path):
    torch.save(argparse.Namespace(a=1), tmp_path / "f.pt")
    read_torch_file(tmp_path / "f.pt", allowed=[argparse.Namespace])

    with pytest.raises(CheckpointError, match=r"names argparse\.Namespace, which"):
        read_torch_file(tmp_path / "f.pt")


@pytest.mark.parametrize("part", [0, 0.3, 0.99])
def test_a_truncated_file_is_damaged(tmp_path, part):
    torch.save({"a": torch.randn(1000)}, tmp_path / "f.pt")
    whole = (tmp_path / "f.pt").read_bytes()
    (tmp_path / "f.pt").write_bytes(whole[: int(part * len(whole))])

    with pytest.raises(CorruptCheckpointError, match=r"f\.pt is incomplete \(\d+ bytes\)"):
        read_torch_file(tmp_path / "f.pt")


def test_an_archive_whose_tensors_are_shorter_than_it_says_is_damaged(tmp_path):
    torch.save({"a": torch.randn(1000)}, tmp_path / "f.pt")
    with zipfile.ZipFile(tmp_path / "f.pt") as old, zipfile.ZipFile(tmp_path / "g.pt", "w") as new:
        for entry in old.namelist():
            new.writestr(entry, old.read(entry)[: 100 if entry.endswith("data/0") else None])

    with pytest.raises(CorruptCheckpointError, match="is damaged or incomplete"):
        read_torch_file(tmp_path / "g.pt")


def test_a_missing_file_is_said_to_be_missing(tmp_path):
    with pytest.raises(CheckpointError, match=r"f\.pt is missing"):
        read_torch_file(tmp_path / "f.pt")


# Memory

STREAM = """
import re, sys, threading, time
from pathlib import Path
import torch
from megacore.checkpoint.torch_file import output_tensor, read_torch_file, write_torch_file

def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024

torch.zeros(10).sum()
before, peak, done = anonymous(), [0.0], []
def watch():
    while not done:
        peak[0] = max(peak[0], anonymous())
        time.sleep(0.002)
thread = threading.Thread(target=watch)
thread.start()
read = read_torch_file(Path(sys.argv[1]))
write_torch_file(Path(sys.argv[2]), {name: output_tensor(name, tensor) for name, tensor in read.items()})
done.append(True)
thread.join()
print(peak[0] - before)
"""


def test_a_tensor_of_100_megabytes_streams_through_a_few_megabytes_of_memory(tmp_path):
    tensor = torch.arange(25_000_000, dtype=torch.float32).view(5000, 5000)
    torch.save({"a": tensor}, tmp_path / "f.pt")

    result = subprocess.run(
        [sys.executable, "-c", STREAM, tmp_path / "f.pt", tmp_path / "g.pt"], capture_output=True, text=True, check=True
    )

    assert float(result.stdout) < 30
    assert torch.equal(torch.load(tmp_path / "g.pt", mmap=True)["a"], tensor)
