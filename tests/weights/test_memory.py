"""Converting models of the largest published widths: memory does not grow with the tensors."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BOUND = 400_000_000
"""Anonymous memory above that of the interpreter with torch loaded, in bytes."""

CONVERT = """if True:
    import json, sys, threading, time
    import megacore.weights.conversion
    from megacore import get_family

    def anonymous():
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))

    family, source, out = sys.argv[1:]
    get_family(family)
    before, peak, done = anonymous(), 0, threading.Event()

    def watch():
        global peak
        while not done.wait(0.005):
            peak = max(peak, anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    megacore.weights.conversion.convert(family, source, out)
    done.set()
    watcher.join()
    print(json.dumps(max(peak, anonymous()) - before))
"""

FALCON_40B = {
    "architectures": ["FalconForCausalLM"],
    "model_type": "falcon",
    "num_hidden_layers": 2,
    "hidden_size": 8192,
    "num_attention_heads": 128,
    "num_kv_heads": 8,
    "new_decoder_architecture": True,
    "vocab_size": 65024,
}

LLAMA2_70B = {
    "dim": 8192,
    "n_layers": 1,
    "n_heads": 64,
    "n_kv_heads": 8,
    "vocab_size": 32000,
    "multiple_of": 4096,
    "ffn_dim_multiplier": 1.3,
    "norm_eps": 1e-5,
}


def write_sparse_safetensors(path: Path, shapes: dict[str, tuple[int, ...]]) -> int:
    """A bfloat16 file of zeros that takes no room on the disk; returns the bytes of its tensors."""
    header, offset = {}, 0
    for name, shape in shapes.items():
        num_bytes = 2
        for size in shape:
            num_bytes *= size
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, offset + num_bytes]}
        offset += num_bytes
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)
    return offset


def write_falcon_40b(directory: Path) -> int:
    hidden = 8192
    shapes: dict[str, tuple[int, ...]] = {"transformer.word_embeddings.weight": (65024, hidden)}
    for layer in range(2):
        prefix = f"transformer.h.{layer}"
        shapes[f"{prefix}.self_attention.query_key_value.weight"] = ((128 + 2 * 8) * 64, hidden)
        shapes[f"{prefix}.self_attention.dense.weight"] = (hidden, hidden)
        shapes[f"{prefix}.mlp.dense_h_to_4h.weight"] = (4 * hidden, hidden)
        shapes[f"{prefix}.mlp.dense_4h_to_h.weight"] = (hidden, 4 * hidden)
        for norm in ("ln_attn", "ln_mlp"):
            shapes |= {f"{prefix}.{norm}.{part}": (hidden,) for part in ("weight", "bias")}
    shapes |= {f"transformer.ln_f.{part}": (hidden,) for part in ("weight", "bias")}
    (directory / "config.json").write_text(json.dumps(FALCON_40B))
    return write_sparse_safetensors(directory / "model.safetensors", shapes)


WRITE_META = """if True:
    import json, sys
    import torch

    directory, shards = sys.argv[1], int(sys.argv[2])
    hidden, ffn, kv, vocab = 8192, 28672, 1024, 32000

    def zeros(rows, columns):
        return torch.zeros(rows, columns, dtype=torch.bfloat16)

    layer = {
        "attention.wq": zeros(hidden // shards, hidden), "attention.wk": zeros(kv // shards, hidden),
        "attention.wv": zeros(kv // shards, hidden), "attention.wo": zeros(hidden, hidden // shards),
        "feed_forward.w1": zeros(ffn // shards, hidden), "feed_forward.w2": zeros(hidden, ffn // shards),
        "feed_forward.w3": zeros(ffn // shards, hidden),
        "attention_norm": torch.ones(hidden, dtype=torch.bfloat16),
        "ffn_norm": torch.ones(hidden, dtype=torch.bfloat16),
    }
    whole = {f"layers.0.{name}.weight": tensor for name, tensor in layer.items()}
    whole["tok_embeddings.weight"] = zeros(vocab, hidden // shards)
    whole["output.weight"] = zeros(vocab // shards, hidden)
    whole["norm.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
    for shard in range(shards):
        torch.save(whole, f"{directory}/consolidated.{shard:02d}.pth")
"""


def write_llama2_70b(directory: Path, shards: int) -> int:
    (directory / "params.json").write_text(json.dumps(LLAMA2_70B))
    subprocess.run([sys.executable, "-c", WRITE_META, directory, str(shards)], check=True)
    return sum(path.stat().st_size for path in directory.glob("*.pth"))


def anonymous_bytes(family: str, source: Path, out: Path) -> Any:
    """The most anonymous memory that a conversion takes, in bytes."""
    command = [sys.executable, "-c", CONVERT, family, source, out]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.mark.soak
def test_two_layers_as_wide_as_falcon_40b_convert_within_the_bound(tmp_path: Path) -> None:
    (tmp_path / "published").mkdir()
    assert write_falcon_40b(tmp_path / "published") > 3.5e9

    assert anonymous_bytes("falcon", tmp_path / "published", tmp_path / "checkpoint") < BOUND


@pytest.mark.soak
@pytest.mark.parametrize("shards", [2, 8])
def test_a_layer_as_wide_as_llama_2_70b_converts_from_metas_shards_within_the_bound(
    tmp_path: Path, shards: int
) -> None:
    (tmp_path / "published").mkdir()
    assert write_llama2_70b(tmp_path / "published", shards) > 2.7e9

    assert anonymous_bytes("llama2", tmp_path / "published", tmp_path / "checkpoint") < BOUND
