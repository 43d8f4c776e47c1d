"""Meta's own format: ``params.json``, one ``consolidated.NN.pth`` a model-parallel rank, ``tokenizer.model``.

Every file holds a dictionary of the same names. No file records how a tensor is cut over the ranks; it follows from the
fairscale layers of Meta's loaders:

=============================  ==================================  ========================================
tensors                        layer                               cut
=============================  ==================================  ========================================
wq, wk, wv, w1, w3, output     ``ColumnParallelLinear``            on their rows
wo, w2                         ``RowParallelLinear``               on their columns
tok_embeddings                 ``ParallelEmbedding``, and in       on its columns, and in later generations
                               later ones                          on its rows (the vocabulary)
                               ``VocabParallelEmbedding``
norms                          ``RMSNorm``                         none
=============================  ==================================  ========================================

Reading infers the cut from the shapes, which distinguish all of these. Writing follows this table and cuts the
embedding on its columns, as the loaders of the first two generations expect.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megacore.checkpoint.input_files import read_json_object
from megacore.checkpoint.matrix import ColumnsOf, ConcatenatedColumns, ConcatenatedRows, LazyMatrix, RowsOf, as_matrix
from megacore.checkpoint.safetensors_file import OutputTensor
from megacore.checkpoint.torch_file import check_dtypes, read_torch_file, write_torch_file
from megacore.errors import CheckpointError, ConfigError, CorruptCheckpointError, LayoutError
from megacore.hookspecs import ModelFamily
from megacore.weights.formats.published import CheckpointFormat, Publication, PublishedCheckpoint, Shape
from megacore.weights.standard_decoder.meta import merged_params

PARAMS_FILE = "params.json"
TOKENIZER_FILE = "tokenizer.model"
HEAD = "output.weight"

_SHARD = re.compile(r"consolidated\.(\d+)\.pth")
_MAX_SHARDS = 10_000
_CUT_ON_ROWS = ("wq", "wk", "wv", "w1", "w3", "output")
_CUT_ON_COLUMNS = ("wo", "w2", "tok_embeddings")


class MetaCheckpoint(PublishedCheckpoint):
    """A directory in Meta's format, opened for reading; its files are memory-mapped."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.config_file = directory / PARAMS_FILE
        if not self.config_file.is_file():
            raise CheckpointError(f"{directory} has no {PARAMS_FILE}: it is not a checkpoint in Meta's format")
        self._params = read_json_object(self.config_file)
        self._paths = _shard_paths(directory)
        self._shards = [_read_shard(path) for path in self._paths]
        for path, shard in zip(self._paths, self._shards, strict=True):
            if differing := sorted(shard.keys() ^ self._shards[0].keys()):
                raise CorruptCheckpointError(
                    f"{path.name} and {self._paths[0].name} of {directory} do not hold the same tensors: only one of "
                    f"them has {', '.join(differing[:8])}. Are they of one model?"
                )
        self.config = {**self._params, "vocab_size": self._vocab_size()}

    def check_family(self, family: ModelFamily) -> None:
        """Accept any family, as the format names none; only the configuration can be checked."""

    def shapes(self, expected: Mapping[str, Shape]) -> dict[str, Shape]:
        self._check_number_of_shards(expected)
        return {name: self._whole_shape(name, expected.get(name)) for name in self._shards[0]}

    def dtype(self, name: str) -> torch.dtype:
        for path, shard in zip(self._paths, self._shards, strict=True):
            check_dtypes({name: shard[name]}, path)
        dtypes = {shard[name].dtype for shard in self._shards}
        if len(dtypes) > 1:
            raise CorruptCheckpointError(
                f"{name} has different dtypes in the files of {self.directory}: {', '.join(sorted(map(str, dtypes)))}"
            )
        return dtypes.pop()

    def matrix(self, name: str, shape: Shape) -> LazyMatrix:
        tensors = [shard[name] for shard in self._shards]
        cut = _cut_by_shape([tuple(tensor.shape) for tensor in tensors], shape)
        parts = [as_matrix(tensor) for tensor in tensors]
        if cut == 0:
            return ConcatenatedRows(parts)
        if cut == 1:
            return ConcatenatedColumns(parts)
        for path, tensor in zip(self._paths, tensors, strict=True):
            if not torch.equal(tensor, tensors[0]):
                raise CorruptCheckpointError(
                    f"{path} and {self._paths[0]} each have the whole of {name}, and differ: are they of one model?"
                )
        return parts[0]

    def origin(self) -> dict[str, Any]:
        return {"source": MetaFormat.name, "config": self._params}

    def tokenizer_files(self) -> dict[str, Path]:
        """Return the tokenizer's files; Meta's downloads have one ``tokenizer.model`` beside the directories."""
        beside = self._tokenizer_beside()
        return super().tokenizer_files() or ({TOKENIZER_FILE: beside} if beside.is_file() else {})

    def notes(self) -> list[str]:
        beside = self._tokenizer_beside()
        if beside not in self.tokenizer_files().values():
            return []
        return [f"the tokenizer is {beside}, from beside the checkpoint's directory: is it the model's?"]

    def _tokenizer_beside(self) -> Path:
        return self.directory.absolute().parent / TOKENIZER_FILE

    def _vocab_size(self) -> int:
        """Return ``vocab_size`` of ``params.json`` or, if that is absent or -1, the number of rows of the head."""
        vocab_size: int | None = self._params.get("vocab_size")
        if vocab_size is not None and vocab_size != -1:
            return vocab_size
        if HEAD not in self._shards[0]:
            raise CheckpointError(
                f"{self.config_file} does not say the size of the vocabulary, and {self._paths[0].name} has no {HEAD} "
                "to infer it from"
            )
        return sum(len(shard[HEAD]) if shard[HEAD].dim() else 0 for shard in self._shards)

    def _whole_shape(self, name: str, expected: Shape | None) -> Shape:
        """Return the shape of tensor ``name`` merged to ``expected`` or, if that is impossible, merged as is usual."""
        shapes = [tuple(shard[name].shape) for shard in self._shards]
        if expected is not None and _cut_by_shape(shapes, expected) is not _NO_CUT:
            return expected
        usual = _usual_cut(name)
        if len(shapes) > 1 and usual is not None and usual < len(shapes[0]):
            return _merged(shapes, usual) or shapes[0]
        return shapes[0]

    def _check_number_of_shards(self, expected: Mapping[str, Shape]) -> None:
        """Raise an error if the shapes of the layers' matrices show that files are missing."""
        ratios = {
            math.prod(shape) / max(1, self._shards[0][name].numel())
            for name, shape in expected.items()
            if name.startswith("layers.") and len(shape) == 2 and name in self._shards[0]
        }
        ranks, found = (ratios.pop() if len(ratios) == 1 else 0.0), len(self._shards)
        vectors_fit = all(
            tuple(self._shards[0][name].shape) == shape
            for name, shape in expected.items()
            if len(shape) == 1 and name in self._shards[0]
        )
        if ranks.is_integer() and ranks > 1 and ranks != found and vectors_fit:
            names = (_shard_name(rank) for rank in range(int(ranks)))
            missing = _first_few(name for name in names if not (self.directory / name).is_file())
            hint = f": {missing} missing" if missing else ""
            raise CheckpointError(
                f"the tensors in {self.directory} are cut over {int(ranks)} ranks, and there are {found} files{hint}"
            )


class MetaFormat(CheckpointFormat):
    """A directory with ``params.json``, ``consolidated.NN.pth`` of any number of ranks, and the tokenizer's files."""

    name = "meta"
    marker_file = PARAMS_FILE

    def weight_files(self, directory: Path) -> Iterable[Path]:
        return directory.glob("consolidated.*.pth")

    def open(self, directory: Path) -> MetaCheckpoint:
        return MetaCheckpoint(directory)

    def write(self, directory: Path, publication: Publication, *, advance: Callable[[int], None]) -> None:
        if publication.pp != 1:
            raise ConfigError(f"the format {self.name} is not cut over pipeline stages: leave out --pp")
        _check_cut(publication)
        for rank in range(publication.tp):
            shard = {tensor.name: _part(tensor, publication.tp, rank) for tensor in publication.tensors}
            write_torch_file(directory / _shard_name(rank), shard, advance=advance)
        params = merged_params(publication.origin.get("config", {}), publication.config)
        (directory / PARAMS_FILE).write_text(json.dumps(params) + "\n", encoding="utf-8")
        for name, path in publication.tokenizer_files.items():
            shutil.copyfile(path, directory / name)


def _shard_name(rank: int) -> str:
    return f"consolidated.{rank:02d}.pth"


def _shard_paths(directory: Path) -> list[Path]:
    """Return the files of all ranks, in order. Raises :class:`CheckpointError` for a gap or a second file of a rank."""
    found: dict[int, Path] = {}
    for path in sorted(directory.iterdir()):
        if (match := _SHARD.fullmatch(path.name)) is None:
            continue
        if (rank := int(match[1])) >= _MAX_SHARDS:
            raise CheckpointError(f"{path} has too large a number: at most {_MAX_SHARDS} files are read")
        if rank in found:
            raise CheckpointError(f"{directory} has two files of rank {rank}, {found[rank].name} and {path.name}")
        found[rank] = path
    if not found:
        raise CheckpointError(f"{directory} has {PARAMS_FILE}, but no {_shard_name(0)}: where are the weights?")
    if missing := _first_few(_shard_name(rank) for rank in range(max(found)) if rank not in found):
        raise CheckpointError(f"{directory} has {found[max(found)].name}, but {missing} missing")
    return [found[rank] for rank in sorted(found)]


def _first_few(names: Iterable[str]) -> str:
    """Return at most eight of ``names`` as text."""
    names = iter(names)
    few = ", ".join(islice(names, 8))
    return f"{few} and more" if next(names, None) is not None else few


def _read_shard(path: Path) -> dict[str, Tensor]:
    shard = read_torch_file(path)
    if not isinstance(shard, dict) or not all(isinstance(tensor, Tensor) for tensor in shard.values()):
        raise CorruptCheckpointError(f"{path} is not in Meta's format: it holds something else than tensors by name")
    return shard


# Cuts

_NO_CUT = -1


def _cut_by_shape(shapes: Sequence[Shape], whole: Shape) -> int | None:
    """Return the dimension along which parts of ``shapes`` are concatenated to shape ``whole``.

    It is ``None`` if each part is the whole, and ``_NO_CUT`` if no dimension fits.
    """
    if all(shape == whole for shape in shapes):
        return None
    return next((dim for dim in range(len(whole)) if _merged(shapes, dim) == whole), _NO_CUT)


def _merged(shapes: Sequence[Shape], dim: int) -> Shape | None:
    """Return the shape of parts concatenated along ``dim``; ``None`` if they cannot be concatenated."""
    rests = {(*shape[:dim], *shape[dim + 1 :]) for shape in shapes}
    if len(rests) > 1 or any(len(shape) <= dim for shape in shapes):
        return None
    return (*shapes[0][:dim], sum(shape[dim] for shape in shapes), *shapes[0][dim + 1 :])


def _usual_cut(name: str) -> int | None:
    """Return the dimension that tensor ``name`` is cut along in the table above; ``None`` if it is not cut."""
    module = name.removesuffix(".weight").rpartition(".")[2]
    return 0 if module in _CUT_ON_ROWS else 1 if module in _CUT_ON_COLUMNS else None


def _part(tensor: OutputTensor, tp: int, rank: int) -> OutputTensor:
    """Return the part of ``tensor`` that rank ``rank`` of ``tp`` holds."""
    cut = _usual_cut(tensor.name)
    if cut is None or tp == 1:
        return tensor
    size = tensor.shape[cut] // tp
    part = slice(rank * size, (rank + 1) * size)
    matrix = RowsOf(tensor.matrix, part) if cut == 0 else ColumnsOf(tensor.matrix, part)
    return OutputTensor(tensor.name, (*tensor.shape[:cut], size, *tensor.shape[cut + 1 :]), tensor.dtype, matrix)


def _check_cut(publication: Publication) -> None:
    """Raise :class:`LayoutError`, listing the numbers that work, if the ranks do not divide all that is cut."""
    sizes = {"n_heads": publication.config["n_heads"], "n_kv_heads": publication.config["n_kv_heads"]}
    for tensor in publication.tensors:
        if (cut := _usual_cut(tensor.name)) is not None:
            sizes[f"{'rows' if cut == 0 else 'columns'} of {tensor.name}"] = tensor.shape[cut]
    if uneven := [name for name, size in sizes.items() if size % publication.tp]:
        working = [n for n in range(1, min(sizes.values()) + 1) if not any(size % n for size in sizes.values())]
        raise LayoutError(
            f"Meta's format is cut evenly, and {publication.tp} ranks do not divide the {sizes[uneven[0]]} of "
            f"{uneven[0]}. Numbers of ranks that work: {', '.join(map(str, working))}"
        )
