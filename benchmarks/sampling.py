"""The time and memory to open the samples of a dataset, compared with megatron-core on the same files.

    python benchmarks/sampling.py

Each measurement is a new process; its memory is the increase of its peak (``VmHWM``) while it opens the dataset. The
datasets are synthetic: their index is real, their tokens are a sparse file of zeros, of which almost nothing is read.
megatron-core's index grows with the number of samples, so it is measured at smaller numbers only. If the compiled
helpers of megatron-core are missing, its own Python version of them is used, and the output says so.
"""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

LENGTH = 64  # tokens a sample
DOCUMENT = 8000  # tokens a document
SIZES = [2_000_000, 20_000_000, 1_000_000_000]  # samples
LARGEST_THEIRS = 20_000_000
GOAL_SECONDS, GOAL_BYTES = 1.0, 100e6
MB = 1e6


def status(field: str) -> int:
    """Return a field of ``/proc/self/status`` in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def write_synthetic(prefix: Path, num_samples: int) -> None:
    """Write a dataset of that many samples, of which only the index needs space."""
    num_documents = -(-(num_samples * LENGTH + 1) // DOCUMENT)
    sizes = np.full(num_documents, DOCUMENT, "<i4")
    with Path(f"{prefix}.idx").open("wb") as file:
        file.write(struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, 8, num_documents, num_documents + 1))
        file.write(sizes.data)
        file.write((np.arange(num_documents, dtype="<i8") * DOCUMENT * 2).data)
        file.write(np.arange(num_documents + 1, dtype="<i8").data)
    with Path(f"{prefix}.bin").open("wb") as file:
        file.truncate(2 * DOCUMENT * num_documents)


def ours(prefix: str, num_samples: int) -> dict[str, object]:
    from megacore.data import IndexedDataset, MixedSamples, TokenWindows, WindowSamples

    before, started = status("VmRSS"), time.perf_counter()
    windows = TokenWindows(IndexedDataset(prefix), LENGTH)
    samples = MixedSamples([WindowSamples(windows, resets_at_documents=True)], [1], seed=1234)
    sample = samples[num_samples - 1]
    seconds = time.perf_counter() - started
    assert len(sample.tokens) == LENGTH + 1
    return {"seconds": seconds, "bytes": status("VmHWM") - before, "how": "no index"}


def theirs(prefix: str, num_samples: int) -> dict[str, object]:
    from megatron.core.datasets import gpt_dataset, indexed_dataset
    from megatron.core.datasets.blended_megatron_dataset_config import BlendedMegatronDatasetConfig  # noqa: F401
    from megatron.core.datasets.utils import Split

    try:
        from megatron.core.datasets import helpers_cpp  # noqa: F401

        how = "index, with its compiled helpers"
    except ImportError:
        how = "index, with the Python version of its helpers, which are not compiled here"

    class Tokenizer:
        def __init__(self) -> None:
            self.unique_identifiers = {"class": "none"}
            self.eod, self.vocab_size = 0, 32000

    config = gpt_dataset.GPTDatasetConfig(
        random_seed=1234,
        sequence_length=LENGTH,
        blend=([prefix], None),
        split="1,0,0",
        path_to_cache=str(Path(prefix).parent / f"cache-{num_samples}"),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        tokenizer=Tokenizer(),
    )
    before, started = status("VmRSS"), time.perf_counter()
    low = indexed_dataset.IndexedDataset(prefix)
    indices = np.arange(len(low), dtype=np.int32)
    dataset = gpt_dataset.GPTDataset(low, prefix, indices, num_samples, Split.train, config)
    assert len(dataset[num_samples - 1]["tokens"]) == LENGTH
    return {"seconds": time.perf_counter() - started, "bytes": status("VmHWM") - before, "how": how}


def measure(system: str, prefix: Path, num_samples: int) -> dict[str, float]:
    command = [sys.executable, "-W", "ignore", __file__, system, str(prefix), str(num_samples)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{system} failed at {num_samples} samples:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        for num_samples in SIZES:
            prefix = Path(directory) / f"d{num_samples}"
            write_synthetic(prefix, num_samples)
            index = Path(f"{prefix}.idx").stat().st_size
            own = measure("ours", prefix, num_samples)
            print(f"{num_samples:>13,} samples (a .idx of {index / MB:.0f} MB, mapped)")
            print(f"  megacore       {own['seconds']:8.3f} s {own['bytes'] / MB:8.0f} MB  {own['how']}")
            if num_samples <= LARGEST_THEIRS:
                peer = measure("theirs", prefix, num_samples)
                print(f"  megatron-core  {peer['seconds']:8.3f} s {peer['bytes'] / MB:8.0f} MB  {peer['how']}")
                times, sizes = (peer[key] / own[key] for key in ("seconds", "bytes"))
                print(f"  ratio          {times:8.1f}   {sizes:8.1f}")
    beyond = own["bytes"] - index
    print(
        f"goals at {SIZES[-1]:,} samples: below {GOAL_SECONDS:g} s and {GOAL_BYTES / MB:.0f} MB beyond the lengths: ",
        end="",
    )
    reached = own["seconds"] < GOAL_SECONDS and beyond < GOAL_BYTES
    print(f"{'reached' if reached else 'missed'} ({own['seconds']:.3f} s, {max(0, beyond) / MB:.0f} MB)")
    sys.exit(not reached)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        system = {"ours": ours, "theirs": theirs}[sys.argv[1]]
        print(json.dumps(system(sys.argv[2], int(sys.argv[3]))))
    else:
        main()
