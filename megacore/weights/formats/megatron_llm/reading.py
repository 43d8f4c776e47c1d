"""Reading: the parts of all ranks merged, under the names of trained files, without padding where that is known."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megacore.checkpoint.matrix import LazyMatrix, RowsOf, as_matrix, equal_matrices
from megacore.checkpoint.torch_file import check_dtypes
from megacore.errors import ConfigError, CorruptCheckpointError
from megacore.hookspecs import ModelFamily
from megacore.plugins import default_registry
from megacore.weights.formats.megatron_llm.rank_files import (
    EMBEDDING,
    HALVES,
    HEAD,
    LAYER,
    RECORD,
    TIED_HEAD,
    TRAINING_STATE,
    Cut,
    RankFiles,
    cut_of,
    flattened,
    trained_spelling,
)
from megacore.weights.formats.published import PublishedCheckpoint, Shape
from megacore.weights.rules import half_from_interleaved_rows

_KEPT_ARGS = {"make_vocab_size_divisible_by": int, "model_name": str, "seq_length": int, "tokenizer_type": str}
"""The saved arguments beside the architecture that are kept. The others may hold paths, and keys to services."""


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
        self._drop_tied_head()
        self._family_note: str | None = None

    def check_family(self, family: ModelFamily) -> None:
        registry = default_registry()
        saved_name = self.config.get("model_name")
        if saved_name == family.name or saved_name not in registry.list_families():
            return
        if not set(registry.get_family(saved_name).family.architectures) & set(family.architectures):
            raise ConfigError(
                f"{self.config_file} says that it is a {saved_name}, not a {family.name}; use --model {saved_name}"
            )
        self._family_note = (
            f"the checkpoint says that it is a {saved_name}, and is converted as a {family.name}, as requested"
        )

    def shapes(self, expected: Mapping[str, Shape]) -> dict[str, Shape]:
        return {name: self._shape(name) for name in self._parts}

    def dtype(self, name: str) -> torch.dtype:
        return self._parts[name][0].dtype

    def matrix(self, name: str, shape: Shape) -> LazyMatrix:
        whole = self._whole(name)
        if name in (EMBEDDING, HEAD):
            return RowsOf(whole, slice(0, self.config["vocab_size"]))
        if name.endswith(".query_key_value.weight") and self._files.rotary_layout == HALVES:
            return RowsOf(whole, interleaved_from_halves(self.config, whole.rows, name, self.config_file))
        return whole

    def origin(self) -> dict[str, Any]:
        kept = {name: self.config[name] for name in _KEPT_ARGS if self.config.get(name) is not None}
        for name, value in kept.items():
            if _KEPT_ARGS[name] is int:
                _positive(kept, name, self.config_file)
            elif not isinstance(value, str):
                raise ConfigError(f"{self.config_file}: {name} is {value!r} instead of a name")
        return {"source": "megatron-llm", "config": kept}

    def drop_vocabulary_padding(self, true_vocab_size: int) -> None:
        if not 1 <= true_vocab_size <= self._stored_rows:
            raise ConfigError(
                f"the true vocabulary cannot be of {true_vocab_size}: {self.config_file} holds {self._stored_rows} rows"
            )
        self.config["vocab_size"] = true_vocab_size

    def notes(self) -> list[str]:
        notes = [*self._vocabulary_notes()]
        if self._family_note is not None:
            notes.append(self._family_note)
        if self._files.rotary_layout is None:
            notes.append(
                "the checkpoint does not record its rotary layout; interleaved pairs are assumed. If it "
                "was converted at commit 332cf3c of its system or earlier, run `megacore permute-qkv` on it first"
            )
        if dropped := [key for key in TRAINING_STATE if key in self._files.documents[0][0]]:
            notes.append(f"only the weights are converted; {', '.join(dropped)} are left behind")
        if drifted := self._drifted():
            more = f" and {len(drifted) - 1} more" if len(drifted) > 1 else ""
            notes.append(
                f"{drifted[0]}{more} should be the same on every tensor parallel rank and are not; rank 0's are used, "
                "as by the checkpoint's own system"
            )
        if self._files.iteration == "release" and self._saved_defaults():
            notes.append(
                "layernorm_epsilon and rope_theta are the defaults of the checkpoint's system, whose tool for cutting "
                "checkpoints writes the defaults for every model: check them with `megacore verify`"
            )
        return notes

    def _saved_defaults(self) -> bool:
        """Return whether a training run saved its arguments and those of norm and rotary embedding are defaults."""
        defaults = {"layernorm_epsilon": 1e-5, "rope_theta": 10000.0}
        return "micro_batch_size" in self.config and all(self.config.get(k) in (None, v) for k, v in defaults.items())

    def _drifted(self) -> list[str]:
        """Return the tensors that every rank has whole but that differ between ranks."""
        return [
            name
            for name, parts in self._parts.items()
            if self._cut(name) is None and not all(torch.equal(parts[0], part) for part in parts[1:])
        ]

    def _named_parts(self) -> dict[str, list[Tensor]]:
        """Return the parts of every tensor, one for each tensor-parallel rank."""
        stages = [
            [_named_tensors(document, path) for document, path in zip(documents, paths, strict=True)]
            for documents, paths in zip(self._files.documents, self._files.paths, strict=True)
        ]
        num_layers = [
            1 + max((int(match[1]) for name in ranks[0] if (match := LAYER.fullmatch(name))), default=-1)
            for ranks in stages
        ]
        parts: dict[str, list[Tensor]] = {}
        first_layers = list(accumulate(num_layers, initial=0))[:-1]
        for first_layer, ranks, paths in zip(first_layers, stages, self._files.paths, strict=True):
            for name, tensor in ranks[0].items():
                for rank, path in zip(ranks, paths, strict=True):
                    other = rank.get(name)
                    if other is None or other.shape != tensor.shape or other.dtype != tensor.dtype:
                        raise CorruptCheckpointError(f"{path} and {paths[0]} disagree about tensor {name}")
                whole_name = LAYER.sub(lambda match: f"encoder.layers.{int(match[1]) + first_layer}.{match[2]}", name)  # noqa: B023
                if whole_name in parts:
                    raise CorruptCheckpointError(f"{paths[0]} holds {name}, and an earlier stage does too")
                parts[whole_name] = [rank[name] for rank in ranks]
        return parts

    def _whole(self, name: str) -> LazyMatrix:
        parts = [as_matrix(part) for part in self._parts[name]]
        cut = self._cut(name)
        return parts[0] if cut is None or len(parts) == 1 else cut.merge(parts)

    def _cut(self, name: str) -> Cut | None:
        return cut_of(name, is_gated=bool(self.config.get("glu_activation")))

    def _shape(self, name: str) -> Shape:
        part, has_vocabulary = self._parts[name][0], name in (EMBEDDING, HEAD)
        if part.dim() != 2 and not has_vocabulary:
            return tuple(part.shape)
        whole = self._whole(name)
        is_padded = has_vocabulary and whole.rows == self._stored_rows
        return self.config["vocab_size"] if is_padded else whole.rows, whole.columns

    def _drop_tied_head(self) -> None:
        """Check that the last stage's head is a copy of the embedding, and drop it."""
        if TIED_HEAD not in self._parts:
            return
        head, embedding = self._whole(TIED_HEAD), self._whole(EMBEDDING)
        if (head.rows, head.columns) != (embedding.rows, embedding.columns) or not equal_matrices(head, embedding):
            raise CorruptCheckpointError(
                f"{self.directory}: the head on the last pipeline stage ({TIED_HEAD}) should be the embedding, and it "
                "differs from it: the stages are not of the same model, or were saved at different times"
            )
        del self._parts[TIED_HEAD]

    def _true_vocab_size(self) -> int:
        """Return the number of embedding rows that are tokens: all of them, unless the checkpoint says otherwise."""
        recorded = self._files.documents[0][0].get(RECORD, {}).get("true_vocab_size")
        if recorded is not None:
            if not isinstance(recorded, int) or not 1 <= recorded <= self._stored_rows:
                raise CorruptCheckpointError(
                    f"{self.config_file} records a vocabulary of {recorded!r} and holds {self._stored_rows} rows"
                )
            return recorded
        extra = self.config.get("vocab_extra_ids") or self.config.get("vocab_extra_ids_list")
        if self.config.get("new_tokens") is False and not extra:  # the saved form of --no_new_tokens
            return min(self._num_tokens() or self._stored_rows, self._stored_rows)
        return self._stored_rows

    def _vocabulary_notes(self) -> Iterator[str]:
        dropped = self._stored_rows - self.config["vocab_size"]
        if dropped:
            yield f"the last {dropped} rows of the vocabulary are padding and were dropped"
            return
        tokens = self._num_tokens()
        if tokens is None:
            yield (
                f"all {self._stored_rows} rows of the vocabulary are kept, since the checkpoint does not say whether "
                "the last are padding. If they are, give the true number with --true-vocab-size"
            )
        elif tokens < self._stored_rows:
            yield (
                f"all {self._stored_rows} rows of the vocabulary are kept, although tokenizer.model has {tokens} "
                "tokens: the others may be new tokens or padding. To drop padding, give the true number with "
                "--true-vocab-size"
            )

    def _num_tokens(self) -> int | None:
        """Return the number of tokens in ``tokenizer.model``; ``None`` if there is no such file."""
        path = self.directory / "tokenizer.model"
        if not path.is_file():
            return None
        from sentencepiece import SentencePieceProcessor

        try:
            return SentencePieceProcessor(model_file=str(path)).vocab_size()
        except (RuntimeError, OSError) as error:
            raise CorruptCheckpointError(f"{path} is damaged, or no SentencePiece model") from error


def _named_tensors(document: dict[str, Any], path: Path) -> dict[str, Tensor]:
    tensors = {trained_spelling(name): tensor for name, tensor in flattened(document["model"])}
    check_dtypes(tensors, path)
    return tensors


def interleaved_from_halves(args: Mapping[str, Any], rows: int, name: str, file: Path) -> Tensor:
    """Return the order of ``rows`` rows of QKV projection ``name`` that turns rotary halves into interleaved pairs.

    Raises:
        ConfigError: if ``args``, the saved arguments of ``file``, do not describe the heads.
        CorruptCheckpointError: if the rows are not whole groups.
    """
    queries, head_dim = _heads(args, file)
    groups, rest = divmod(rows, (queries + 2) * head_dim)
    if rest:
        raise CorruptCheckpointError(
            f"{name} has {rows} rows, which are not whole groups of {queries} query heads, a key and a value of "
            f"{head_dim}"
        )
    halves = half_from_interleaved_rows(queries_per_kv=queries, kv_heads=groups, head_dim=head_dim)
    return torch.tensor(halves).argsort()


def _heads(args: Mapping[str, Any], file: Path) -> tuple[int, int]:
    """Return the number of query heads of each key-value head, and the number of rows of a head."""
    heads = _positive(args, "num_attention_heads", file)
    kv_heads = heads if args.get("num_attention_heads_kv") is None else _positive(args, "num_attention_heads_kv", file)
    if heads % kv_heads:
        raise ConfigError(f"{file}: num_attention_heads {heads} is no multiple of num_attention_heads_kv {kv_heads}")
    if args.get("kv_channels") is not None:
        head_dim, setting = _positive(args, "kv_channels", file), "kv_channels"
    else:
        head_dim, setting = _positive(args, "hidden_size", file) // heads, "hidden_size // num_attention_heads"
    if head_dim == 0 or head_dim % 2:
        raise ConfigError(f"{file}: {setting} is {head_dim}, and rotary pairs need an even number")
    return heads // kv_heads, head_dim


def _positive(args: Mapping[str, Any], name: str, file: Path) -> int:
    if (value := args.get(name)) is None:
        raise ConfigError(f"{file} lacks {name!r} among its args")
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{file}: {name} is {value!r} instead of a positive number")
    return value
