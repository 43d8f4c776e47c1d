"""The first Falcon files on the hub, which came with code of their own: their former keys under the present names.

Copies of them are still in use. transformers reads only the present keys, and takes its defaults for the others.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

FORMER_KEYS = {
    "n_layer": "num_hidden_layers",
    "n_embed": "hidden_size",
    "n_head": "num_attention_heads",
    "n_head_kv": "num_kv_heads",
}
"""The former name of a key of ``config.json`` to its present name."""


def in_present_keys(published: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``published``, a parsed ``config.json``, with every former key under its present name."""
    present = {name: value for name, value in published.items() if name not in FORMER_KEYS}
    for former, name in FORMER_KEYS.items():
        if former in published:
            present.setdefault(name, published[former])
    if "n_head_kv" in published:  # the first 40B, whose file has no other sign of it
        present.setdefault("new_decoder_architecture", True)
    return present


@contextmanager
def for_transformers(directory: Path) -> Iterator[Path]:
    """Yield a directory from which transformers reads the checkpoint in ``directory`` correctly.

    It is that directory itself, or a temporary one with links to its files.
    """
    published = _read_config(directory)
    if not FORMER_KEYS.keys() & published.keys():
        yield directory
        return
    with TemporaryDirectory(prefix="megacore-falcon-") as name:
        linked = Path(name)
        for file in directory.glob("*.safetensors*"):
            (linked / file.name).symlink_to(file.resolve())
        present = {**in_present_keys(published), "architectures": ["FalconForCausalLM"], "model_type": "falcon"}
        (linked / "config.json").write_text(json.dumps(present), encoding="utf-8")
        yield linked


def _read_config(directory: Path) -> dict[str, Any]:
    """Return the parsed ``config.json``, empty if it cannot be read: transformers then reports a better error."""
    try:
        published = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return published if isinstance(published, dict) else {}
