"""What ``convert``, ``split`` and ``export`` leave behind when they are killed, when their input is damaged, when there
is no room: nothing, or a whole checkpoint.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import megacore
from megacore.atomic_output import staged_directory
from megacore.errors import CheckpointError, CorruptCheckpointError, DiskFullError, MegacoreError, OutputError

COMMANDS = ("convert", "split", "export")
NOBODY = 65534

# --- processes

SERVER = """if True:
    import json, os, resource, signal, sys, time
    import megacore.cli, megacore.weights.conversion, megacore.weights.exporting, megacore_llama.layer
    from megacore import get_family
    get_family("llama")
    print("ready", flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        ready, tell = os.pipe()
        child = os.fork()
        if child == 0:
            signal.alarm(120)  # whatever hangs is killed
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            output = os.open(order["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(output, 1)
            os.dup2(output, 2)
            if order["max_file_bytes"] is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (order["max_file_bytes"],) * 2)
            if order["user"] is not None:
                os.seteuid(order["user"])
            sys.argv = ["megacore", *order["arguments"]]
            os.write(tell, b".")
            try:
                megacore.cli.main()
            except SystemExit as done:
                sys.stdout.flush()
                os._exit(done.code)  # torch takes half a second to end the interpreter
        os.read(ready, 1)
        os.close(ready)
        os.close(tell)
        start = time.monotonic()
        if order["signal"] is not None:
            time.sleep(order["after"])
            os.kill(child, order["signal"])
        _, status = os.waitpid(child, 0)
        print(json.dumps([os.waitstatus_to_exitcode(status), time.monotonic() - start]), flush=True)
"""
"""Runs command lines in processes of their own, forked after the imports, which take longer than the commands do."""


@dataclass
class Finished:
    exit_code: int
    seconds: float
    output: str
    """Standard output and error."""


class Program:
    """The ``megacore`` program."""

    def __init__(self, directory: Path) -> None:
        self._output = directory / "output"
        self._server = subprocess.Popen(
            [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        assert self._server.stdout is not None
        assert self._server.stdout.readline() == "ready\n"

    def __call__(
        self,
        *arguments: str | Path,
        signal: int | None = None,
        after: float = 0.0,
        max_file_bytes: int | None = None,
        user: int | None = None,
    ) -> Finished:
        order = {
            "arguments": [str(argument) for argument in arguments],
            "output": str(self._output),
            "signal": signal,
            "after": after,
            "max_file_bytes": max_file_bytes,
            "user": user,
        }
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(order) + "\n")
        exit_code, seconds = json.loads(self._server.stdout.readline())
        return Finished(exit_code, seconds, self._output.read_text())

    def close(self) -> None:
        self._server.communicate()


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    running = Program(tmp_path_factory.mktemp("program"))
    yield running
    running.close()


# --- checkpoints


def write_published(directory: Path, *, hidden: int, ffn: int, vocab: int, num_layers: int = 4) -> None:
    """A Llama of random numbers in two files, as a hub has it."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": num_layers,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": vocab,
    }
    shapes = {"model.embed_tokens.weight": (vocab, hidden), "lm_head.weight": (vocab, hidden)}
    shapes["model.norm.weight"] = (hidden,)
    for layer in range(num_layers):
        prefix = f"model.layers.{layer}"
        shapes |= {
            f"{prefix}.input_layernorm.weight": (hidden,),
            f"{prefix}.self_attn.q_proj.weight": (hidden, hidden),
            f"{prefix}.self_attn.k_proj.weight": (hidden // 2, hidden),
            f"{prefix}.self_attn.v_proj.weight": (hidden // 2, hidden),
            f"{prefix}.self_attn.o_proj.weight": (hidden, hidden),
            f"{prefix}.post_attention_layernorm.weight": (hidden,),
            f"{prefix}.mlp.gate_proj.weight": (ffn, hidden),
            f"{prefix}.mlp.up_proj.weight": (ffn, hidden),
            f"{prefix}.mlp.down_proj.weight": (hidden, ffn),
        }
    generator = torch.Generator().manual_seed(1)
    tensors = {
        name: torch.randint(-(2**15), 2**15, shape, dtype=torch.int16, generator=generator).view(torch.bfloat16)
        for name, shape in shapes.items()
    }
    names = list(tensors)
    files = {"a.safetensors": names[: len(names) // 2], "b.safetensors": names[len(names) // 2 :]}
    directory.mkdir()
    for file, held in files.items():
        save_file({name: tensors[name] for name in held}, directory / file)
    weight_map = {name: file for file, held in files.items() for name in held}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "tokenizer.json").write_text("{}")


def published_bits(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors of a published checkpoint, as whole numbers, since some of the random bits are no number."""
    return {
        name: tensor.view(torch.int16)
        for path in directory.glob("*.safetensors")
        for name, tensor in load_file(path).items()
    }


@dataclass
class Models:
    """One model in the published and in the native format."""

    published: Path
    native: Path

    def arguments(self, command: str, out: Path) -> list[str | Path]:
        return {
            "convert": ["convert", "--model", "llama", "--from", self.published, "--out", out],
            "split": ["split", self.native, "--out", out, "--tp", "2", "--pp", "2"],
            "export": ["export", self.native, "--out", out],
        }[command]

    def call(self, command: str, out: Path, **options: Any) -> None:
        {
            "convert": partial(megacore.convert, "llama", self.published),
            "split": partial(megacore.split, self.native, tp=2, pp=2),
            "export": partial(megacore.export, self.native),
        }[command](out, **options)

    def assert_whole(self, command: str, out: Path) -> None:
        if command == "export":
            found = published_bits(out)
            assert found.keys() == self.published_bits.keys()
            assert all(torch.equal(found[name], expected) for name, expected in self.published_bits.items())
            assert (out / "config.json").is_file()
            assert (out / "tokenizer.json").is_file()
        else:
            assert megacore.inspect(out, check=True)["checked"]

    @cached_property
    def published_bits(self) -> dict[str, torch.Tensor]:
        return published_bits(self.published)

    @property
    def weight_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.published_bits.values())


def make_models(directory: Path, **sizes: int) -> Models:
    models = Models(directory / "published", directory / "native")
    write_published(models.published, **sizes)
    megacore.convert("llama", models.published, models.native, pp=2)
    return models


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """64 MB: large enough that a command can be hit in the middle of its work."""
    return make_models(tmp_path_factory.mktemp("large"), hidden=768, ffn=2048, vocab=2000)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return make_models(tmp_path_factory.mktemp("small"), hidden=16, ffn=24, vocab=99)


@pytest.fixture
def damaged(small: Models, tmp_path: Path) -> Models:
    """A copy of the small model, to be damaged."""
    models = Models(tmp_path / "published", tmp_path / "native")
    shutil.copytree(small.published, models.published)
    shutil.copytree(small.native, models.native)
    return models


@pytest.fixture
def room(tmp_path: Path) -> Path:
    """An empty directory for outputs."""
    (tmp_path / "room").mkdir()
    return tmp_path / "room"


@pytest.fixture
def open_to_all() -> Iterator[Path]:
    """A directory that other users may enter, unlike pytest's own."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        Path(name).chmod(0o755)
        yield Path(name)


def listing(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def assert_refused(finished: Finished, exit_code: int, message: str) -> None:
    """One message that matches, and no traceback."""
    assert re.fullmatch(rf"Error: {message}\n", finished.output, re.DOTALL), finished.output
    assert "Traceback" not in finished.output
    assert finished.exit_code == exit_code


# --- killing


def typical_seconds(program: Program, models: Models, command: str, room: Path) -> float:
    """How long ``command`` takes when nobody disturbs it."""
    times = []
    for _ in range(3):
        finished = program(*models.arguments(command, room / "out"))
        assert finished.exit_code == 0, finished.output
        models.assert_whole(command, room / "out")
        shutil.rmtree(room / "out")
        times.append(finished.seconds)
    return sorted(times)[1]


def moments(seconds: float, number: int, seed: int) -> list[float]:
    """Random moments, one in each of ``number`` equal parts of a span of time, in random order."""
    chance = random.Random(seed)
    chosen = [(part + chance.random()) / number * seconds for part in range(number)]
    chance.shuffle(chosen)
    return chosen


@pytest.mark.parametrize("times", [20, pytest.param(200, marks=pytest.mark.soak)])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_killed_command_leaves_nothing_or_the_whole(program, large, room, command, times):
    out = room / "out"
    hit_in_the_middle = 0
    for moment in moments(typical_seconds(program, large, command, room), times, seed=COMMANDS.index(command)):
        finished = program(*large.arguments(command, out), signal=signal.SIGKILL, after=moment)

        leftovers = [name for name in listing(room) if name != "out"]
        assert set(leftovers) <= {".out.incomplete", ".out.lock"}
        if out.exists():
            large.assert_whole(command, out)
            shutil.rmtree(out)
        else:
            assert finished.exit_code == -signal.SIGKILL, finished.output
            hit_in_the_middle += ".out.incomplete" in leftovers
    assert hit_in_the_middle >= times // 4

    assert program(*large.arguments(command, out)).exit_code == 0
    large.assert_whole(command, out)
    assert listing(room) == ["out"]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_terminated_command_leaves_nothing_temporary_either(program, large, room, command):
    times = 8
    out = room / "out"
    terminated = 0
    for moment in moments(typical_seconds(program, large, command, room), times, seed=COMMANDS.index(command)):
        finished = program(*large.arguments(command, out), signal=signal.SIGTERM, after=moment)

        assert "Traceback" not in finished.output, finished.output
        if out.exists():  # -SIGTERM: it was done and no longer handled the signal
            assert finished.exit_code in (0, 128 + signal.SIGTERM, -signal.SIGTERM), finished.output
            large.assert_whole(command, out)
            shutil.rmtree(out)
        else:
            assert finished.exit_code == 128 + signal.SIGTERM, finished.output
            terminated += 1
        assert listing(room) == []
    assert terminated >= times // 4


def test_a_termination_that_a_library_makes_an_error_of_is_still_a_termination():
    program = """if True:
        import os, signal
        import megacore.cli

        def interrupted():
            try:
                os.kill(os.getpid(), signal.SIGTERM)
            except SystemExit:  # as safetensors was seen to do
                raise ValueError("could not determine the shape")

        megacore.cli.cli = interrupted
        megacore.cli.main()
    """
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (finished.returncode, finished.stderr) == (128 + signal.SIGTERM, "")


def test_while_one_process_writes_an_output_another_that_would_is_refused(small, room):
    def write_the_same_output(num_bytes: int) -> None:
        with pytest.raises(OutputError, match="out is being written by another process: wait for it, or name another"):
            small.call("convert", room / "out")

    small.call("split", room / "out", advance=write_the_same_output)

    assert listing(room) == ["out"]
    small.assert_whole("split", room / "out")


def write_many_times(room: Path, barrier: Barrier, results: Queue) -> None:
    for number in range(100):
        barrier.wait()
        try:
            with staged_directory(room / str(number)) as staging:
                (staging / "file").write_text("whole")
            results.put("written")
        except OutputError:
            results.put("refused")
        except BaseException as error:
            results.put(repr(error))


def test_of_two_processes_that_start_at_the_same_moment_one_writes_and_the_other_is_refused(room):
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(2), context.Queue()
    writers = [context.Process(target=write_many_times, args=(room, barrier, results)) for _ in range(2)]
    for writer in writers:
        writer.start()
    told = Counter(results.get(timeout=60) for _ in range(200))
    for writer in writers:
        writer.join()

    assert told["written"] == 100, told
    assert told["refused"] == 100, told
    assert listing(room) == sorted(str(number) for number in range(100))


def test_what_is_finished_is_kept_when_somebody_created_the_output_meanwhile(small, room):
    def create_the_output(num_bytes: int) -> None:
        (room / "out").mkdir(exist_ok=True)
        (room / "out" / "theirs").touch()

    with pytest.raises(
        OutputError, match=r"out was created by another program in the meantime; the finished output is kept as .*out-2"
    ):
        small.call("split", room / "out", advance=create_the_output)

    assert listing(room) == ["out", "out-2"]
    small.assert_whole("split", room / "out-2")


def test_an_abandoned_directory_of_another_output_is_left_alone(small, room):
    others = [".out2.incomplete", ".out.old", "out.incomplete"]
    for name in [*others, ".out.incomplete"]:
        (room / name).mkdir()

    small.call("split", room / "out")

    assert listing(room) == sorted([*others, "out"])


# --- damaged native checkpoints


def flip(path: Path, bit: int) -> None:
    """Turn one bit of a file over, in place."""
    with path.open("r+b") as file:
        file.seek(bit // 8)
        [byte] = file.read(1)
        file.seek(bit // 8)
        file.write(bytes([byte ^ 1 << bit % 8]))


def header_bytes(path: Path) -> int:
    with path.open("rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")


def sampled_bits(path: Path, number: int) -> list[int]:
    """All bits of the header's length, and ``number`` each of the header, its end included, and of the numbers."""
    chance = random.Random(3)
    header, size = header_bytes(path) * 8, path.stat().st_size * 8
    return [
        *range(64),
        *(chance.randrange(64, header) for _ in range(number)),
        *range(header - 8, header + 8),
        *(chance.randrange(header, size) for _ in range(number)),
        size - 1,
    ]


@pytest.mark.parametrize("command", ["split", "export"])
@pytest.mark.parametrize("file", ["model-tp00-pp00.safetensors", "model-tp00-pp01.safetensors"])
def test_a_bit_flipped_anywhere_in_a_weight_file_is_not_passed_on(damaged, room, command, file):
    path = damaged.native / file
    for bit in sampled_bits(path, number=30):
        flip(path, bit)
        with pytest.raises(CorruptCheckpointError, match=re.escape(str(path))):
            damaged.call(command, room / "out")
        with pytest.raises(CorruptCheckpointError, match=rf"damaged since written: {re.escape(str(path))}\."):
            megacore.inspect(damaged.native, check=True)
        assert listing(room) == [], f"bit {bit}"
        flip(path, bit)
    damaged.call(command, room / "out")


def test_a_bit_flipped_in_the_manifest_is_noticed(damaged, room):
    path = damaged.native / "megacore.json"
    before = json.loads(path.read_text())
    chance = random.Random(5)
    for bit in [chance.randrange(path.stat().st_size * 8) for _ in range(300)]:
        flip(path, bit)
        try:
            megacore.inspect(damaged.native, check=True)
        except (CorruptCheckpointError, CheckpointError) as error:
            assert str(path) in str(error)
        else:
            assert json.loads(path.read_text()) == before, f"bit {bit} changed what is said"
        flip(path, bit)


@pytest.mark.parametrize("part", ["header", "numbers"])
@pytest.mark.parametrize("command", ["split", "export", "inspect --check"])
def test_the_command_exits_1_for_a_damaged_checkpoint(program, damaged, room, command, part):
    path = damaged.native / "model-tp00-pp01.safetensors"
    flip(path, 8 * header_bytes(path) + (-400 if part == "header" else 400))

    if command == "inspect --check":
        finished = program("inspect", damaged.native, "--check")
    else:
        finished = program(*damaged.arguments(command, room / "out"))

    assert_refused(finished, 1, rf".*{re.escape(str(path))}.*(Fetch it|Make it|Make the checkpoint) again.*")
    assert listing(room) == []


@pytest.mark.parametrize("command", ["split", "export", "inspect"])
def test_a_truncated_or_missing_weight_file_is_refused_at_once(program, damaged, room, command):
    path = damaged.native / "model-tp00-pp01.safetensors"
    size = path.stat().st_size
    arguments = ["inspect", damaged.native] if command == "inspect" else damaged.arguments(command, room / "out")

    os.truncate(path, size - 1)
    assert_refused(
        program(*arguments), 1, rf"{path} has {size - 1} bytes instead of {size}: the checkpoint is incomplete.*"
    )
    path.unlink()
    assert_refused(program(*arguments), 1, rf"{path} is missing: the checkpoint is incomplete.*")
    assert listing(room) == []


def test_a_missing_manifest_means_that_there_is_no_checkpoint(program, damaged, room):
    (damaged.native / "megacore.json").unlink()
    for command in ("split", "export"):
        finished = program(*damaged.arguments(command, room / "out"))
        assert_refused(finished, 2, rf"{damaged.native} is not a megacore checkpoint: it has no megacore\.json")
    assert listing(room) == []


# --- damaged published checkpoints


@pytest.mark.parametrize("length", [0, 4, 8, 500, "the header", -1])
def test_a_truncated_source_file_is_refused(program, damaged, room, length):
    path = damaged.published / "b.safetensors"
    kept = header_bytes(path) if length == "the header" else length % path.stat().st_size
    os.truncate(path, kept)

    finished = program(*damaged.arguments("convert", room / "out"))

    assert_refused(finished, 1, rf"{path} is damaged or incomplete \({kept} bytes\): .*Fetch it again")
    assert listing(room) == []


def test_a_bit_flipped_in_the_header_of_a_source_file_is_refused_or_changes_nothing(damaged, small, room, tmp_path):
    small.call("convert", tmp_path / "undamaged")
    undamaged = (tmp_path / "undamaged" / "model-tp00-pp00.safetensors").read_bytes()
    path = damaged.published / "a.safetensors"
    refused = 0
    bits = [bit for bit in sampled_bits(path, number=150) if bit < 8 * header_bytes(path)]
    for bit in bits:
        flip(path, bit)
        try:
            damaged.call("convert", room / "out")
        except MegacoreError as error:
            assert str(damaged.published) in str(error)
            refused += 1
        else:  # it hit the metadata
            assert (room / "out" / "model-tp00-pp00.safetensors").read_bytes() == undamaged, f"bit {bit}"
            shutil.rmtree(room / "out")
        assert listing(room) == [], f"bit {bit}"
        flip(path, bit)
    assert refused > 0.9 * len(bits)


def test_a_source_file_that_may_not_be_read_is_named(program, small, open_to_all):
    user = NOBODY if os.geteuid() == 0 else None
    models = Models(open_to_all / "published", open_to_all / "native")
    shutil.copytree(small.published, models.published, copy_function=shutil.copyfile)
    path = models.published / "b.safetensors"
    path.chmod(0o000)
    finished = program(*models.arguments("convert", open_to_all / "out"), user=user)
    assert_refused(finished, 2, rf"{path} cannot be read: Permission denied")


def test_a_checkpoint_that_is_not_there_is_told_beside_a_directory_that_may_not_be_read(program, small, open_to_all):
    user = NOBODY if os.geteuid() == 0 else None
    shutil.copytree(small.native, open_to_all / "native", copy_function=shutil.copyfile)
    (open_to_all / "another's").mkdir(mode=0o000)

    finished = program("inspect", open_to_all / "absent", user=user)

    assert_refused(finished, 2, rf"{open_to_all}/absent is not a directory: {open_to_all} holds the checkpoints native")


@pytest.mark.parametrize(
    "file, message",
    [
        ("config.json", r" holds no checkpoint in a known format \(.*hf.*\)"),
        ("b.safetensors", r"/b\.safetensors is missing"),
        ("model.safetensors.index.json", r" has neither model\.safetensors nor model\.safetensors\.index\.json"),
    ],
)
def test_a_missing_source_file_is_named(program, damaged, room, file, message):
    (damaged.published / file).unlink()
    finished = program(*damaged.arguments("convert", room / "out"))
    assert_refused(finished, 2, re.escape(str(damaged.published)) + message)
    assert listing(room) == []


@pytest.mark.parametrize("file", ["config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize("content", ["", '{"weight_map": {', "[]", "\xff"])
def test_a_source_file_that_is_no_json_is_refused(program, damaged, room, file, content):
    (damaged.published / file).write_text(content, encoding="latin-1")
    finished = program(*damaged.arguments("convert", room / "out"))
    assert_refused(finished, 1, rf"{damaged.published / file} is damaged: .*")
    assert listing(room) == []


def test_an_index_may_not_name_a_file_elsewhere(program, damaged, room):
    index = damaged.published / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("b.safetensors", "../published/b.safetensors"))
    finished = program(*damaged.arguments("convert", room / "out"))
    assert_refused(
        finished, 1, rf"{index} names '../published/b.safetensors', which is not a safetensors file of its own.*"
    )
    assert listing(room) == []


def test_a_source_that_lacks_a_tensor_is_refused(program, damaged, room):
    path = damaged.published / "b.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.3.mlp.up_proj.weight"]
    save_file(tensors, path)
    finished = program(*damaged.arguments("convert", room / "out"))
    assert_refused(finished, 2, r".*does not hold the tensors.*missing: model\.layers\.3\.mlp\.up_proj\.weight")
    assert listing(room) == []


def test_a_source_of_another_family_is_refused(program, damaged, room):
    path = damaged.published / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "architectures": ["FalconForCausalLM"]}))
    finished = program(*damaged.arguments("convert", room / "out"))
    assert_refused(
        finished, 2, rf"{path} is of architecture FalconForCausalLM, and llama reads LlamaForCausalLM(; use .*)?"
    )
    assert listing(room) == []


def test_every_family_that_reads_a_source_is_named_to_who_took_another(program, damaged, room):
    arguments = [{"llama": "falcon"}.get(argument, argument) for argument in damaged.arguments("convert", room / "out")]
    finished = program(*arguments)
    assert_refused(finished, 2, r".* falcon reads .*; use --model codellama or llama or llama2")
    assert listing(room) == []


# --- where nothing can be written


@contextmanager
def small_disk(directory: Path, num_bytes: int) -> Iterator[Path]:
    """A file system of ``num_bytes``, mounted at ``directory``; skips the test where mounting is not permitted."""
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "tmpfs", str(directory)], capture_output=True, check=False
    )
    if mount.returncode != 0:
        pytest.skip(f"a small file system cannot be mounted here: {mount.stderr.decode().strip()}")
    try:
        yield directory
    finally:
        subprocess.run(["umount", str(directory)], check=True)


@pytest.mark.parametrize("command", COMMANDS)
def test_too_little_room_is_refused_before_anything_is_written(program, small, room, command):
    with small_disk(room, small.weight_bytes // 2):
        finished = program(*small.arguments(command, room / "out"))
        assert_refused(
            finished, 1, rf"{room}/out needs \d+\.\d\d GB, and {room} has 0\.00 GB free\. Nothing was written"
        )
        assert listing(room) == []


@pytest.mark.parametrize("command", COMMANDS)
def test_a_disk_that_runs_full_is_reported_and_nothing_is_left(program, small, room, command):
    with small_disk(room, small.weight_bytes):  # the weights fit, their headers do not
        finished = program(*small.arguments(command, room / "out"))
        assert_refused(
            finished,
            1,
            rf"there is no room for {room}/out \(No space left on device\): what was begun of it was removed",
        )
        assert listing(room) == []


@pytest.mark.parametrize("command", COMMANDS)
def test_a_disk_that_others_fill_meanwhile_is_reported_and_nothing_is_left(small, room, command):
    def fill(num_bytes: int) -> None:
        with (room / "filler").open("ab", buffering=0) as filler:
            while True:
                try:
                    filler.write(bytes(4096))
                except OSError:
                    return

    with small_disk(room, 2 * small.weight_bytes):
        with pytest.raises(DiskFullError, match=r"no room for .*No space left on device"):
            small.call(command, room / "out", advance=fill)
        assert listing(room) == ["filler"]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_file_that_may_grow_no_further_is_reported_and_nothing_is_left(program, small, room, command):
    finished = program(*small.arguments(command, room / "out"), max_file_bytes=4096)
    assert_refused(
        finished, 1, rf"there is no room for {room}/out \(File too large\): what was begun of it was removed"
    )
    assert listing(room) == []


@pytest.mark.parametrize("mode", [0o555, 0o700])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_directory_that_may_not_be_written_is_refused(program, small, open_to_all, command, mode):
    user = NOBODY if os.geteuid() == 0 else None
    if user is None and mode == 0o700:
        mode = 0o000
    models = Models(open_to_all / "published", open_to_all / "native")
    shutil.copytree(small.published, models.published, copy_function=shutil.copyfile)
    shutil.copytree(small.native, models.native, copy_function=shutil.copyfile)
    parent = open_to_all / "parent"
    parent.mkdir()
    parent.chmod(mode)

    finished = program(*models.arguments(command, parent / "out"), user=user)

    parent.chmod(0o755)
    assert_refused(finished, 2, rf"{parent}/out could not be written: Permission denied \({parent}/.*\)")
    assert listing(parent) == []


@pytest.mark.parametrize("command", COMMANDS)
def test_an_output_whose_parent_is_no_directory_is_refused(program, small, room, command):
    (room / "file").write_text("mine")
    for parent in (room / "absent", room / "file"):
        finished = program(*small.arguments(command, parent / "out"))
        assert_refused(finished, 2, rf"{parent}, which out is to be written into, is not a directory: create it first")
    assert listing(room) == ["file"]


@pytest.mark.parametrize("existing", ["an empty directory", "a full directory", "a file", "a broken link"])
@pytest.mark.parametrize("command", COMMANDS)
def test_an_output_that_exists_is_refused_and_left_as_it_is(program, small, room, command, existing):
    out = room / "out"
    make: dict[str, Callable[[], Any]] = {
        "an empty directory": out.mkdir,
        "a full directory": lambda: (out.mkdir(), (out / "mine").write_text("mine")),
        "a file": lambda: out.write_text("mine"),
        "a broken link": lambda: out.symlink_to("nowhere"),
    }
    make[existing]()
    before = sorted((str(path), os.lstat(path).st_mtime_ns) for path in room.rglob("*"))

    finished = program(*small.arguments(command, out))

    assert_refused(finished, 2, rf"{out} exists already\. Nothing is overwritten: name another output, or remove it.*")
    assert sorted((str(path), os.lstat(path).st_mtime_ns) for path in room.rglob("*")) == before
