"""The native checkpoint: how it is cut and put together again, what a reader touches, what a manifest refuses.

The truth about a cut is ``torch.chunk`` on whole tensors, along the axes in :data:`AXES`; files are read with
safetensors' own ``load_file``.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file
from torch import Tensor

import megacore
from megacore.checkpoint import Checkpoint, Layout, read_manifest
from megacore.checkpoint.matrix import StoredMatrix
from megacore.checkpoint.safetensors_file import SafetensorsFile, split_by_size
from megacore.cli import cli
from megacore.errors import CheckpointError, CorruptCheckpointError, LayoutError, OutputError

NUM_LAYERS = 5
PUBLISHED = {
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": NUM_LAYERS,
    "hidden_size": 24,
    "intermediate_size": 20,  # over 3: 7 + 7 + 6
    "num_attention_heads": 6,
    "num_key_value_heads": 3,  # over 2: 2 + 1
    "head_dim": 6,
    "vocab_size": 99,  # over 2: 50 + 49
    "max_position_embeddings": 64,
    "attention_bias": True,
    "mlp_bias": True,
}

AXES = {
    "word_embeddings.weight": 0,
    "linear_qkv.weight": 0,
    "linear_qkv.bias": 0,
    "linear_proj.weight": 1,
    "linear_proj.bias": None,
    "linear_fc1.weight": 1,
    "linear_fc1.bias": 1,
    "linear_fc2.weight": 1,
    "linear_fc2.bias": None,
    "input_layernorm.weight": None,
    "pre_mlp_layernorm.weight": None,
    "final_layernorm.weight": None,
    "output_layer.weight": 0,
}
"""The axis that tensor parallelism cuts, by the end of a parameter's name."""

STAGES = {1: [5], 2: [3, 2], 3: [2, 2, 1], 4: [2, 1, 1, 1], 5: [1] * 5}
"""How many layers each pipeline stage has."""

LAYOUTS = [(1, 1), (2, 1), (3, 1), (1, 2), (2, 2), (3, 5)]

Tensors = dict[str, Tensor]


def axis_of(name: str) -> int | None:
    return AXES[".".join(name.split(".")[-2:])]


def stage_of(name: str, pp: int) -> int:
    if match := re.match(r"decoder\.layers\.(\d+)\.", name):
        return [stage for stage, layers in enumerate(STAGES[pp]) for _ in range(layers)][int(match.group(1))]
    return 0 if name.startswith("embedding.") else pp - 1


def cut(whole: Tensors, tp: int, pp: int) -> dict[str, Tensors]:
    """What the files of a ``tp`` × ``pp`` checkpoint should hold, by file name."""
    files: dict[str, Tensors] = {}
    for tp_rank, stage in itertools.product(range(tp), range(pp)):
        files[f"model-tp{tp_rank:02d}-pp{stage:02d}.safetensors"] = {
            name: tensor if axis_of(name) is None else tensor.chunk(tp, dim=axis_of(name))[tp_rank]
            for name, tensor in whole.items()
            if stage_of(name, pp) == stage and (axis_of(name) is not None or tp_rank == 0)
        }
    return files


def weights_of(directory: Path) -> dict[str, Tensors]:
    """The tensors in the weight files of ``directory``, by file name, as safetensors reads them."""
    return {path.name: load_file(path) for path in sorted(directory.glob("*.safetensors"))}


def bits(tensor: Tensor) -> tuple[torch.dtype, tuple[int, ...], bytes]:
    return tensor.dtype, tuple(tensor.shape), tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def assert_same_tensors(found: dict[str, Tensors], expected: dict[str, Tensors]) -> None:
    """Files, names, shapes, dtypes and every byte."""
    assert found.keys() == expected.keys()
    for file, tensors in expected.items():
        assert found[file].keys() == tensors.keys(), file
        for name, tensor in tensors.items():
            assert bits(found[file][name]) == bits(tensor), f"{name} in {file}"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of random weights, as transformers saves it, with a tokenizer's file beside it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(7)
    model = LlamaForCausalLM(LlamaConfig(**PUBLISHED, tie_word_embeddings=False)).to(torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():  # biases start at 0 and norms at 1, and would hide what is mixed up
            parameter.normal_()
    directory = tmp_path_factory.mktemp("published")
    model.save_pretrained(directory)
    (directory / "tokenizer.json").write_text('{"not": "looked into"}')
    return directory


@pytest.fixture(scope="module")
def stored(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, int], Path]:
    """``stored(tp, pp)``: the checkpoint cut so, straight from the conversion; made once."""
    directory = tmp_path_factory.mktemp("native")

    def checkpoint(tp: int, pp: int) -> Path:
        path = directory / f"tp{tp}-pp{pp}"
        if not path.exists():
            megacore.convert("llama", source, path, tp=tp, pp=pp)
        return path

    return checkpoint


@pytest.fixture(scope="module")
def whole_path(stored: Callable[[int, int], Path]) -> Path:
    return stored(1, 1)


@pytest.fixture(scope="module")
def whole(whole_path: Path) -> Tensors:
    """The parameters of the whole model."""
    return load_file(whole_path / "model-tp00-pp00.safetensors")


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


# --- cutting and putting together


def test_split_and_back_is_byte_identical(whole_path, tmp_path):
    megacore.split(whole_path, tmp_path / "cut", tp=2, pp=2)
    megacore.split(tmp_path / "cut", tmp_path / "back", tp=1, pp=1)

    assert_same_tensors(weights_of(tmp_path / "back"), weights_of(whole_path))
    assert read_manifest(tmp_path / "back").parameters == read_manifest(whole_path).parameters
    assert read_manifest(tmp_path / "cut").parameters == read_manifest(whole_path).parameters
    for file in ("model-tp00-pp00.safetensors", "tokenizer/tokenizer.json"):
        assert (tmp_path / "back" / file).read_bytes() == (whole_path / file).read_bytes()


def test_a_split_checkpoint_differs_from_the_whole_one_in_layout_and_history_only(whole_path, tmp_path):
    megacore.split(whole_path, tmp_path / "cut", tp=2, pp=2)
    before, after = read_manifest(whole_path), read_manifest(tmp_path / "cut")

    for field in ("family", "config", "parameters", "tokenizer", "origin", "rotary_layout"):
        assert getattr(after, field) == getattr(before, field), field
    assert [entry["command"] for entry in after.history] == ["convert", "split"]
    assert after.history[0] == before.history[0]
    assert (after.history[1]["tp"], after.history[1]["pp"]) == (2, 2)


@pytest.mark.parametrize("tp, pp", LAYOUTS)
def test_converting_cuts_as_torch_chunk_does(stored, whole, tp, pp):
    assert_same_tensors(weights_of(stored(tp, pp)), cut(whole, tp, pp))


@pytest.mark.parametrize("before", LAYOUTS)
@pytest.mark.parametrize("after", LAYOUTS)
def test_any_layout_can_be_had_from_any_other(stored, whole, tmp_path, before, after):
    megacore.split(stored(*before), tmp_path / "out", tp=after[0], pp=after[1])

    assert_same_tensors(weights_of(tmp_path / "out"), cut(whole, *after))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_every_dtype_keeps_its_bits(source, tmp_path, dtype):
    megacore.convert("llama", source, tmp_path / "whole", dtype=dtype)
    whole = load_file(tmp_path / "whole" / "model-tp00-pp00.safetensors")

    megacore.split(tmp_path / "whole", tmp_path / "cut", tp=2, pp=2)

    assert {tensor.dtype for tensor in whole.values()} == {dtype}
    assert_same_tensors(weights_of(tmp_path / "cut"), cut(whole, 2, 2))


def test_bits_that_are_no_number_are_kept_too(source, tmp_path):
    tensors = load_file(source / "model.safetensors")
    payload = torch.tensor([0x7FA1, 0x7FC1, 0xFFFF, 0x8000, 0x0001], dtype=torch.uint16).view(torch.bfloat16)
    tensors["model.norm.weight"][:5] = payload  # NaNs of several kinds, -0, the smallest denormal
    published = tmp_path / "published"
    published.mkdir()
    (published / "config.json").write_bytes((source / "config.json").read_bytes())
    save_file(tensors, published / "model.safetensors")

    megacore.convert("llama", published, tmp_path / "whole")
    megacore.split(tmp_path / "whole", tmp_path / "cut", tp=2, pp=2)

    kept = weights_of(tmp_path / "cut")["model-tp00-pp01.safetensors"]["decoder.final_layernorm.weight"]
    assert torch.equal(kept[:5].view(torch.uint16), payload.view(torch.uint16))


def test_layers_that_do_not_divide_are_spread_with_the_first_stages_taking_more(stored):
    assert read_manifest(stored(1, 2)).layout.stages == ((0, 3), (3, 5))
    for pp, layers in STAGES.items():
        stages = Layout.even(tp=1, pp=pp, num_layers=NUM_LAYERS).stages
        assert [stop - start for start, stop in stages] == layers


# --- what the files hold


@pytest.mark.parametrize("tp, pp", [(2, 2), (3, 5)])
def test_what_is_not_cut_is_stored_once_and_nothing_twice(stored, whole, tp, pp):
    held = [(file, name) for file, tensors in weights_of(stored(tp, pp)).items() for name in tensors]

    for name in whole:
        files = [file for file, other in held if other == name]
        assert len(files) == (1 if axis_of(name) is None else tp), name
        assert len({file.split("-pp")[1] for file in files}) == 1, f"{name} is on several stages"


@pytest.mark.parametrize("tp, pp", LAYOUTS)
def test_the_sizes_of_the_parts_add_up_to_the_whole(stored, whole, tp, pp):
    parts = [tensor.numel() for tensors in weights_of(stored(tp, pp)).values() for tensor in tensors.values()]
    assert sum(parts) == sum(tensor.numel() for tensor in whole.values())


def test_a_checkpoint_is_its_files_and_the_manifest_tells_all_of_them(stored):
    directory = stored(2, 2)
    manifest = read_manifest(directory)

    files = {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}

    assert files == {"megacore.json", "tokenizer/tokenizer.json", *manifest.files}
    for name, file in manifest.files.items():
        content = (directory / name).read_bytes()
        assert file.record.num_bytes == len(content)
        assert file.record.sha256 == hashlib.sha256(content).hexdigest()
        assert set(file.tensors) == set(load_file(directory / name))
        assert name == f"model-tp{file.tp_rank:02d}-pp{file.stage:02d}.safetensors"


def test_files_over_the_limit_become_several_that_read_as_one(whole_path, whole, tmp_path, monkeypatch):
    limit = 8_000
    monkeypatch.setattr("megacore.checkpoint.writing.split_by_size", partial(split_by_size, limit=limit))
    megacore.split(whole_path, tmp_path / "cut", tp=2)
    monkeypatch.undo()

    files = weights_of(tmp_path / "cut")
    for rank in range(2):
        names = [name for name in files if name.startswith(f"model-tp{rank:02d}-pp00")]
        assert len(names) > 2
        assert names == [
            f"model-tp{rank:02d}-pp00-{number:05d}-of-{len(names):05d}.safetensors"
            for number in range(1, len(names) + 1)
        ]
    assert all(sum(tensor.nbytes for tensor in tensors.values()) <= limit for tensors in files.values())
    assert megacore.inspect(tmp_path / "cut", check=True)["checked"]

    megacore.split(tmp_path / "cut", tmp_path / "back")
    assert_same_tensors(weights_of(tmp_path / "back"), weights_of(whole_path))


def test_a_tensor_over_the_limit_has_a_file_of_its_own(whole_path, whole, tmp_path, monkeypatch):
    monkeypatch.setattr("megacore.checkpoint.writing.split_by_size", partial(split_by_size, limit=1))
    megacore.split(whole_path, tmp_path / "out")
    assert sorted(len(tensors) for tensors in weights_of(tmp_path / "out").values()) == [1] * len(whole)


# --- reading slices


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tp_size", [1, 2, 3])
def test_a_rank_of_any_layout_reads_its_part_from_any_layout(stored, whole, layout, tp_size):
    checkpoint = Checkpoint(stored(*layout))
    for tp_rank in range(tp_size):
        for name, spec in checkpoint.manifest.specs.items():
            tensor = whole[name]
            expected = tensor if axis_of(name) is None else tensor.chunk(tp_size, dim=axis_of(name))[tp_rank]

            found = checkpoint.read_local(name, spec, tp_size=tp_size, tp_rank=tp_rank)

            assert bits(found) == bits(expected), f"{name} of rank {tp_rank}"
            assert found.is_contiguous()


def test_what_was_read_is_memory_of_its_own(stored, whole_path):
    checkpoint = Checkpoint(whole_path)
    spec = checkpoint.manifest.specs["decoder.final_layernorm.weight"]
    read = partial(checkpoint.read_local, "decoder.final_layernorm.weight", spec, tp_size=1, tp_rank=0)

    first = read()
    first.zero_()

    assert not torch.equal(read(), first)
    checkpoint.check()


@pytest.fixture
def blocks_read(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The bytes of every block that is read from a file."""
    sizes: list[int] = []
    read = StoredMatrix.read

    def counting(self: StoredMatrix, rows: Any, columns: slice) -> Tensor:
        block = read(self, rows, columns)
        sizes.append(block.numel() * block.itemsize)
        return block

    monkeypatch.setattr(StoredMatrix, "read", counting)
    yield sizes


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tp_size", [2, 3])
def test_a_rank_reads_the_bytes_of_its_own_parameters_and_no_more(stored, whole, blocks_read, layout, tp_size):
    checkpoint = Checkpoint(stored(*layout))
    for tp_rank in range(tp_size):
        needed = sum(
            (tensor if axis_of(name) is None else tensor.chunk(tp_size, dim=axis_of(name))[tp_rank]).nbytes
            for name, tensor in whole.items()
        )
        blocks_read.clear()

        for name, spec in checkpoint.manifest.specs.items():
            checkpoint.read_local(name, spec, tp_size=tp_size, tp_rank=tp_rank)

        assert sum(blocks_read) == needed, f"rank {tp_rank}"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_splitting_reads_every_byte_once(stored, whole, blocks_read, tmp_path, layout):
    megacore.split(stored(*layout), tmp_path / "out", tp=2, pp=2)
    shared = sum(tensor.nbytes for tensor in whole.values())
    assert sum(blocks_read) == shared


def test_a_stored_tensor_is_mapped_and_not_read_as_a_whole(whole_path):
    file = SafetensorsFile(whole_path / "model-tp00-pp00.safetensors")
    block = file.matrix("output_layer.weight", 99, 24).read(slice(40, 50), slice(3, 9))

    mapped = [
        line.split()[-1]
        for line in Path("/proc/self/maps").read_text().splitlines()
        if int(line.split("-")[0], 16) <= block.data_ptr() < int(re.split("[- ]", line)[1], 16)
    ]
    assert mapped == [str(whole_path / "model-tp00-pp00.safetensors")]


@pytest.fixture
def files_opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    names: list[str] = []

    class Recording(SafetensorsFile):
        def __init__(self, path: Path) -> None:
            names.append(path.name)
            super().__init__(path)

    monkeypatch.setattr("megacore.checkpoint.reading.SafetensorsFile", Recording)
    return names


def test_only_the_files_that_are_needed_are_opened(stored, files_opened):
    checkpoint = Checkpoint(stored(2, 2))
    assert files_opened == []

    def read(name: str, tp_rank: int) -> None:
        checkpoint.read_local(name, checkpoint.manifest.specs[name], tp_size=2, tp_rank=tp_rank)

    read("decoder.layers.4.mlp.linear_fc1.weight", 1)
    read("decoder.layers.3.self_attention.linear_proj.weight", 1)
    read("output_layer.weight", 1)
    assert files_opened == ["model-tp01-pp01.safetensors"]
    read("decoder.final_layernorm.weight", 1)  # not cut, so rank 0 has it for all
    assert files_opened == ["model-tp01-pp01.safetensors", "model-tp00-pp01.safetensors"]


def test_a_rank_opens_its_own_file_and_that_of_rank_0_at_most(stored, files_opened):
    for tp_rank in range(3):
        checkpoint = Checkpoint(stored(3, 1))
        files_opened.clear()
        for name, spec in checkpoint.manifest.specs.items():
            checkpoint.read_local(name, spec, tp_size=3, tp_rank=tp_rank)
        assert set(files_opened) == {"model-tp00-pp00.safetensors", f"model-tp{tp_rank:02d}-pp00.safetensors"}
        assert len(files_opened) == len(set(files_opened))


def test_a_parameter_that_there_is_not_is_refused(whole_path):
    with pytest.raises(CheckpointError, match=r"has no parameter decoder\.layers\.5\.input_layernorm\.weight"):
        Checkpoint(whole_path).matrix("decoder.layers.5.input_layernorm.weight")


# --- manifests


@pytest.fixture
def copy(stored, tmp_path) -> Path:
    """A split checkpoint to be tampered with."""
    megacore.split(stored(1, 1), tmp_path / "copy", tp=2)
    return tmp_path / "copy"


def rewrite(directory: Path, change: Callable[[dict[str, Any]], None], *, sign: bool) -> None:
    """Change a manifest, and with ``sign`` give it the digest of what it says now."""
    path = directory / "megacore.json"
    document = json.loads(path.read_text())
    change(document)
    if sign:
        document.pop("sha256", None)
        canonical = json.dumps(document, sort_keys=True, separators=(",", ":"))
        document["sha256"] = hashlib.sha256(canonical.encode()).hexdigest()
    path.write_text(json.dumps(document))


def test_a_manifest_may_be_reformatted_but_not_changed(copy):
    rewrite(copy, lambda document: None, sign=False)
    assert Checkpoint(copy).manifest.family == "llama"

    def tell_another_eps(document: dict[str, Any]) -> None:
        document["config"]["norm_eps"] *= 10

    rewrite(copy, tell_another_eps, sign=False)
    with pytest.raises(CorruptCheckpointError, match=r"megacore\.json is damaged: it was changed after it was written"):
        Checkpoint(copy)


def test_a_newer_format_is_refused(copy):
    rewrite(copy, lambda document: document.update(version=3), sign=True)
    with pytest.raises(CheckpointError, match=r"format version 3.* reads 1 and 2: .*the megacore that wrote it"):
        Checkpoint(copy)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "a/b", "..", ".", ""])
@pytest.mark.parametrize("section", ["files", "tokenizer"])
def test_a_file_name_that_leads_out_of_the_checkpoint_is_refused(copy, section, name):
    def point_elsewhere(document: dict[str, Any]) -> None:
        document[section][name] = next(iter(document[section].values()))

    rewrite(copy, point_elsewhere, sign=True)
    with pytest.raises(CorruptCheckpointError, match=f"{re.escape(repr(name))} is not the name of a file"):
        Checkpoint(copy)


@pytest.mark.parametrize("text", ["", "{", "[]", "7", "null", '{"version": 1}', '{"version": 1, "sha256": ""}', "\xff"])
def test_a_manifest_that_is_none_is_refused(copy, text):
    (copy / "megacore.json").write_text(text, encoding="latin-1")
    with pytest.raises(CorruptCheckpointError, match=r"megacore\.json is damaged"):
        Checkpoint(copy)


@pytest.mark.parametrize("missing", ["family", "config", "tp", "stages", "parameters", "files", "tokenizer", "history"])
def test_a_manifest_that_lacks_something_is_refused(copy, missing):
    rewrite(copy, lambda document: document.pop(missing), sign=True)
    with pytest.raises(CorruptCheckpointError, match=f"megacore.json is damaged: .*{missing}"):
        Checkpoint(copy)


def test_a_published_checkpoint_is_not_taken_for_a_native_one(source, tmp_path):
    with pytest.raises(
        CheckpointError, match=r"has no megacore\.json\. It looks like a published checkpoint: .*convert"
    ):
        Checkpoint(source)
    with pytest.raises(CheckpointError, match="is not a directory"):
        Checkpoint(tmp_path / "absent")


def test_who_names_a_directory_of_checkpoints_or_none_of_them_is_told_what_there_is(copy, tmp_path):
    several = tmp_path / "several"
    several.mkdir()
    for name in ("iteration-0000004", "iteration-0000008", ".iteration-0000012.incomplete"):
        shutil.copytree(copy, several / name)
    (several / "latest").symlink_to("iteration-0000008")

    with pytest.raises(CheckpointError, match=r"several is not a .*, but holds checkpoints: .*several/latest$"):
        Checkpoint(several)
    listed = f"{several} holds the checkpoints iteration-0000004, iteration-0000008, latest"
    with pytest.raises(CheckpointError, match=f"iteration-0000006 is not a directory: {re.escape(listed)}$"):
        Checkpoint(several / "iteration-0000006")


# --- refusals


def test_a_tensor_parallel_size_above_the_kv_groups_is_refused_with_those_that_work(whole_path, source, tmp_path):
    for write in (partial(megacore.split, whole_path), partial(megacore.convert, "llama", source)):
        with pytest.raises(LayoutError, match=r"tp 4: .*linear_qkv.*into 3 along axis 0.*work: 1, 2, 3$"):
            write(tmp_path / "out", tp=4)
    assert list(tmp_path.iterdir()) == []


def test_more_stages_than_layers_are_refused(whole_path, source, tmp_path):
    for write in (partial(megacore.split, whole_path), partial(megacore.convert, "llama", source)):
        with pytest.raises(LayoutError, match=r"pp 6 is more than the model's 5 layers; pp sizes that work: 1 to 5$"):
            write(tmp_path / "out", pp=6)
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_exists_is_left_alone(whole_path, source, tmp_path):
    (tmp_path / "kept").write_text("mine")
    for write in (
        partial(megacore.split, whole_path),
        partial(megacore.convert, "llama", source),
        partial(megacore.export, whole_path),
    ):
        for out in (tmp_path, tmp_path / "kept"):
            with pytest.raises(OutputError, match=r"exists already\. Nothing is overwritten"):
                write(out)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert (tmp_path / "kept").read_text() == "mine"


@pytest.mark.parametrize("options", [("--tp", 4), ("--pp", 6), ("--tp", 0)])
def test_the_command_refuses_a_layout_with_exit_code_2(whole_path, tmp_path, options):
    result = run("split", whole_path, "--out", tmp_path / "out", *options)
    assert result.exit_code == 2
    assert result.stderr.count("Error: ") == 1
    assert list(tmp_path.iterdir()) == []


def test_the_command_refuses_an_existing_output_with_exit_code_2(whole_path, tmp_path):
    result = run("split", whole_path, "--out", tmp_path)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"Error: {tmp_path} exists already")


# --- the commands


def test_the_command_splits_and_says_where_parts_are_unequal(whole_path, whole, tmp_path):
    result = run("split", whole_path, "--out", tmp_path / "out", "--tp", 2, "--pp", 2)

    assert result.exit_code == 0
    assert result.stdout == f"Wrote 4 files to {tmp_path}/out (tp 2, pp 2).\n"
    assert result.stderr == "Note: tp 2 cuts unevenly: word_embeddings 99 as 50 + 49, linear_qkv 3 as 2 + 1, " + (
        "linear_proj 3 as 2 + 1, output_layer 99 as 50 + 49.\n"
    )
    assert_same_tensors(weights_of(tmp_path / "out"), cut(whole, 2, 2))


def test_inspect_says_what_a_checkpoint_holds(stored, whole):
    result = run("inspect", stored(2, 2))

    assert result.exit_code == 0
    lines = dict(line.split(maxsplit=1) for line in result.stdout.splitlines())
    parameters = sum(tensor.numel() for tensor in whole.values())
    assert lines["family"] == "llama"
    assert lines["parameters"] == f"{parameters:,} in {len(whole)} tensors (BF16)"
    assert lines["layers"] == "5"
    assert lines["heads"] == "6 of 6, 3 key-value"
    assert lines["vocabulary"] == "99"
    assert lines["layout"].startswith("tp 2, pp 2 (tp 2 cuts unevenly: word_embeddings 99 as 50 + 49")
    assert lines["stages"] == "layers 0 to 2, layers 3 to 4"
    assert lines["tokenizer"] == "tokenizer.json"
    assert "Every file" not in lines


def test_inspect_as_json_holds_all_of_it(stored, whole):
    directory = stored(2, 2)
    found = json.loads(run("inspect", directory, "--json").stdout)

    assert (found["tp"], found["pp"], found["stages"]) == (2, 2, [[0, 3], [3, 5]])
    assert found["parameters"] == sum(tensor.numel() for tensor in whole.values())
    assert found["config"]["rope_theta"] == 10000.0
    assert found["rotary_layout"] == "half"
    assert found["checked"] is False
    assert found["files"] == {
        path.name: {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for path in sorted(directory.glob("*.safetensors"), key=lambda path: path.name.split("-")[::-1])
    }
    assert [entry["command"] for entry in found["history"]] == ["convert"]


def test_inspect_checks_every_file(stored):
    result = run("inspect", stored(2, 2), "--check")
    assert result.exit_code == 0
    assert result.stdout.endswith("Every file matches its digest.\n")
    assert json.loads(run("inspect", stored(2, 2), "--check", "--json").stdout)["checked"] is True


def test_inspect_names_every_file_that_is_damaged(copy):
    for name in ("model-tp01-pp00.safetensors", "tokenizer/tokenizer.json"):
        content = bytearray((copy / name).read_bytes())
        content[-2] ^= 4
        (copy / name).write_bytes(content)

    assert run("inspect", copy).exit_code == 0
    result = run("inspect", copy, "--check")

    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr == (
        f"Error: damaged since written: {copy}/model-tp01-pp00.safetensors, {copy}/tokenizer/tokenizer.json. "
        "Make the checkpoint again\n"
    )
