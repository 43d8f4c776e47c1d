"""Writes and reads checkpoints in the format megatron-llm, with nothing of megacore's: from the format's description.

Everything is done on whole tensors with the plainest operations of torch, so that a mistake in megacore's lazy and
sliced ways of doing the same cannot be repeated here.
"""

from __future__ import annotations

import argparse
import enum
import random
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

TRACKER = "latest_checkpointed_iteration.txt"


@dataclass
class Layer:
    """A layer as separate tensors with rotary halves, as transformers holds it.

    ``q`` is [heads, head_dim, hidden]; ``k`` and ``v`` are [kv_heads, head_dim, hidden]; ``up`` is None without a gate.
    ``norms`` by the name that the format has for them, with ``.weight`` or ``.bias``.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    dense: Tensor
    gate: Tensor
    up: Tensor | None
    down: Tensor
    norms: dict[str, Tensor]


@dataclass
class Model:
    """A whole model and the arguments that describe it."""

    layers: list[Layer]
    embedding: Tensor
    head: Tensor | None
    final: dict[str, Tensor]
    args: dict[str, Any] = field(default_factory=dict)


def model_of(tensors: Mapping[str, Tensor], config: Any, **args: Any) -> Model:
    """A model with RMSNorm and a gated MLP that transformers saved as ``tensors``, taken apart."""
    head_dim = config.hidden_size // config.num_attention_heads

    def layer(number: int) -> Layer:
        def tensor(name: str) -> torch.Tensor:
            return tensors[f"model.layers.{number}.{name}.weight"]

        q, k, v = (tensor(f"self_attn.{part}_proj").unflatten(0, (-1, head_dim)) for part in "qkv")
        gate, up, down = (tensor(f"mlp.{part}_proj") for part in ("gate", "up", "down"))
        norms = {f"{name}.weight": tensor(name) for name in ("input_layernorm", "post_attention_layernorm")}
        return Layer(q, k, v, tensor("self_attn.o_proj"), gate, up, down, norms)

    return Model(
        layers=[layer(number) for number in range(config.num_hidden_layers)],
        embedding=tensors["model.embed_tokens.weight"],
        head=None if config.tie_word_embeddings else tensors["lm_head.weight"],
        final={"weight": tensors["model.norm.weight"]},
        args={
            "num_layers": config.num_hidden_layers,
            "hidden_size": config.hidden_size,
            "ffn_hidden_size": config.intermediate_size,
            "num_attention_heads": config.num_attention_heads,
            "num_attention_heads_kv": config.num_key_value_heads,
            "max_position_embeddings": config.max_position_embeddings,
            "seq_length": config.max_position_embeddings,
            "layernorm_epsilon": config.rms_norm_eps,
            "rope_theta": config.rope_parameters["rope_theta"],
            "glu_activation": "swiglu",
            "use_rms_norm": True,
            "parallel_attn": False,
            "tie_embed_logits": config.tie_word_embeddings,
            "position_embedding_type": "rotary",
            "tokenizer_type": "SentencePieceTokenizer",
            "make_vocab_size_divisible_by": 128,
        }
        | args,
    )


def falcon_model_of(tensors: Mapping[str, Tensor], config: Any, **args: Any) -> Model:
    """A Falcon in the style of 7B or of 40B that transformers saved as ``tensors``, taken apart."""
    heads = config.num_attention_heads
    kv_heads = config.num_kv_heads if config.new_decoder_architecture or not config.multi_query else 1
    norms = (
        {"input_layernorm": "ln_attn", "mlp_layernorm": "ln_mlp"}
        if config.new_decoder_architecture
        else {"input_layernorm": "input_layernorm"}
    )

    def layer(number: int) -> Layer:
        prefix = f"transformer.h.{number}"
        fused = tensors[f"{prefix}.self_attention.query_key_value.weight"]
        fused = fused.unflatten(0, (kv_heads, -1, config.hidden_size // heads))
        return Layer(
            q=fused[:, :-2].flatten(0, 1),
            k=fused[:, -2],
            v=fused[:, -1],
            dense=tensors[f"{prefix}.self_attention.dense.weight"],
            gate=tensors[f"{prefix}.mlp.dense_h_to_4h.weight"],
            up=None,
            down=tensors[f"{prefix}.mlp.dense_4h_to_h.weight"],
            norms={
                f"{theirs}.{part}": tensors[f"{prefix}.{published}.{part}"]
                for theirs, published in norms.items()
                for part in ("weight", "bias")
            },
        )

    return Model(
        layers=[layer(number) for number in range(config.num_hidden_layers)],
        embedding=tensors["transformer.word_embeddings.weight"],
        head=None,
        final={part: tensors[f"transformer.ln_f.{part}"] for part in ("weight", "bias")},
        args={
            "num_layers": config.num_hidden_layers,
            "hidden_size": config.hidden_size,
            "num_attention_heads": heads,
            "num_attention_heads_kv": kv_heads,
            "parallel_attn": True,
            "position_embedding_type": "rotary",
            "tokenizer_type": "FalconTokenizer",
            "max_position_embeddings": 2048,
            "seq_length": 2048,
        }
        | ({"parallel_layernorm": True} if config.new_decoder_architecture else {})
        | args,
    )


def interleaved(block: Tensor) -> Tensor:
    """A query or key head [head_dim, hidden] from halves to pairs: 0, d/2, 1, d/2 + 1, …"""
    head_dim = block.shape[0]
    order = [row for pair in range(head_dim // 2) for row in (pair, pair + head_dim // 2)]
    return block[order]


def grouped_qkv(layer: Layer, kv_heads: range, *, layout: str) -> Tensor:
    """The rows of some key-value heads: of each its query heads, the key, the value."""
    turn = interleaved if layout == "interleaved" else lambda block: block
    per_kv = len(layer.q) // len(layer.k)
    blocks = []
    for kv_head in kv_heads:
        blocks += [turn(layer.q[head]) for head in range(kv_head * per_kv, (kv_head + 1) * per_kv)]
        blocks += [turn(layer.k[kv_head]), layer.v[kv_head]]
    return torch.cat(blocks)


def padded(matrix: Tensor, rows: int | None) -> Tensor:
    """With copies of the last row up to ``rows``."""
    if rows is None:
        return matrix
    return torch.cat([matrix, matrix[-1:].expand(rows - len(matrix), -1)])


def rank_model(
    model: Model, *, rank: int, tp: int, stage: int, pp: int, spelling: str, layout: str, vocab_rows: int | None
) -> dict[str, Any]:
    """The entry ``model`` of one rank's file."""
    trained = spelling == "trained"
    attention = "self_attention" if trained else "attention"
    transformer: dict[str, Tensor] = {}
    per_stage = len(model.layers) // pp
    for number, layer in enumerate(model.layers[stage * per_stage : (stage + 1) * per_stage]):
        kv_per_rank = len(layer.k) // tp
        name = f"layers.{number}"
        qkv = grouped_qkv(layer, range(rank * kv_per_rank, (rank + 1) * kv_per_rank), layout=layout)
        transformer[f"{name}.{attention}.query_key_value.weight"] = qkv
        transformer[f"{name}.{attention}.dense.weight"] = layer.dense.chunk(tp, dim=1)[rank]
        first = layer.gate.chunk(tp)[rank]
        if layer.up is not None:
            first = torch.cat([layer.up.chunk(tp)[rank], first])
        transformer[f"{name}.mlp.dense_h_to_4h.weight"] = first
        transformer[f"{name}.mlp.dense_4h_to_h.weight"] = layer.down.chunk(tp, dim=1)[rank]
        for norm, tensor in layer.norms.items():
            transformer[f"{name}.{norm}"] = tensor
    if stage == pp - 1:
        transformer |= {f"final_layernorm.{part}": tensor for part, tensor in model.final.items()}
    language_model: dict[str, Any] = {"encoder" if trained else "transformer": transformer}
    result: dict[str, Any] = {"language_model": language_model}
    embedding = padded(model.embedding, vocab_rows).chunk(tp)[rank]
    if stage == 0:
        language_model["embedding"] = (
            {"word_embeddings": {"weight": embedding}} if trained else {"word_embeddings.weight": embedding}
        )
    if stage == pp - 1:
        if model.head is not None:
            language_model["lm_head"] = padded(model.head, vocab_rows).chunk(tp)[rank]
        elif pp > 1:
            result["word_embeddings_for_head"] = {"weight": embedding}
    return cloned(result)


def cloned(tree: Any) -> Any:
    return {k: cloned(v) for k, v in tree.items()} if isinstance(tree, dict) else tree.clone().contiguous()


def rank_file(directory: Path, rank: int, stage: int, pp: int, *, folder: str = "release") -> Path:
    name = f"mp_rank_{rank:02d}_{stage:03d}" if pp > 1 else f"mp_rank_{rank:02d}"
    return directory / folder / name / "model_optim_rng.pt"


def write_megatron_llm(
    directory: Path,
    model: Model,
    *,
    tp: int = 1,
    pp: int = 1,
    spelling: str = "trained",
    layout: str = "interleaved",
    vocab_rows: int | None = None,
    **args: Any,
) -> Path:
    """Write ``model`` as a converter (``spelling="converted"``) or a training run after 40 iterations would."""
    trained = spelling == "trained"
    folder = "iter_0000040" if trained else "release"
    sizes = {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp}
    rows = vocab_rows or len(model.embedding)
    directory.mkdir(exist_ok=True)
    for stage in range(pp):
        for rank in range(tp):
            path = rank_file(directory, rank, stage, pp, folder=folder)
            path.parent.mkdir(parents=True)
            contents = rank_model(
                model, rank=rank, tp=tp, stage=stage, pp=pp, spelling=spelling, layout=layout, vocab_rows=vocab_rows
            )
            document: dict[str, Any] = {
                "iteration": 40 if trained else "release",
                "checkpoint_version": 3.0,
                "model": contents,
            }
            with enumerations() as enums:
                namespace = argparse.Namespace(**(model.args | sizes | {"padded_vocab_size": rows} | args))
                if trained:
                    add_what_training_adds(document, namespace, enums)
                document["args"] = namespace
                torch.save(document, path)
    (directory / TRACKER).write_text("40" if trained else "release")
    return directory


def add_what_training_adds(document: dict[str, Any], args: argparse.Namespace, enums: ModuleType) -> None:
    """State of the run, and arguments that are objects of the system's own classes."""
    args.position_embedding_type = getattr(enums.PositionEmbeddingType, args.position_embedding_type)
    args.model_type = enums.ModelType.encoder_or_decoder
    args.params_dtype = torch.bfloat16
    args.micro_batch_size = 2
    args.data_path = ["some/where"]
    args.wandb_api_key = "the secret key"
    document["optimizer"] = {"optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 0.1}]}}
    document["opt_param_scheduler"] = {"max_lr": 1e-4, "num_steps": 40}
    document["rng_state"] = [
        {
            "random_rng_state": random.getstate(),
            "np_rng_state": np.random.get_state(),
            "torch_rng_state": torch.get_rng_state(),
            "cuda_rng_state": torch.zeros(16, dtype=torch.uint8),
            "rng_tracker_states": {"model-parallel-rng": torch.zeros(16, dtype=torch.uint8)},
        }
    ]


@contextmanager
def enumerations() -> Iterator[ModuleType]:
    """The modules with the enumerations that saved arguments refer to, while the block runs and not after it."""
    module = ModuleType("megatron.model.enums")
    for name, members in {
        "PositionEmbeddingType": {"rotary": 1, "absolute": 2},
        "ModelType": {"encoder_or_decoder": 1, "encoder_and_decoder": 2},
    }.items():
        setattr(module, name, enum.Enum(name, members, module=module.__name__))
    names = {
        "megatron": ModuleType("megatron"),
        "megatron.model": ModuleType("megatron.model"),
        module.__name__: module,
    }
    # Another test may have imported megatron-core, whose package has the same name.
    others = {name: sys.modules[name] for name in names if name in sys.modules}
    sys.modules.update(names)
    try:
        yield module
    finally:
        for name in names:
            del sys.modules[name]
        sys.modules.update(others)


def load(path: Path) -> dict[str, Any]:
    """What a file holds, as the system itself would load it."""
    with enumerations():
        return torch.load(path, weights_only=False)


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Tensor]:
    """The tensors of a nested dictionary by the path to them."""
    tensors: dict[str, Tensor] = {}
    for key, value in tree.items():
        tensors |= flat(value, f"{prefix}{key}/") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return tensors


def assert_same_tensors(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Same names, dtypes, shapes and bits."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def native_tensors(directory: Path) -> dict[str, Tensor]:
    """Every parameter of a native checkpoint, whole, by its name, read with safetensors' own reader; tp 1 only."""
    from safetensors.torch import load_file

    tensors: dict[str, Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors
