"""The time and memory of packing conversations into rows, and the fill of the rows.

    python benchmarks/packing.py [CONVERSATIONS]

Lengths are log-normal with a median of 403 tokens, like those of chat data; 10 million conversations by default. The
peak memory is that of numpy, without the lengths themselves.
"""

from __future__ import annotations

import sys
import time
import tracemalloc

import numpy as np

from megacore.data.sampling.packing import pack


def main(num_conversations: int) -> None:
    for seq_length in (2048, 32768):
        capacity = seq_length + 1
        lengths = np.random.default_rng(0).lognormal(6, 1, num_conversations)
        sizes = np.clip(lengths, 2, capacity).astype(np.int32)
        started = time.perf_counter()
        rows = pack(sizes, capacity)
        seconds = time.perf_counter() - started
        tracemalloc.start()
        pack(sizes, capacity)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        kept = rows.items.nbytes + rows.starts.nbytes
        print(
            f"seq_length {seq_length}: {num_conversations:,} conversations in {len(rows):,} rows, "
            f"{sizes.sum(dtype=np.int64) / (capacity * len(rows)):.2%} full, in {seconds:.1f} s, "
            f"{kept / 1e6:.0f} MB kept, {peak / 1e6:.0f} MB at the peak"
        )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 10_000_000)
