"""Cutting a checkpoint for other tensor and pipeline parallel sizes, in either direction."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from megacore.checkpoint.history import history_entry
from megacore.checkpoint.layout import Layout
from megacore.checkpoint.manifest import Manifest
from megacore.checkpoint.new_rows import AddedTokens
from megacore.checkpoint.reading import Checkpoint, checked_meanwhile
from megacore.checkpoint.safetensors_file import DTYPES
from megacore.checkpoint.writing import Parameter, write_checkpoint


def split(
    checkpoint: Path | str,
    out: Path | str,
    *,
    tp: int = 1,
    pp: int = 1,
    add_tokens: Path | str | None = None,
    advance: Callable[[int], None] = lambda num_bytes: None,
) -> Manifest:
    """Write ``checkpoint`` to ``out``, cut over ``tp`` × ``pp`` ranks; 1 × 1 merges it. Tensors keep their bytes.

    With ``add_tokens``, a dataset or a tokenizer's directory, embedding and head get rows for the tokens that the
    tokenizer has beyond the model's, each the mean of the rows before the first of them. Rows to spare are used for
    them.

    The digests of ``checkpoint`` are checked on the way: damaged weights are not passed on.

    Raises:
        DataError: when ``add_tokens`` is no tokenizer, or not the model's with tokens added.
        LayoutError: when the model cannot be cut so; the message names sizes that work.
        CheckpointError, CorruptCheckpointError: for the checkpoint that is read.
        OutputError, DiskFullError: for the one that is written.
    """
    source = Checkpoint(checkpoint)
    manifest = source.manifest
    num_layers = manifest.layout.num_layers
    parameters = {
        name: Parameter(entry.spec, source.matrix(name), DTYPES[entry.dtype])
        for name, entry in manifest.parameters.items()
    }
    config, tokenizer_files, details = manifest.config, source.tokenizer_files(), {}
    if add_tokens is not None:
        added = AddedTokens.read(add_tokens, known=tokenizer_files)
        parameters, tokenizer_files = added.grow(parameters), added.tokenizer_files(tokenizer_files)
        config = config | {"vocab_size": added.vocab_size(config["vocab_size"])}
        details = {"added_tokens": str(added.directory), "vocab_size": config["vocab_size"]}
    with checked_meanwhile(source) as wait_for_check:
        return write_checkpoint(
            Path(out),
            parameters,
            family=manifest.family,
            config=config,
            layout=Layout.even(tp=tp, pp=pp, num_layers=num_layers),
            tokenizer_files=tokenizer_files,
            origin=manifest.origin,
            history=(*manifest.history, history_entry("split", source=str(source.path), tp=tp, pp=pp, **details)),
            before_commit=wait_for_check,
            advance=advance,
        )
