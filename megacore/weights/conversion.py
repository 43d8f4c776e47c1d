"""Converting a published checkpoint to the native format."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from megacore.checkpoint import Layout, Manifest, Parameter, history_entry, write_checkpoint
from megacore.checkpoint.matrix import Cast, LazyMatrix
from megacore.config import ModelConfig
from megacore.errors import ConfigError, UnsupportedSourceError, WeightMapError
from megacore.plugins import Family, default_registry, get_family
from megacore.weights.binding import BoundMap, bind
from megacore.weights.hf import HuggingFaceSource

_COMPARED_ROWS = 1024


def convert(
    model: str | Family,
    source_directory: Path | str,
    out: Path | str,
    *,
    source: str = "hf",
    dtype: torch.dtype | None = None,
    tp: int = 1,
    pp: int = 1,
    advance: Callable[[int], None] = lambda num_bytes: None,
) -> Manifest:
    """Convert the checkpoint in ``source_directory`` to a native one in ``out``, cut over ``tp`` × ``pp`` ranks.

    Tensors stream from file to file: no model is built, and memory holds a few chunks at a time.

    Args:
        model: the family, or its name.
        source_directory: a checkpoint in format ``source``.
        out: is created; must not exist.
        source: the format; ``"hf"`` is a Hugging Face directory.
        dtype: to convert to; by default every tensor keeps its own.
        tp: tensor-parallel size to cut for.
        pp: pipeline-parallel size to cut for.
        advance: is told of every few bytes written.

    Raises:
        MegacoreError: in one of its kinds, for whatever does not fit; nothing is left in ``out``.
    """
    family = get_family(model) if isinstance(model, str) else model
    if source not in family.family.sources:
        raise UnsupportedSourceError(
            f"{family.name} reads the formats {', '.join(family.family.sources)}, not {source!r}"
        )
    opened = HuggingFaceSource(Path(source_directory))
    config = read_published_config(family, opened)
    bound = bind(family, config, source)
    bound.check_sources(opened.shapes, str(opened.directory))
    _check_aliases(bound, opened)
    return write_checkpoint(
        Path(out),
        {name: _parameter(bound, name, opened, dtype) for name in bound.rules},
        family=family.name,
        config=config.to_dict(),
        layout=Layout.even(tp=tp, pp=pp, num_layers=config.num_layers),
        tokenizer_files=opened.tokenizer_files(),
        origin=opened.origin(),
        history=(history_entry("convert", source=str(opened.directory), format=source, plugin=family.label),),
        advance=advance,
    )


def read_published_config(family: Family, source: HuggingFaceSource) -> ModelConfig:
    """The model configuration of ``source``, as ``family`` reads it.

    Raises:
        ConfigError: when the checkpoint is of another family, or asks for what the family does not implement.
    """
    published = source.config
    architectures = published.get("architectures") or []
    if not isinstance(architectures, list):
        raise ConfigError(f"{source.directory / 'config.json'}: architectures is {architectures!r}, not a list")
    if not set(architectures) & set(family.family.architectures):
        others = sorted({name for arch in architectures for name in default_registry().families_for_architecture(arch)})
        hint = f"; use --model {others[0]}" if others else ""
        raise ConfigError(
            f"{source.directory / 'config.json'} is of architecture {', '.join(architectures) or 'none named'}, and "
            f"{family.name} reads {', '.join(family.family.architectures)}{hint}"
        )
    if "quantization_config" in published:
        raise ConfigError(f"{source.directory} holds quantized weights; convert the original checkpoint instead")
    try:
        return family.family.config_from_source(published, "hf")
    except KeyError as error:
        raise ConfigError(f"{source.directory / 'config.json'} lacks {error.args[0]!r}") from error
    except (TypeError, ValueError, ArithmeticError) as error:  # a value that is of no use where it stands
        raise ConfigError(f"{source.directory / 'config.json'} does not describe a model: {error}") from error


def _parameter(bound: BoundMap, name: str, source: HuggingFaceSource, dtype: torch.dtype | None) -> Parameter:
    rule = bound.rules[name]
    dtypes = {source.dtype(part) for part in rule.sources}
    parts = [source.matrix(part) for part in rule.sources]
    if len(dtypes) > 1:
        if dtype is None:
            raise WeightMapError(
                f"{', '.join(rule.sources)} become one parameter but have different dtypes; choose one with --dtype"
            )
        return Parameter(bound.specs[name], rule.to_native([Cast(part, dtype) for part in parts], bound.order), dtype)
    return Parameter(bound.specs[name], rule.to_native(parts, bound.order), dtype or dtypes.pop())


def _equal(one: LazyMatrix, other: LazyMatrix) -> bool:
    """Whether two matrices of one shape are equal, a few rows at a time."""
    columns = slice(0, one.columns)
    blocks = (slice(start, min(start + _COMPARED_ROWS, one.rows)) for start in range(0, one.rows, _COMPARED_ROWS))
    return all(torch.equal(one.read(rows, columns), other.read(rows, columns)) for rows in blocks)


def _check_aliases(bound: BoundMap, source: HuggingFaceSource) -> None:
    """Tensors that repeat another one must really repeat it: a head that differs is not tied."""
    for alias, original in bound.weight_map.aliases.items():
        if alias not in source.shapes:
            continue
        if source.shapes[alias] != source.shapes[original] or not _equal(source.matrix(alias), source.matrix(original)):
            raise WeightMapError(
                f"{source.directory}: config.json ties {alias} to {original}, but the two tensors differ. "
                'If the head has weights of its own, set "tie_word_embeddings": false in config.json'
            )
