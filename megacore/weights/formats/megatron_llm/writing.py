"""Writing: the parts of every rank, with a padded vocabulary; and the format itself."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from megacore.checkpoint.matrix import ConcatenatedRows, RowsOf
from megacore.checkpoint.safetensors_file import OutputTensor
from megacore.checkpoint.torch_file import write_torch_file
from megacore.errors import LayoutError
from megacore.weights.formats.megatron_llm.rank_files import (
    EMBEDDING,
    HEAD,
    INTERLEAVED,
    LAYER,
    RECORD,
    TIED_HEAD,
    TRACKER,
    WEIGHTS,
    cut_of,
    tracked_directory,
)
from megacore.weights.formats.megatron_llm.reading import MegatronLlmCheckpoint
from megacore.weights.formats.published import CheckpointFormat, Publication

_DIVISIBLE_BY = 128  # the vocabulary is padded to a multiple of this times tp, unless the arguments say otherwise


class MegatronLlmFormat(CheckpointFormat):
    """A tracker file, one file of ``torch.save`` for each (tensor, pipeline) parallel rank, ``tokenizer.model``."""

    name = "megatron-llm"
    marker_file = TRACKER

    def weight_files(self, directory: Path) -> Iterable[Path]:
        return tracked_directory(directory).glob("mp_rank_*/*.pt")

    def open(self, directory: Path) -> MegatronLlmCheckpoint:
        return MegatronLlmCheckpoint(directory)

    def write(self, directory: Path, publication: Publication, *, advance: Callable[[int], None]) -> None:
        args = {**publication.config, **publication.origin.get("config", {})}
        _check_divisible(args, publication.tp, publication.pp)
        true_vocab_size = args.pop("vocab_size")
        multiple = args.setdefault("make_vocab_size_divisible_by", _DIVISIBLE_BY) * publication.tp
        padded = -(-true_vocab_size // multiple) * multiple
        if padded > true_vocab_size:
            publication.report(
                f"the vocabulary of {true_vocab_size} is padded to {padded} rows, as the format requires at tp "
                f"{publication.tp}: the new rows repeat the last one"
            )
        args |= {
            "padded_vocab_size": padded,
            "tensor_model_parallel_size": publication.tp,
            "pipeline_model_parallel_size": publication.pp,
            "iteration": "release",
            "hidden_dropout": 0.0,
            "attention_dropout": 0.0,
            "bias_gelu_fusion": False,
            "bias_dropout_fusion": False,
            "use_flash_attn": True,
        }
        tensors = {tensor.name: tensor for tensor in publication.tensors}
        for name in tensors.keys() & {EMBEDDING, HEAD}:
            tensors[name] = _with_rows(tensors[name], padded)
        for stage in range(publication.pp):
            on_stage = _stage(tensors, stage, publication.pp, args["num_layers"] // publication.pp)
            for rank in range(publication.tp):
                document = {
                    "args": argparse.Namespace(**args),
                    "checkpoint_version": 3.0,
                    "iteration": "release",
                    "model": _rank_model(on_stage, rank, publication.tp, is_gated=bool(args.get("glu_activation"))),
                    RECORD: {"rotary_layout": INTERLEAVED, "true_vocab_size": true_vocab_size},
                }
                stage_suffix = f"_{stage:03d}" if publication.pp > 1 else ""
                path = directory / "release" / f"mp_rank_{rank:02d}{stage_suffix}" / WEIGHTS[0]
                path.parent.mkdir(parents=True)
                write_torch_file(path, document, advance=advance)
        (directory / TRACKER).write_text("release", encoding="utf-8")
        if tokenizer := publication.tokenizer_files.get("tokenizer.model"):
            shutil.copyfile(tokenizer, directory / "tokenizer.model")


def _check_divisible(args: Mapping[str, Any], tp: int, pp: int) -> None:
    """Raise :class:`LayoutError`, listing the sizes that work, for sizes that the format cannot be cut for."""
    cut = {name: args[name] for name in ("num_attention_heads", "num_attention_heads_kv", "ffn_hidden_size")}
    failing = [f"{name} {size} by tp {tp}" for name, size in cut.items() if size % tp]
    if args["num_layers"] % pp:
        failing.append(f"num_layers {args['num_layers']} by pp {pp}")
    if failing:
        tps = [str(n) for n in range(1, min(cut.values()) + 1) if not any(size % n for size in cut.values())]
        pps = [str(n) for n in range(1, args["num_layers"] + 1) if args["num_layers"] % n == 0]
        raise LayoutError(
            f"the format megatron-llm cuts into equal parts only, and cannot divide {' and '.join(failing)}. "
            f"Sizes that work: tp {', '.join(tps)}; pp {', '.join(pps)}"
        )


def _with_rows(tensor: OutputTensor, rows: int) -> OutputTensor:
    """Return the tensor with its last row repeated up to ``rows`` rows."""
    matrix = tensor.matrix
    if missing := rows - matrix.rows:
        matrix = ConcatenatedRows([matrix, RowsOf(matrix, torch.full((missing,), matrix.rows - 1))])
    return OutputTensor(tensor.name, (rows, *tensor.shape[1:]), tensor.dtype, matrix)


def _stage(tensors: Mapping[str, OutputTensor], stage: int, pp: int, layers: int) -> dict[str, OutputTensor]:
    """Return the tensors of one pipeline stage under their names there: layers are numbered from 0."""
    on_stage = {}
    for name, tensor in tensors.items():
        if match := LAYER.fullmatch(name):
            if int(match[1]) // layers == stage:
                on_stage[f"encoder.layers.{int(match[1]) % layers}.{match[2]}"] = tensor
        elif stage == (0 if name == EMBEDDING else pp - 1):
            on_stage[name] = tensor
    if pp > 1 and stage == pp - 1 and HEAD not in tensors:
        on_stage[TIED_HEAD] = tensors[EMBEDDING]
    return on_stage


def _rank_model(tensors: Mapping[str, OutputTensor], rank: int, tp: int, *, is_gated: bool) -> dict[str, Any]:
    """Return one rank's part of ``tensors``, nested as in the format."""
    language_model: dict[str, Any] = {}
    model: dict[str, Any] = {"language_model": language_model}
    for name, tensor in tensors.items():
        cut = cut_of(name, is_gated=is_gated)
        matrix = tensor.matrix if cut is None else cut.part(tensor.matrix, tp, rank)
        shape = tensor.shape if cut is None else (matrix.rows, matrix.columns)
        part = OutputTensor(name, shape, tensor.dtype, matrix)
        if name == EMBEDDING:
            language_model["embedding"] = {"word_embeddings": {"weight": part}}
        elif name == TIED_HEAD:
            model["word_embeddings_for_head"] = {"weight": part}
        elif name == HEAD:
            language_model[HEAD] = part
        else:
            language_model.setdefault("encoder", {})[name.removeprefix("encoder.")] = part
    return model
