"""The files of all ranks: their paths and contents, tensor names and cuts, and the objects a pickle may contain."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from torch import Tensor

from megacore.checkpoint.matrix import ColumnsOf, ConcatenatedColumns, ConcatenatedRows, LazyMatrix, RowsOf
from megacore.checkpoint.torch_file import Foreign, foreign, read_torch_file
from megacore.errors import CheckpointError, CorruptCheckpointError

TRACKER = "latest_checkpointed_iteration.txt"
WEIGHTS = ("model_optim_rng.pt", "model_rng.pt")  # a rank's file; the second with a distributed optimizer
TRAINING_STATE = ("optimizer", "opt_param_scheduler", "rng_state")  # only the run that saved them can use these keys

RECORD = "megacore"
"""A key that megacore adds to each file for facts that the format does not record; its own system ignores the key."""

INTERLEAVED, HALVES = "interleaved", "halves"
"""The rotary pairs in a head: (2i, 2i + 1), or (i, i + head_dim / 2) as until the system's commit 332cf3c."""

EMBEDDING = "embedding.word_embeddings.weight"
HEAD = "lm_head"
TIED_HEAD = "word_embeddings_for_head.weight"  # the last stage's copy of the embedding

_MAX_RANKS = 100_000
_RANK = re.compile(r"mp_rank_(\d{2,})(?:_(\d{3,}))?")
LAYER = re.compile(r"encoder\.layers\.(\d+)\.(.+)")
_ENUMS = {"rotary": ("PositionEmbeddingType", 1), "absolute": ("PositionEmbeddingType", 2)}
_ALLOWED = (
    argparse.Namespace,
    *(
        foreign(f"megatron.{module}.enums.{name}")
        for module in ("core", "model")
        for name in ("AttnMaskType", "AttnType", "LayerType", "ModelType", "PositionEmbeddingType")
    ),
    # The state of numpy's random numbers, and numpy scalars among the arguments, which are not used here.
    *(foreign(f"numpy.{core}.multiarray.{name}") for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
    foreign("numpy.ndarray"),
    foreign("numpy.dtype"),
)
"""The classes that a file may contain besides tensors, containers, numbers and strings."""


# Cuts over tensor-parallel ranks


@dataclass(frozen=True)
class Cut:
    """A way to cut a tensor over ranks: ``part(matrix, tp, rank)``, and ``merge(parts)``, its inverse."""

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
"""The cut of a gated MLP: each rank has its part of the upper half above its part of the lower half."""


def cut_of(name: str, *, is_gated: bool) -> Cut | None:
    """Return the cut of tensor ``name``; ``None`` for one that every rank has whole."""
    if name in (EMBEDDING, HEAD, TIED_HEAD) or name.endswith(".query_key_value.weight"):
        return ROWS
    if name.endswith((".self_attention.dense.weight", ".mlp.dense_4h_to_h.weight")):
        return COLUMNS
    if name.endswith(".mlp.dense_h_to_4h.weight"):
        return BOTH_HALVES if is_gated else ROWS
    return None


@dataclass(frozen=True)
class RankFiles:
    """The opened files of a checkpoint; ``documents[stage][rank]`` is the content of one."""

    directory: Path
    paths: list[list[Path]]
    documents: list[list[dict[str, Any]]]

    @classmethod
    def open(cls, directory: Path) -> RankFiles:
        """Open the files of the iteration that the tracker of ``directory`` names.

        Raises:
            CheckpointError: if one is missing, or contains a class that is not allowed.
            CorruptCheckpointError: if one is damaged, or they are not of one checkpoint.
        """
        folder = tracked_directory(directory)
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
        if not (isinstance(tp, int) and isinstance(pp, int) and 1 <= tp * pp <= _MAX_RANKS):
            raise CorruptCheckpointError(f"the args in {folder} say that it is cut over tp {tp!r} and pp {pp!r} ranks")
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
        """The iteration number, or ``"release"``."""
        return self.documents[0][0].get("iteration")

    @property
    def args(self) -> dict[str, Any]:
        """The saved arguments, with strings in place of the system's enumerations."""
        return {name: _plain(value) for name, value in vars(self.documents[0][0]["args"]).items()}

    @property
    def rotary_layout(self) -> str | None:
        """The recorded layout of rotary pairs; ``None`` if megacore did not write the files."""
        layout: str | None = self.documents[0][0].get(RECORD, {}).get("rotary_layout")
        return layout


def tracked_directory(directory: Path) -> Path:
    """Return the directory of ranks that the tracker names."""
    tracker = directory / TRACKER
    if not tracker.is_file():
        raise CheckpointError(f"{directory} has no {TRACKER}: it is not a checkpoint in the format megatron-llm")
    iteration = tracker.read_text(encoding="utf-8", errors="replace").strip()
    if iteration != "release" and not iteration.isdecimal():
        raise CorruptCheckpointError(f"{tracker} says {iteration[:40]!r} instead of an iteration or 'release'")
    folder = directory / (iteration if iteration == "release" else f"iter_{int(iteration):07d}")
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
    return " and ".join(
        f"{verb} {', '.join(f'(tp {rank}, pp {stage})' for rank, stage in sorted(places))}"
        for verb, places in (("lacks", expected - found), ("also has", found - expected))
        if places
    )


def _plain(value: Any) -> Any:
    if not isinstance(value, Foreign):
        return value
    member = (value.qualified_name.rpartition(".")[2], *value.arguments)
    return next((name for name, known in _ENUMS.items() if known == member), ".".join(map(str, member)))


def flattened(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a nested dictionary, each with the path to it as its name."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from flattened(value, f"{prefix}{key}.")
        elif isinstance(value, Tensor):
            yield f"{prefix}{key}", value


def trained_spelling(name: str) -> str:
    """Return the name of a tensor of ``model`` in trained files, from either spelling."""
    name = name.removeprefix("language_model.")
    name = re.sub(r"^transformer\.", "encoder.", name)
    return re.sub(r"^(encoder\.layers\.\d+)\.attention\.", r"\1.self_attention.", name)
