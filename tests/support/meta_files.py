"""Checkpoints in Meta's format that Meta's own implementation wrote, and the logits that it computed with them.

The weights are random, of odd small sizes. Two model-parallel ranks are two processes: fairscale keeps its groups in
global variables, so each run has processes of its own. They make all the checkpoints of a session, once.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

MODELS: dict[str, dict[str, Any]] = {
    "multi-head": {"dim": 60, "n_layers": 3, "n_heads": 6, "multiple_of": 42, "norm_eps": 1e-6, "vocab_size": 102},
    "2 key-value heads": {
        "dim": 48,
        "n_layers": 2,
        "n_heads": 6,
        "n_kv_heads": 2,
        "multiple_of": 10,
        "ffn_dim_multiplier": 1.3,
        "norm_eps": 1e-5,
        "vocab_size": 98,
        "rope_theta": 1e6,
    },
    "odd": {
        "dim": 42,
        "n_layers": 3,
        "n_heads": 3,
        "n_kv_heads": 3,
        "multiple_of": 5,
        "ffn_dim_multiplier": 0.7,
        "norm_eps": 1e-2,
        "vocab_size": 99,
        "rope_theta": 500.0,
    },
}
"""``params.json`` of each model. The last one can be cut into three only."""

CASES = [
    *((name, 1, "vocabulary") for name in MODELS),
    *((name, 2, cut) for name in ("multi-head", "2 key-value heads") for cut in ("vocabulary", "width")),
]
"""Model, number of ranks, and along what the embedding is cut: the width in the first two generations."""

INPUT_IDS = torch.randint(0, 98, (2, 24), generator=torch.Generator().manual_seed(1))


@dataclass(frozen=True)
class MetaFiles:
    """A directory that Meta's implementation wrote."""

    directory: Path
    params: dict[str, Any]

    @property
    def logits(self) -> Tensor:
        """What it computed for :data:`INPUT_IDS`."""
        return torch.load(self.directory.with_suffix(".logits"))

    @property
    def weights(self) -> dict[str, Tensor]:
        """The whole tensors that it was given."""
        return whole_weights(self.params)

    def shards(self) -> list[dict[str, Tensor]]:
        return read_shards(self.directory)


def read_shards(directory: Path) -> list[dict[str, Tensor]]:
    """What is in each file of a checkpoint, read with torch."""
    return [torch.load(path, weights_only=True) for path in sorted(directory.glob("consolidated.*.pth"))]


@cache
def meta_files_of_the_session() -> tuple[tempfile.TemporaryDirectory[str], dict[tuple[str, int, str], MetaFiles]]:
    """All of :data:`CASES`, made by one process for the files of one rank and two for those of two."""
    directory = tempfile.TemporaryDirectory(prefix="meta-files-")
    root = Path(directory.name)
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(root), str(rank), str(size)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        for size in (1, 2)
        for rank in range(size)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors.decode()
    made = {case: MetaFiles(root / directory_name(*case), MODELS[case[0]]) for case in CASES}
    return directory, made


@pytest.fixture(scope="session")
def meta_files() -> dict[tuple[str, int, str], MetaFiles]:
    """Meta's checkpoints, by model, number of ranks and cut of the embedding. Not to be changed."""
    pytest.importorskip("llama_models", reason="needs the extra [meta]")
    return meta_files_of_the_session()[1]


def directory_name(model: str, num_ranks: int, embedding: str) -> str:
    return f"{model.replace(' ', '-')}-{num_ranks}-{embedding}"


def whole_weights(params: dict[str, Any]) -> dict[str, Tensor]:
    """Random weights that make logits of order 1, under Meta's names."""
    dim, head_dim = params["dim"], params["dim"] // params["n_heads"]
    kv_width = params.get("n_kv_heads", params["n_heads"]) * head_dim
    width = int(params.get("ffn_dim_multiplier", 1) * int(8 * dim / 3))
    width += -width % params["multiple_of"]
    generator = torch.Generator().manual_seed(dim)

    def matrix(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator) / columns**0.5

    def norm() -> Tensor:
        return 1 + 0.3 * torch.randn(dim, generator=generator)

    weights = {"tok_embeddings.weight": matrix(params["vocab_size"], dim)}
    for layer in range(params["n_layers"]):
        weights |= {
            f"layers.{layer}.attention.wq.weight": matrix(dim, dim),
            f"layers.{layer}.attention.wk.weight": matrix(kv_width, dim),
            f"layers.{layer}.attention.wv.weight": matrix(kv_width, dim),
            f"layers.{layer}.attention.wo.weight": matrix(dim, dim),
            f"layers.{layer}.feed_forward.w1.weight": matrix(width, dim),
            f"layers.{layer}.feed_forward.w2.weight": matrix(dim, width),
            f"layers.{layer}.feed_forward.w3.weight": matrix(width, dim),
            f"layers.{layer}.attention_norm.weight": norm(),
            f"layers.{layer}.ffn_norm.weight": norm(),
        }
    return weights | {"norm.weight": norm(), "output.weight": matrix(params["vocab_size"], dim)}


def in_hugging_face_names(weights: dict[str, Tensor], params: dict[str, Any]) -> dict[str, Tensor]:
    """The same weights as transformers has them: other names, and rotary pairs as halves."""
    head_dim = params["dim"] // params["n_heads"]
    names = {
        "tok_embeddings": "model.embed_tokens",
        "norm": "model.norm",
        "output": "lm_head",
        "attention.wq": "self_attn.q_proj",
        "attention.wk": "self_attn.k_proj",
        "attention.wv": "self_attn.v_proj",
        "attention.wo": "self_attn.o_proj",
        "feed_forward.w1": "mlp.gate_proj",
        "feed_forward.w2": "mlp.down_proj",
        "feed_forward.w3": "mlp.up_proj",
        "attention_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
    }
    renamed = {}
    for name, tensor in weights.items():
        module = name.removesuffix(".weight")
        if module.startswith("layers."):
            _, layer, module = module.split(".", 2)
            new_name = f"model.layers.{layer}.{names[module]}.weight"
        else:
            new_name = f"{names[module]}.weight"
        if module in ("attention.wq", "attention.wk"):
            pairs = tensor.view(-1, head_dim // 2, 2, tensor.shape[1])  # head, pair, component, column
            tensor = pairs.transpose(1, 2).reshape(tensor.shape)
        renamed[new_name] = tensor
    return renamed


# What the processes do


def _write_and_compute(root: Path, rank: int, num_ranks: int) -> None:
    import torch.distributed as dist
    from fairscale.nn.model_parallel.initialize import initialize_model_parallel

    torch.set_num_threads(1)
    store = dist.FileStore(str(root / f"store-{num_ranks}"), num_ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=num_ranks)
    initialize_model_parallel(num_ranks)
    for case in (case for case in CASES if case[1] == num_ranks):
        directory = root / directory_name(*case)
        directory.mkdir(exist_ok=True)
        model = _model(case, rank)
        torch.save(model.state_dict(), directory / f"consolidated.{rank:02d}.pth")
        logits = model(INPUT_IDS, 0)
        if rank == 0:
            (directory / "params.json").write_text(json.dumps(MODELS[case[0]]))
            torch.save(logits.clone(), directory.with_suffix(".logits"))
    dist.barrier()
    dist.destroy_process_group()


def _model(case: tuple[str, int, str], rank: int) -> Any:
    """Meta's model with this rank's part of the weights, which each layer's own shape and kind tell."""
    from fairscale.nn.model_parallel.layers import ColumnParallelLinear, ParallelEmbedding, VocabParallelEmbedding
    from llama_models.llama3.args import ModelArgs
    from llama_models.llama3.model import Transformer

    name, num_ranks, embedding = case
    params = {"rope_theta": 10000.0, **MODELS[name]}
    model = Transformer(ModelArgs(**params, max_seq_len=INPUT_IDS.shape[1], max_batch_size=len(INPUT_IDS)))
    if embedding == "width":  # as in the first two generations
        model.tok_embeddings = ParallelEmbedding(params["vocab_size"], params["dim"], init_method=lambda weight: weight)
    weights = whole_weights(params)
    for module_name, module in model.named_modules():
        if not isinstance(getattr(module, "weight", None), Tensor):
            continue
        whole = weights[f"{module_name}.weight"]
        if whole.dim() == 2:
            on_rows = isinstance(module, ColumnParallelLinear | VocabParallelEmbedding)
            whole = whole.chunk(num_ranks, dim=0 if on_rows else 1)[rank]
        assert module.weight.shape == whole.shape, module_name
        module.weight.data.copy_(whole)
    return model


if __name__ == "__main__":
    _write_and_compute(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
