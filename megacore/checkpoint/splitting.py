"""``split``: reshards a checkpoint to another TP × PP size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from megacore.checkpoint.layout import Layout
from megacore.checkpoint.manifest import Manifest
from megacore.checkpoint.reading import Checkpoint, check_in_background
from megacore.checkpoint.resized_embeddings import ExtendedTokenizer
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
    """Write ``checkpoint`` to ``out``, cut over ``tp`` × ``pp`` ranks; 1 × 1 merges it. The values do not change.

    With ``add_tokens``, a dataset or a tokenizer's directory, embedding and head get rows for the tokens that the
    tokenizer has beyond the model's, each the mean of the rows before the first of them. Spare rows are used first.

    The digests of ``checkpoint`` are checked meanwhile, so that damaged weights are never passed on.

    Raises:
        DataError: when ``add_tokens`` is not the model's tokenizer with tokens added.
        LayoutError: when the model cannot be cut over ``tp`` × ``pp``; the message names sizes that work.
        CheckpointError, CorruptCheckpointError: when ``checkpoint`` cannot be read.
        OutputError, DiskFullError: when ``out`` cannot be written.
    """
    source = Checkpoint(checkpoint)
    manifest = source.manifest
    num_layers = manifest.layout.num_layers
    parameters = {
        name: Parameter(entry.spec, source.matrix(name), DTYPES[entry.dtype])
        for name, entry in manifest.parameters.items()
    }
    model, tokenizer_files, details = manifest.description, source.tokenizer_files(), {}
    if add_tokens is not None:
        added = ExtendedTokenizer.read(add_tokens, known=tokenizer_files)
        parameters, tokenizer_files = added.resize_embeddings(parameters), added.tokenizer_files(tokenizer_files)
        vocab_size = added.vocab_size(model.config["vocab_size"])
        model = replace(model, config=model.config | {"vocab_size": vocab_size})
        details = {"added_tokens": str(added.directory), "vocab_size": vocab_size}
    with check_in_background(source) as wait_for_check:
        return write_checkpoint(
            Path(out),
            parameters,
            model.after("split", source=str(source.path), tp=tp, pp=pp, **details),
            layout=Layout.even(tp=tp, pp=pp, num_layers=num_layers),
            tokenizer_files=tokenizer_files,
            before_commit=wait_for_check,
            advance=advance,
        )
