"""The format megatron-llm: a tracker file, and one ``model_optim_rng.pt`` for each (tensor, pipeline) parallel rank.

::

    latest_checkpointed_iteration.txt                          "release", or the number of an iteration
    release/mp_rank_00/model_optim_rng.pt                      of one rank, or of
    release/mp_rank_<tp>_<pp>/model_optim_rng.pt               several; the second number only with several stages
    iter_<iteration>/mp_rank_<tp>_<pp>/model_optim_rng.pt      after training
    tokenizer.model

Each file holds ``args`` (an ``argparse.Namespace``), ``checkpoint_version``, ``iteration`` and ``model``; after
training, also the state of the optimizer, of the learning rate and of random numbers, which only that run can use.

Tensors have two spellings, of converted and of trained files. The weight maps see the second one, without the parts of
ranks and with layers numbered through the whole model.
"""

from __future__ import annotations

import argparse
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megacore.checkpoint.matrix import ColumnsOf, ConcatenatedColumns, ConcatenatedRows, LazyMatrix, RowsOf
from megacore.checkpoint.safetensors_file import OutputTensor
from megacore.checkpoint.torch_file import (
    Foreign,
    MappedMatrix,
    check_dtypes,
    foreign,
    read_torch_file,
    write_torch_file,
)
from megacore.errors import CheckpointError, ConfigError, CorruptCheckpointError, LayoutError
from megacore.hookspecs import ModelFamily
from megacore.plugins import default_registry
from megacore.weights.formats.published import CheckpointFormat, Publication, PublishedCheckpoint, Shape
from megacore.weights.megatron_llm_map import half_from_interleaved_rows

TRACKER = "latest_checkpointed_iteration.txt"
WEIGHTS = ("model_optim_rng.pt", "model_rng.pt")
"""What a rank's file is called; the second is of runs with a distributed optimizer."""

RECORD = "megacore"
"""A key of ours in each file, which the system that the format is of does not look at: what it does not record."""

INTERLEAVED, HALVES = "interleaved", "halves"
"""The rotary pairs in a head: (2i, 2i + 1), or (i, i + head_dim / 2) as until its commit 332cf3c."""

TRAINING_STATE = ("optimizer", "opt_param_scheduler", "rng_state")
"""Keys that only mean something to the training run that saved them."""

EMBEDDING = "embedding.word_embeddings.weight"
HEAD = "lm_head"
TIED_HEAD = "word_embeddings_for_head.weight"
"""The last stage's copy of the embedding, in a model that has no head of its own."""

_DIVISIBLE_BY = 128
_COMPARED_ROWS = 1024
_MOST_RANKS = 100_000
_RANK = re.compile(r"mp_rank_(\d{2,})(?:_(\d{3,}))?")
_LAYER = re.compile(r"encoder\.layers\.(\d+)\.(.+)")
_ENUMS = {"rotary": ("PositionEmbeddingType", 1), "absolute": ("PositionEmbeddingType", 2)}
_KEPT_ARGS = ("make_vocab_size_divisible_by", "model_name", "seq_length", "tokenizer_type")
"""Of what a checkpoint says beside its architecture. Not more: the rest may hold paths, and keys to services."""

_ALLOWED = (
    argparse.Namespace,
    *(
        foreign(f"megatron.{module}.enums.{name}")
        for module in ("core", "model")
        for name in ("AttnMaskType", "AttnType", "LayerType", "ModelType", "PositionEmbeddingType")
    ),
    # The state of numpy's random numbers, which nobody looks at here.
    *(foreign(f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),
    foreign("numpy.ndarray"),
    foreign("numpy.dtype"),
)
"""What a file may contain beside tensors, containers, numbers and strings."""


# How tensors are cut over tensor-parallel ranks


@dataclass(frozen=True)
class Cut:
    """How a tensor is cut: ``merge`` is the inverse of ``part`` for all ranks."""

    part: Callable[[LazyMatrix, int, int], LazyMatrix]
    merge: Callable[[Sequence[LazyMatrix]], LazyMatrix]


def _rows(matrix: LazyMatrix, tp: int, rank: int) -> LazyMatrix:
    size = matrix.rows // tp
    return RowsOf(matrix, slice(rank * size, (rank + 1) * size))


def _columns(matrix: LazyMatrix, tp: int, rank: int) -> LazyMatrix:
    size = matrix.columns // tp
    return ColumnsOf(matrix, slice(rank * size, (rank + 1) * size))


def _halves(matrix: LazyMatrix) -> tuple[LazyMatrix, LazyMatrix]:
    half = matrix.rows // 2
    return RowsOf(matrix, slice(0, half)), RowsOf(matrix, slice(half, matrix.rows))


ROWS = Cut(_rows, ConcatenatedRows)
COLUMNS = Cut(_columns, ConcatenatedColumns)
BOTH_HALVES = Cut(
    lambda matrix, tp, rank: ConcatenatedRows([_rows(half, tp, rank) for half in _halves(matrix)]),
    lambda parts: ConcatenatedRows([half for halves in zip(*map(_halves, parts), strict=True) for half in halves]),
)
"""A gated MLP: every rank has its part of the one half above its part of the other."""


def cut_of(name: str, *, is_gated: bool) -> Cut | None:
    """How tensor ``name`` is cut; ``None`` for one that every rank has whole."""
    if name in (EMBEDDING, HEAD, TIED_HEAD) or name.endswith(".query_key_value.weight"):
        return ROWS
    if name.endswith((".self_attention.dense.weight", ".mlp.dense_4h_to_h.weight")):
        return COLUMNS
    if name.endswith(".mlp.dense_h_to_4h.weight"):
        return BOTH_HALVES if is_gated else ROWS
    return None


# Reading


@dataclass(frozen=True)
class RankFiles:
    """The files of a checkpoint, opened: ``documents[stage][rank]`` is what one holds."""

    directory: Path
    paths: list[list[Path]]
    documents: list[list[dict[str, Any]]]

    @classmethod
    def open(cls, directory: Path) -> RankFiles:
        """Open the files that the tracker of ``directory`` points at.

        Raises:
            CheckpointError: when one is missing, or contains what it should not.
            CorruptCheckpointError: when one is damaged, or they are not of one checkpoint.
        """
        folder = _tracked(directory)
        found = {
            (int(match[1]), int(match[2] or 0)): rank / name
            for rank in sorted(folder.iterdir())
            if (match := _RANK.fullmatch(rank.name))
            for name in WEIGHTS
            if (rank / name).is_file()
        }
        if not found:
            raise CheckpointError(f"{folder} has no mp_rank_* directory with a {WEIGHTS[0]} in it")
        first = _read_rank(next(iter(found.values())))
        tp, pp = (
            vars(first["args"]).get(f"{kind}_model_parallel_size") or 1 + max(place[axis] for place in found)
            for axis, kind in enumerate(("tensor", "pipeline"))
        )
        if not (isinstance(tp, int) and isinstance(pp, int) and 1 <= tp * pp <= _MOST_RANKS):
            raise CorruptCheckpointError(f"{folder} is said to be cut over tp {tp!r} and pp {pp!r} ranks")
        expected = {(rank, stage) for stage in range(pp) for rank in range(tp)}
        if expected != set(found):
            raise CheckpointError(
                f"{folder} is cut over tp {tp} and pp {pp} ranks, but it {_difference(expected, set(found))}"
            )
        paths = [[found[rank, stage] for rank in range(tp)] for stage in range(pp)]
        documents = [[_read_rank(path) for path in stage] for stage in paths]
        for path, document in zip(chain(*paths), chain(*documents), strict=True):
            if document.get("iteration") != first.get("iteration") or document.get(RECORD) != first.get(RECORD):
                raise CorruptCheckpointError(
                    f"{path} and {paths[0][0]} are not of one checkpoint: iterations {document.get('iteration')!r} and "
                    f"{first.get('iteration')!r}, records {document.get(RECORD)} and {first.get(RECORD)}"
                )
        return cls(directory, paths, documents)

    @property
    def iteration(self) -> Any:
        """``"release"``, or the number of an iteration."""
        return self.documents[0][0].get("iteration")

    @property
    def args(self) -> dict[str, Any]:
        """The saved arguments, with strings in place of the enumerations of their system."""
        return {name: _plain(value) for name, value in vars(self.documents[0][0]["args"]).items()}

    @property
    def rotary_layout(self) -> str | None:
        """What the files record of their rotary pairs; the system that the format is of records nothing."""
        return self.documents[0][0].get(RECORD, {}).get("rotary_layout")


def _tracked(directory: Path) -> Path:
    """The directory of ranks that the tracker points at."""
    tracker = directory / TRACKER
    if not tracker.is_file():
        raise CheckpointError(f"{directory} has no {TRACKER}: it is not a checkpoint in the format megatron-llm")
    said = tracker.read_text(encoding="utf-8", errors="replace").strip()
    if said != "release" and not said.isdecimal():
        raise CorruptCheckpointError(f"{tracker} says {said[:40]!r} instead of an iteration or 'release'")
    folder = directory / (said if said == "release" else f"iter_{int(said):07d}")
    if not folder.is_dir():
        raise CheckpointError(f"{tracker} points at {folder.name}, which {directory} does not have")
    return folder


def _read_rank(path: Path) -> dict[str, Any]:
    document = read_torch_file(path, allowed=_ALLOWED)
    if not isinstance(document, dict) or not isinstance(document.get("args"), argparse.Namespace):
        raise CorruptCheckpointError(f"{path} holds no args: it is not a file of the format megatron-llm")
    if "model0" in document:
        raise CheckpointError(
            f"{path} was saved by an interleaved pipeline (virtual stages), which is not implemented. "
            "Save it again without --num_layers_per_virtual_pipeline_stage"
        )
    if not isinstance(document.get("model"), dict):
        raise CorruptCheckpointError(f"{path} holds no model")
    record = document.get(RECORD, {})
    if not isinstance(record, dict) or record.get("rotary_layout") not in (None, INTERLEAVED, HALVES):
        raise CorruptCheckpointError(f"{path} records {record!r}, which no version of megacore writes")
    return document


def _difference(expected: set[tuple[int, int]], found: set[tuple[int, int]]) -> str:
    names = [
        f"{what} {', '.join(f'(tp {rank}, pp {stage})' for rank, stage in sorted(places))}"
        for what, places in (("lacks", expected - found), ("also has", found - expected))
        if places
    ]
    return " and ".join(names)


def _plain(value: Any) -> Any:
    if not isinstance(value, Foreign):
        return value
    made_of = (value.qualified_name.rpartition(".")[2], *value.arguments)
    return next((name for name, member in _ENUMS.items() if member == made_of), ".".join(map(str, made_of)))


def flattened(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors of a nested dictionary, named by the path to them."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from flattened(value, f"{prefix}{key}.")
        elif isinstance(value, Tensor):
            yield f"{prefix}{key}", value


def trained_spelling(name: str) -> str:
    """The name of a tensor of ``model`` as trained files have it, in whichever way it was spelt."""
    name = name.removeprefix("language_model.")
    name = re.sub(r"^transformer\.", "encoder.", name)
    return re.sub(r"^(encoder\.layers\.\d+)\.attention\.", r"\1.self_attention.", name)


class MegatronLlmCheckpoint(PublishedCheckpoint):
    """A checkpoint in the format megatron-llm, opened for reading."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._files = RankFiles.open(directory)
        self.config_file = self._files.paths[0][0]
        self._parts = self._named_parts()
        self.config = self._files.args
        if EMBEDDING not in self._parts:
            raise CorruptCheckpointError(f"{self.config_file} holds no {EMBEDDING}")
        self._stored_rows = sum(len(part) for part in self._parts[EMBEDDING])
        self.config["vocab_size"] = self._true_vocab_size()
        self._take_tied_head()

    def check_family(self, family: ModelFamily) -> None:
        registry = default_registry()
        named = self.config.get("model_name")
        if named == family.name or named not in registry.list_families():
            return
        if not set(registry.get_family(named).family.architectures) & set(family.architectures):
            raise ConfigError(f"{self.config_file} says that it is a {named}, not a {family.name}; use --model {named}")

    def shapes(self, expected: Mapping[str, Shape]) -> dict[str, Shape]:
        return {name: self._shape(name) for name in self._parts}

    def dtype(self, name: str) -> torch.dtype:
        return self._parts[name][0].dtype

    def matrix(self, name: str, shape: Shape) -> LazyMatrix:
        whole = self._whole(name)
        if name in (EMBEDDING, HEAD):
            return RowsOf(whole, slice(0, self.config["vocab_size"]))
        if name.endswith(".query_key_value.weight") and self._files.rotary_layout == HALVES:
            return RowsOf(whole, interleaved_from_halves(self.config, whole.rows, name))
        return whole

    def origin(self) -> dict[str, Any]:
        return {"source": MegatronLlmFormat.name, "config": {k: self.config[k] for k in _KEPT_ARGS if k in self.config}}

    def drop_vocabulary_padding(self, true_vocab_size: int) -> None:
        if not 1 <= true_vocab_size <= self._stored_rows:
            raise ConfigError(
                f"the true vocabulary cannot be of {true_vocab_size}: {self.config_file} holds {self._stored_rows} rows"
            )
        self.config["vocab_size"] = true_vocab_size

    def notes(self) -> list[str]:
        notes = [*self._vocabulary_notes()]
        if self._files.rotary_layout is None:
            notes.append(
                "the checkpoint does not record its rotary layout and is taken for one with interleaved pairs. If it "
                "was converted at commit 332cf3c of its system or earlier, run `megacore permute-qkv` on it first"
            )
        if dropped := [key for key in TRAINING_STATE if key in self._files.documents[0][0]]:
            notes.append(f"only the weights are converted; {', '.join(dropped)} are left behind")
        if drifted := self._drifted():
            more = f" and {len(drifted) - 1} more" if len(drifted) > 1 else ""
            notes.append(
                f"{drifted[0]}{more} should be the same on every tensor parallel rank and are not; rank 0's are taken, "
                "as the checkpoint's own system does"
            )
        if self._files.iteration == "release" and self._saved_defaults():
            notes.append(
                "layernorm_epsilon and rope_theta are the defaults of the checkpoint's system, whose tool for cutting "
                "checkpoints writes these whatever the model has: `megacore verify` tells whether they are right"
            )
        return notes

    def _saved_defaults(self) -> bool:
        """Whether all arguments were saved, not only a converter's, and the norm's and the rotary ones are defaults."""
        defaults = {"layernorm_epsilon": 1e-5, "rope_theta": 10000.0}
        return "micro_batch_size" in self.config and all(self.config.get(k) in (None, v) for k, v in defaults.items())

    def _drifted(self) -> list[str]:
        """Tensors that every rank has whole, and not the same on each."""
        is_gated = bool(self.config.get("glu_activation"))
        return [
            name
            for name, parts in self._parts.items()
            if cut_of(name, is_gated=is_gated) is None and not all(torch.equal(parts[0], part) for part in parts[1:])
        ]

    def _named_parts(self) -> dict[str, list[Tensor]]:
        """The parts of every tensor, one for each tensor-parallel rank."""
        stages = [
            [dict(_spelt(document, path)) for document, path in zip(documents, paths, strict=True)]
            for documents, paths in zip(self._files.documents, self._files.paths, strict=True)
        ]
        num_layers = [
            1 + max((int(match[1]) for name in ranks[0] if (match := _LAYER.fullmatch(name))), default=-1)
            for ranks in stages
        ]
        parts: dict[str, list[Tensor]] = {}
        for first_layer, ranks, paths in zip(
            list(accumulate(num_layers, initial=0))[:-1], stages, self._files.paths, strict=True
        ):
            for name, tensor in ranks[0].items():
                for rank, path in zip(ranks, paths, strict=True):
                    other = rank.get(name)
                    if other is None or other.shape != tensor.shape or other.dtype != tensor.dtype:
                        raise CorruptCheckpointError(f"{path} and {paths[0]} disagree about tensor {name}")
                whole_name = _LAYER.sub(lambda match: f"encoder.layers.{int(match[1]) + first_layer}.{match[2]}", name)  # noqa: B023
                if whole_name in parts:
                    raise CorruptCheckpointError(f"{paths[0]} holds {name}, and an earlier stage does too")
                parts[whole_name] = [rank[name] for rank in ranks]
        return parts

    def _whole(self, name: str) -> LazyMatrix:
        parts = [MappedMatrix(part) for part in self._parts[name]]
        cut = cut_of(name, is_gated=bool(self.config.get("glu_activation")))
        if len(parts) == 1:
            return parts[0]
        if cut is not None:
            return cut.merge(parts)
        return parts[0]

    def _shape(self, name: str) -> Shape:
        if name in (EMBEDDING, HEAD):
            whole = self._whole(name)
            rows = self.config["vocab_size"] if whole.rows == self._stored_rows else whole.rows
            return rows, whole.columns
        part = self._parts[name][0]
        if part.dim() != 2:
            return tuple(part.shape)
        whole = self._whole(name)
        return whole.rows, whole.columns

    def _take_tied_head(self) -> None:
        """The last stage's copy of the embedding must be one; then it is not needed."""
        if TIED_HEAD not in self._parts:
            return
        head, embedding = self._whole(TIED_HEAD), self._whole(EMBEDDING)
        if (head.rows, head.columns) != (embedding.rows, embedding.columns) or not _equal(head, embedding):
            raise CorruptCheckpointError(
                f"{self.directory}: the head on the last pipeline stage ({TIED_HEAD}) should be the embedding, and it "
                "differs from it: the stages are not of the same model, or were saved at different times"
            )
        del self._parts[TIED_HEAD]

    def _true_vocab_size(self) -> int:
        """How many rows of the embedding are known to be tokens: all of them, unless the checkpoint says otherwise."""
        recorded = self._files.documents[0][0].get(RECORD, {}).get("true_vocab_size")
        if recorded is not None:
            if not isinstance(recorded, int) or not 1 <= recorded <= self._stored_rows:
                raise CorruptCheckpointError(
                    f"{self.config_file} records a vocabulary of {recorded!r} and holds {self._stored_rows} rows"
                )
            return recorded
        extra = self.config.get("vocab_extra_ids") or self.config.get("vocab_extra_ids_list")
        if self.config.get("no_new_tokens") and not extra:
            return min(self._tokens() or self._stored_rows, self._stored_rows)
        return self._stored_rows

    def _vocabulary_notes(self) -> Iterator[str]:
        dropped = self._stored_rows - self.config["vocab_size"]
        if dropped:
            yield f"the last {dropped} rows of the vocabulary are padding and were dropped"
            return
        tokens = self._tokens()
        if tokens is None:
            yield (
                f"all {self._stored_rows} rows of the vocabulary are kept, since the checkpoint does not say whether "
                "the last are padding; if they are, give the true number with --true-vocab-size"
            )
        elif tokens < self._stored_rows:
            yield (
                f"all {self._stored_rows} rows of the vocabulary are kept, although tokenizer.model has {tokens} "
                "tokens: the others may be new tokens or padding; to drop padding, give the true number with "
                "--true-vocab-size"
            )

    def _tokens(self) -> int | None:
        """The tokens that ``tokenizer.model`` has, if it is there."""
        path = self.directory / "tokenizer.model"
        if not path.is_file():
            return None
        from sentencepiece import SentencePieceProcessor

        try:
            return SentencePieceProcessor(model_file=str(path)).vocab_size()
        except (RuntimeError, OSError) as error:
            raise CorruptCheckpointError(f"{path} is damaged, or no SentencePiece model") from error


def _spelt(document: dict[str, Any], path: Path) -> Iterator[tuple[str, Tensor]]:
    tensors = {trained_spelling(name): tensor for name, tensor in flattened(document["model"])}
    check_dtypes(tensors, path)
    yield from tensors.items()


def _equal(one: LazyMatrix, other: LazyMatrix) -> bool:
    columns = slice(0, one.columns)
    bounds = pairwise([*range(0, one.rows, _COMPARED_ROWS), one.rows])
    return all(torch.equal(one.read(slice(*rows), columns), other.read(slice(*rows), columns)) for rows in bounds)


def interleaved_from_halves(args: Mapping[str, Any], rows: int, name: str) -> Tensor:
    """For ``rows`` rows of tensor ``name``, a QKV projection or some groups of one: which row of halves goes where."""
    heads = args["num_attention_heads"]
    kv_heads = args.get("num_attention_heads_kv") or heads
    head_dim = args.get("kv_channels") or args["hidden_size"] // heads
    queries = heads // kv_heads
    groups, rest = divmod(rows, (queries + 2) * head_dim)
    if rest:
        raise CorruptCheckpointError(
            f"{name} has {rows} rows, which are not whole groups of {queries} query heads, a key and a value of "
            f"{head_dim}"
        )
    halves = half_from_interleaved_rows(queries_per_kv=queries, kv_heads=groups, head_dim=head_dim)
    return torch.tensor(halves).argsort()


# Writing


class MegatronLlmFormat(CheckpointFormat):
    """A tracker file, a file of ``torch.save`` for each (tensor, pipeline) parallel rank, ``tokenizer.model``."""

    name = "megatron-llm"

    def recognises(self, directory: Path) -> bool:
        return (directory / TRACKER).is_file()

    def open(self, directory: Path) -> MegatronLlmCheckpoint:
        return MegatronLlmCheckpoint(directory)

    def write(self, directory: Path, publication: Publication, *, advance: Callable[[int], None]) -> None:
        args = {**publication.config, **publication.origin.get("config", {})}
        check_divisible(args, publication.tp, publication.pp)
        true_vocab_size = args.pop("vocab_size")
        multiple = args.setdefault("make_vocab_size_divisible_by", _DIVISIBLE_BY) * publication.tp
        padded = -(-true_vocab_size // multiple) * multiple
        if padded > true_vocab_size:
            publication.report(
                f"the vocabulary of {true_vocab_size} is padded to {padded} rows, as the format demands at tp "
                f"{publication.tp}: the new ones repeat the last"
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
                path = directory / "release" / rank_directory(rank, stage, publication.pp) / WEIGHTS[0]
                path.parent.mkdir(parents=True)
                write_torch_file(path, document, advance=advance)
        (directory / TRACKER).write_text("release", encoding="utf-8")
        if tokenizer := publication.tokenizer_files.get("tokenizer.model"):
            shutil.copyfile(tokenizer, directory / "tokenizer.model")


def rank_directory(rank: int, stage: int, pp: int) -> str:
    return f"mp_rank_{rank:02d}" + (f"_{stage:03d}" if pp > 1 else "")


def check_divisible(args: Mapping[str, Any], tp: int, pp: int) -> None:
    """Refuse a cut that the format does not have.

    Raises:
        LayoutError: names the sizes that work.
    """
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
    """The tensor with its last row repeated up to ``rows``."""
    matrix = tensor.matrix
    missing = rows - matrix.rows
    if missing:
        last = torch.full((missing,), matrix.rows - 1)
        matrix = ConcatenatedRows([matrix, RowsOf(matrix, last)])
    return OutputTensor(tensor.name, (rows, *tensor.shape[1:]), tensor.dtype, matrix)


def _stage(tensors: Mapping[str, OutputTensor], stage: int, pp: int, layers: int) -> dict[str, OutputTensor]:
    """The tensors of one pipeline stage, with their names on it: layers are numbered from 0 again."""
    on_stage = {}
    for name, tensor in tensors.items():
        if match := _LAYER.fullmatch(name):
            if int(match[1]) // layers == stage:
                on_stage[f"encoder.layers.{int(match[1]) % layers}.{match[2]}"] = tensor
        elif stage == (0 if name == EMBEDDING else pp - 1):
            on_stage[name] = tensor
    if pp > 1 and stage == pp - 1 and HEAD not in tensors:
        on_stage[TIED_HEAD] = tensors[EMBEDDING]
    return on_stage


def _rank_model(tensors: Mapping[str, OutputTensor], rank: int, tp: int, *, is_gated: bool) -> dict[str, Any]:
    """One rank's part of ``tensors``, nested as the format has them."""
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
            language_model["lm_head"] = part
        else:
            language_model.setdefault("encoder", {})[name.removeprefix("encoder.")] = part
    return model
