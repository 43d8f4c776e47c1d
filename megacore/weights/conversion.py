"""Conversion of a published checkpoint to the native format."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megacore.checkpoint import Layout, Manifest, ModelDescription, Parameter, write_checkpoint
from megacore.checkpoint.matrix import Cast, LazyMatrix, equal_matrices
from megacore.checkpoint.resized_embeddings import ExtendedTokenizer
from megacore.config import ModelConfig
from megacore.errors import ConfigError, WeightMapError
from megacore.plugins import Family, get_family
from megacore.weights.binding import BoundMap, bind
from megacore.weights.formats import PublishedCheckpoint, format_for, recognise
from megacore.weights.hub import provenance

# The fields of a configuration that differ within one published size, for example by added tokens or fine-tuning.
_SIZE_INDEPENDENT_FIELDS = {"vocab_size", "max_position_embeddings", "norm_eps", "rope_theta", "rope_scaling"}


def convert(
    model: str | Family,
    source_directory: Path | str,
    out: Path | str,
    *,
    source: str | None = None,
    size: str | None = None,
    dtype: torch.dtype | None = None,
    tp: int = 1,
    pp: int = 1,
    true_vocab_size: int | None = None,
    add_tokens: Path | str | None = None,
    report: Callable[[str], None] = lambda note: None,
    advance: Callable[[int], None] = lambda num_bytes: None,
) -> Manifest:
    """Convert the checkpoint in ``source_directory`` to a native one in ``out``, cut over ``tp`` × ``pp`` ranks.

    Tensors stream from file to file: no model is built, and memory holds a few chunks at a time.

    Args:
        model: The family, or its name.
        source_directory: A published checkpoint.
        out: The directory to create; it must not exist.
        source: The format of the checkpoint, for example ``"hf"``; by default recognised by its files.
        size: The published size that the checkpoint must have, for example ``"7"``; by default any.
        dtype: The dtype to convert to; by default every tensor keeps its own.
        tp: Tensor-parallel size to cut for.
        pp: Pipeline-parallel size to cut for.
        true_vocab_size: Number of vocabulary rows that are tokens, in a format that pads without recording it.
        add_tokens: A dataset or a tokenizer's directory. Embedding and head get a row for each of its new tokens, the
            mean of the rows before the first of them; spare rows are used first.
        report: Called with each note on assumptions and omissions, which the checkpoint's history has too.
        advance: Called with the number of bytes written, after every few megabytes.

    Raises:
        MegacoreError: a subclass for each reason; nothing is left in ``out``.
    """
    family = get_family(model) if isinstance(model, str) else model
    directory = Path(source_directory)
    opened = open_published(
        family, directory, source=source, size=size, dtype=dtype, true_vocab_size=true_vocab_size, report=report
    )
    details: dict[str, Any] = {"notes": opened.notes} if opened.notes else {}
    details |= provenance(directory)
    parameters, config, tokenizer_files = opened.parameters, opened.config, opened.published.tokenizer_files()
    if add_tokens is not None:
        added = ExtendedTokenizer.read(add_tokens, known=tokenizer_files)
        parameters, tokenizer_files = added.resize_embeddings(parameters), added.tokenizer_files(tokenizer_files)
        config = dataclasses.replace(config, vocab_size=added.vocab_size(config.vocab_size))
        details |= {"added_tokens": str(added.directory), "vocab_size": config.vocab_size}
    description = ModelDescription(family=family.name, config=config.to_dict(), origin=opened.published.origin()).after(
        "convert", source=str(directory), format=opened.source, plugin=family.label, **details
    )
    return write_checkpoint(
        Path(out),
        parameters,
        description,
        layout=Layout.even(tp=tp, pp=pp, num_layers=opened.config.num_layers),
        tokenizer_files=tokenizer_files,
        advance=advance,
    )


@dataclass(frozen=True, kw_only=True)
class PublishedModel:
    """A published checkpoint in format ``source``, and its native parameters by name, which are read lazily."""

    published: PublishedCheckpoint
    source: str
    config: ModelConfig
    parameters: Mapping[str, Parameter]
    notes: list[str]


def open_published(
    family: Family,
    directory: Path,
    *,
    source: str | None,
    size: str | None = None,
    dtype: torch.dtype | None,
    true_vocab_size: int | None,
    report: Callable[[str], None],
) -> PublishedModel:
    """Open the checkpoint in ``directory``, which must be of ``family``. The arguments are those of ``convert``."""
    source = source or recognise(directory)
    published = format_for(family.family, source).open(directory)
    if true_vocab_size is not None:
        published.drop_vocabulary_padding(true_vocab_size)
    config = _read_config(family, published, source)
    if size is not None:
        _check_size(family, size, config, published.config_file)
    parameters = _read_parameters(bind(family, config, source), published, dtype)
    notes = published.notes()
    for note in notes:
        report(note)
    return PublishedModel(published=published, source=source, config=config, parameters=parameters, notes=notes)


def _read_config(family: Family, published: PublishedCheckpoint, source: str) -> ModelConfig:
    """Return the model configuration. Raises :class:`ConfigError` for another family, or what it does not implement."""
    published.check_family(family.family)
    try:
        return family.family.config_from_source(published.config, source)
    except KeyError as error:
        raise ConfigError(f"{published.config_file} lacks {error.args[0]!r}") from error
    except (TypeError, ValueError, ArithmeticError) as error:  # a value of an unusable type or range
        raise ConfigError(f"{published.config_file} does not describe a model: {error}") from error


def _check_size(family: Family, size: str, config: ModelConfig, config_file: Path) -> None:
    """Raise :class:`ConfigError` if ``config`` is not of the published ``size``: the preset is compared, never used."""
    preset = family.preset(size)
    differing = [
        f"{field.name} {getattr(config, field.name)!r} instead of {getattr(preset, field.name)!r}"
        for field in dataclasses.fields(preset)
        if field.name not in _SIZE_INDEPENDENT_FIELDS and getattr(config, field.name) != getattr(preset, field.name)
    ]
    if differing:
        raise ConfigError(f"{config_file} does not describe a {family.name} of size {size}: {', '.join(differing)}")


def _read_parameters(
    bound: BoundMap, published: PublishedCheckpoint, dtype: torch.dtype | None
) -> dict[str, Parameter]:
    """Return the native parameters. Raises :class:`WeightMapError` if the tensors are not those of the model."""
    expected = bound.source_shapes()
    found = published.shapes(expected)
    bound.check_sources(found, str(published.directory))
    _check_aliases(bound, published, found)

    def parameter(name: str) -> Parameter:
        rule = bound.rules[name]
        dtypes = {published.dtype(part) for part in rule.sources}
        parts: list[LazyMatrix] = [published.matrix(part, expected[part]) for part in rule.sources]
        if len(dtypes) > 1:
            if dtype is None:
                raise WeightMapError(
                    f"{', '.join(rule.sources)} become one parameter but have different dtypes; choose one with --dtype"
                )
            parts = [Cast(part, dtype, name) for part, name in zip(parts, rule.sources, strict=True)]
        return Parameter(bound.specs[name], rule.to_native(parts, bound.order), dtype or dtypes.pop())

    return {name: parameter(name) for name in bound.rules}


def _check_aliases(bound: BoundMap, published: PublishedCheckpoint, found: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse an alias that differs from its original: such a head is not tied."""
    for alias, original in bound.weight_map.aliases.items():
        if alias not in found:
            continue
        shape = found[original]
        if found[alias] != shape or not equal_matrices(
            published.matrix(alias, shape), published.matrix(original, shape)
        ):
            raise WeightMapError(
                f"{published.directory}: {published.config_file.name} ties {alias} to {original}, but the two tensors "
                'differ. If the head has weights of its own, set "tie_word_embeddings": false there'
            )
