"""The speed of conversion, compared with ``cp`` of the same files in the same run, and its memory.

    python benchmarks/convert.py [--dir DIR] [--rounds N] [--cold]

Makes Hugging Face checkpoints of 0.5 and 2 GB (bfloat16, random bytes, in files of at most 1 GB) in a temporary
directory and removes them again; 5 GB are needed. In each round, in alternating order:

* ``cp``: the wall time of ``cp`` of the weight files to a new directory. It ends in the page cache;
* ``cp + sync``: the same, and flushing the copies to the disk;
* ``convert``: the wall time of ``megacore.convert`` in a new process, without the start of the process. It hashes what
  it writes and flushes it to the disk, so ``cp + sync`` is the fair comparison; the goal is relative to ``cp`` alone;
* ``command``: the wall time of ``python -m megacore convert``, including the import of torch.

Before each measurement, as much memory as the output needs is touched and freed. A virtual machine may return memory
that was free for some seconds to its host, and the process that runs after a pause would pay for getting it back.
``--cold`` omits this.

The memory is the peak of the anonymous memory (``RssAnon``) of the process during ``megacore.convert``, minus its value
before, with torch and megacore loaded. Mapped files are not anonymous: the system reclaims them when necessary.

For scale, the table has the time in which one core hashes as many bytes with SHA-256, a lower bound for any conversion
that gives every file a digest.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

import numpy as np

GOAL_RATIO = 1.5
GOAL_MEMORY = 400
SAME_MEMORY = 40
NUM_LAYERS = {"0.5 GB": 3, "2 GB": 20}

HIDDEN, FFN, HEADS, KV_HEADS, VOCAB = 2048, 5632, 32, 4, 32000
MAX_FILE_BYTES = 1_000_000_000
CHUNK_BYTES = 16 << 20

CONVERT = """if True:
    import sys, time
    import megacore.weights.conversion
    from megacore import get_family

    family = get_family("llama")
    print("ready", flush=True)
    input()
    start = time.perf_counter()
    megacore.convert(family, sys.argv[1], sys.argv[2])
    print(time.perf_counter() - start)
"""


def tensor_shapes(num_layers: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors of a Llama model, by name."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, HIDDEN)}
    kv_rows = HIDDEN // HEADS * KV_HEADS
    for layer in range(num_layers):
        prefix = f"model.layers.{layer}"
        shapes |= {
            f"{prefix}.input_layernorm.weight": (HIDDEN,),
            f"{prefix}.self_attn.q_proj.weight": (HIDDEN, HIDDEN),
            f"{prefix}.self_attn.k_proj.weight": (kv_rows, HIDDEN),
            f"{prefix}.self_attn.v_proj.weight": (kv_rows, HIDDEN),
            f"{prefix}.self_attn.o_proj.weight": (HIDDEN, HIDDEN),
            f"{prefix}.post_attention_layernorm.weight": (HIDDEN,),
            f"{prefix}.mlp.gate_proj.weight": (FFN, HIDDEN),
            f"{prefix}.mlp.up_proj.weight": (FFN, HIDDEN),
            f"{prefix}.mlp.down_proj.weight": (HIDDEN, FFN),
        }
    return shapes | {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCAB, HIDDEN)}


def write_checkpoint(directory: Path, num_layers: int) -> list[Path]:
    """Write a checkpoint of random numbers, a few megabytes at a time; return its weight files."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": num_layers,
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "vocab_size": VOCAB,
    }
    files: list[dict[str, tuple[int, ...]]] = [{}]
    size = 0
    for name, shape in tensor_shapes(num_layers).items():
        num_bytes = 2 * int(np.prod(shape))
        if size + num_bytes > MAX_FILE_BYTES:
            files.append({})
            size = 0
        files[-1][name] = shape
        size += num_bytes
    directory.mkdir()
    paths = [directory / f"model-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)]
    for path, shapes in zip(paths, files, strict=True):
        write_random_tensors(path, shapes)
    weight_map = {name: path.name for path, shapes in zip(paths, files, strict=True) for name in shapes}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (directory / "config.json").write_text(json.dumps(config))
    return paths


def write_random_tensors(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    numbers = np.random.default_rng(0)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for start in range(0, end, CHUNK_BYTES):
            file.write(numbers.bytes(min(CHUNK_BYTES, end - start)))


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def flush(directory: Path) -> None:
    for path in directory.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def touch_free_memory(num_bytes: int) -> None:
    """Make the next ``num_bytes`` of memory available without page faults in the host."""
    np.ones(num_bytes, dtype=np.uint8)


def measure_copy(files: list[Path], out: Path, prepare: Callable[[], None]) -> dict[str, float]:
    out.mkdir()
    prepare()
    copying = seconds(lambda: subprocess.run(["cp", *map(str, files), str(out)], check=True))
    return {"cp": copying, "cp + sync": copying + seconds(lambda: flush(out))}


def measure_convert(source: Path, out: Path, prepare: Callable[[], None]) -> dict[str, float]:
    arguments = [sys.executable, "-c", CONVERT, str(source), str(out)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
    with subprocess.Popen(arguments, **pipes) as process, ThreadPoolExecutor(1) as reader:
        assert process.stdout.readline() == "ready\n"
        prepare()
        before = peak = anonymous_bytes(process.pid)
        process.stdin.write("go\n")
        answer = reader.submit(process.stdout.readline)
        while not answer.done():
            peak = max(peak, anonymous_bytes(process.pid))
            time.sleep(0.005)
        return {"convert": float(answer.result()), "memory": peak - before}


def anonymous_bytes(pid: int) -> int:
    """Return the anonymous memory of a process, 0 once it has ended."""
    status = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"^RssAnon:\s+(\d+) kB$", status, re.MULTILINE)
    return int(found.group(1)) * 1024 if found else 0


def sha256_seconds(num_bytes: int) -> float:
    """Return the time in which one core hashes ``num_bytes``."""
    block = bytes(CHUNK_BYTES)
    digest = hashlib.sha256()

    def hash_all() -> None:
        for _ in range(num_bytes // CHUNK_BYTES):
            digest.update(block)

    return seconds(hash_all)


def measure_command(source: Path, out: Path, prepare: Callable[[], None]) -> dict[str, float]:
    prepare()
    arguments = [
        sys.executable,
        "-m",
        "megacore",
        "convert",
        "--model",
        "llama",
        "--from",
        str(source),
        "--out",
        str(out),
    ]
    return {"command": seconds(lambda: subprocess.run(arguments, stdout=subprocess.DEVNULL, check=True))}


def rounds(directory: Path, num_layers: int, num_rounds: int, *, cold: bool) -> Iterator[dict[str, float]]:
    """Measure everything ``num_rounds`` times, each time in another order, after flushing all dirty pages."""
    source = directory / "published"
    files = write_checkpoint(source, num_layers)
    out = directory / "out"
    num_bytes = sum(path.stat().st_size for path in files)

    def prepare() -> None:
        if not cold:
            touch_free_memory(num_bytes)

    measurements: list[Callable[[], dict[str, float]]] = [
        lambda: measure_copy(files, out, prepare),
        lambda: measure_convert(source, out, prepare),
        lambda: measure_command(source, out, prepare),
    ]
    for number in range(num_rounds):
        found: dict[str, float] = {"bytes": num_bytes}
        for measure in measurements[number % 3 :] + measurements[: number % 3]:
            os.sync()
            found |= measure()
            shutil.rmtree(out)
        found["sha256"] = sha256_seconds(num_bytes)
        yield found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, help="Where to write the checkpoints.  [default: the temporary directory]")
    parser.add_argument("--rounds", type=int, default=5, help="Number of rounds.  [default: 5]")
    parser.add_argument("--cold", action="store_true", help="Do not touch free memory before a measurement.")
    options = parser.parse_args()
    print(f"{os.cpu_count()} cores; medians of {options.rounds} rounds\n")
    print("         cp [s]  cp + sync  convert  command  SHA-256    ÷ cp  ÷ (cp + sync)  memory [MB]")
    ratios, memory = [], []
    for label, num_layers in NUM_LAYERS.items():
        with tempfile.TemporaryDirectory(dir=options.dir, prefix="megacore-benchmark-") as directory:
            found = list(rounds(Path(directory), num_layers, options.rounds, cold=options.cold))
        cp, synced, convert, command, sha256 = (
            median(each[name] for each in found) for name in ("cp", "cp + sync", "convert", "command", "sha256")
        )
        ratios.append(median(each["convert"] / each["cp"] for each in found))
        fair_ratio = median(each["convert"] / each["cp + sync"] for each in found)
        memory.append(median(each["memory"] for each in found) / 1e6)
        print(
            f"{label:<7}{cp:>8.2f}{synced:>11.2f}{convert:>9.2f}{command:>9.2f}{sha256:>9.2f}"
            f"{ratios[-1]:>8.2f}{fair_ratio:>15.2f}{memory[-1]:>13.0f}",
            flush=True,
        )
    print(f"\nconvert ÷ cp at most {GOAL_RATIO}: {verdict(max(ratios) <= GOAL_RATIO)}")
    print(f"memory at most {GOAL_MEMORY} MB: {verdict(max(memory) <= GOAL_MEMORY)}")
    print(f"memory the same for both sizes, to {SAME_MEMORY} MB: {verdict(max(memory) - min(memory) <= SAME_MEMORY)}")


def verdict(met: bool) -> str:
    return "met" if met else "MISSED"


if __name__ == "__main__":
    main()
