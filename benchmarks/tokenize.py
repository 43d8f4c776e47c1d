"""How fast text becomes a dataset, next to the libraries that define the tokenizers, on the same text in the same run.

    python benchmarks/tokenize.py TOKENIZER... [--megabytes N] [--rounds N]

``TOKENIZER`` is a ``tokenizer.json``, a ``tokenizer.model`` or a directory with one. The text is the standard library's
source code and documentation, in JSON lines of a file each, as often as it takes. ``megacore tokenize`` is timed end to
end, from the start of its process to a dataset on disk; of the library only the encoding is, on all cores:
``tokenizers.encode_batch_fast``, or ``sentencepiece.encode`` of texts that are in memory. Each round times both, the
median of the ratios counts. Peak memory is that of all processes together, for the text and for four times as much.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics

GOALS = {".json": 15.0, ".model": 2.5}


def texts_of(num_bytes: int) -> list[str]:
    """Files of the standard library, from the beginning again once all are there."""
    library = Path(sysconfig.get_path("stdlib"))
    files = [path.read_text(encoding="utf-8", errors="ignore") for path in sorted(library.glob("**/*.py"))[:2000]]
    files += topics.values()
    chosen: list[str] = []
    while num_bytes > 0:
        chosen.append(files[len(chosen) % len(files)])
        num_bytes -= len(chosen[-1].encode())
    return chosen


def library_encoder(file: Path) -> Callable[[list[str]], object]:
    if file.suffix == ".json":
        import tokenizers

        tokenizer = tokenizers.Tokenizer.from_file(str(file))
        return lambda texts: tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_file=str(file))
    return lambda texts: processor.encode(texts, num_threads=os.cpu_count())


def resident_bytes(process: int) -> int:
    """Of a process and those that it started; memory that they share counts for each."""
    total = 0
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            fields = dict(line.split(":\t", 1) for line in status.read_text().splitlines() if ":\t" in line)
        except OSError:  # it has ended
            continue
        if process in (int(fields["Pid"]), int(fields["PPid"])):
            total += int(fields.get("VmRSS", "0 kB").split()[0]) * 1024
    return total


def tokenized(source: Path, tokenizer: Path, out: Path) -> tuple[float, int]:
    """Seconds, and the most bytes of memory that were in use."""
    command = [sys.executable, "-m", "megacore", "tokenize", "--input", source, "--tokenizer", tokenizer, "--out", out]
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    peak = 0

    def watch() -> None:
        nonlocal peak
        while process.poll() is None:
            peak = max(peak, resident_bytes(process.pid))
            time.sleep(0.05)

    watching = threading.Thread(target=watch)
    watching.start()
    told, _ = process.communicate()
    seconds = time.perf_counter() - started
    watching.join()
    if process.returncode:
        raise SystemExit(f"megacore tokenize failed with {process.returncode}")
    print(f"    {told.strip()}")
    return seconds, peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokenizers", nargs="+", type=Path, metavar="TOKENIZER")
    parser.add_argument("--megabytes", type=int, default=160)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    texts = texts_of(options.megabytes * 10**6)
    num_bytes = sum(len(text.encode()) for text in texts)
    with tempfile.TemporaryDirectory(prefix="benchmark-") as name:
        directory = Path(name)
        (source, larger) = directory / "text.jsonl", directory / "larger.jsonl"
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        source.write_text(lines)
        larger.write_text(lines * 4)
        for tokenizer in options.tokenizers:
            found = [tokenizer / f"tokenizer{suffix}" for suffix in GOALS] if tokenizer.is_dir() else [tokenizer]
            file = next(path for path in found if path.is_file())
            encode = library_encoder(file)
            print(f"{file}: {num_bytes / 1e6:.0f} MB of text in {len(texts)} documents")
            ratios, peaks = [], []
            for number in range(options.rounds):
                started = time.perf_counter()
                encode(texts)
                alone = time.perf_counter() - started
                seconds, peak = tokenized(source, file, directory / f"{file.suffix}-{number}")
                print(f"    the library {alone:.2f} s, megacore {seconds:.2f} s")
                ratios.append(alone / seconds)
                peaks.append(peak)
            _, peak = tokenized(larger, file, directory / f"{file.suffix}-larger")
            ratio, goal = statistics.median(ratios), GOALS[file.suffix]
            verdict = "met" if ratio >= goal else "MISSED"
            print(f"    {ratio:.1f} times as fast as the library; goal {goal}: {verdict}")
            print(f"    peak memory {max(peaks) / 1e6:.0f} MB; with four times the text {peak / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
