"""Update of a checkpoint in the format megatron-llm from rotary halves to interleaved pairs, the later layout."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from torch import Tensor

from megacore.atomic_output import require_space, staged_directory
from megacore.checkpoint.manifest import TOKENIZER_FILES
from megacore.checkpoint.matrix import RowsOf, as_matrix
from megacore.checkpoint.safetensors_file import OutputTensor
from megacore.checkpoint.torch_file import output_tensor, write_torch_file
from megacore.errors import ConfigError, OutputError
from megacore.weights.formats.megatron_llm.rank_files import (
    HALVES,
    INTERLEAVED,
    RECORD,
    TRACKER,
    TRAINING_STATE,
    RankFiles,
    flattened,
    trained_spelling,
)
from megacore.weights.formats.megatron_llm.reading import interleaved_from_halves


def permute_qkv(
    source: Path | str,
    out: Path | str,
    *,
    layout: str | None = None,
    report: Callable[[str], None] = lambda note: None,
    advance: Callable[[int], None] = lambda num_bytes: None,
) -> int:
    """Write the checkpoint in directory ``source``, cut in any way, to ``out`` with its rotary pairs interleaved.

    The rows of each query and key head change from halves, pairs ``(i, i + head_dim / 2)``, to pairs ``(2i, 2i + 1)``,
    and the new files record the new layout. The state of the training run is omitted, because the optimizer's copies of
    the weights are in the old order too.

    Args:
        source: A checkpoint in the format megatron-llm, made at its system's commit 332cf3c or earlier.
        out: The directory to create; it must not exist.
        layout: The layout of ``source``, ``"halves"``. Required unless its files record it; it cannot be detected.
        report: Called with each note on the output, one sentence at a time.
        advance: Called with the number of bytes written, after every few megabytes.

    Returns:
        The number of QKV projections of the whole model.

    Raises:
        ConfigError: if the layout is neither given nor recorded, is interleaved already, or contradicts the record; or
            if the saved arguments do not describe the heads.
        CheckpointError: if ``source`` is no such checkpoint.
    """
    source, out = Path(source), Path(out)
    if out.resolve() == source.resolve() or source.resolve() in out.resolve().parents:
        raise OutputError(f"{out} lies in the checkpoint that is read; a checkpoint is never changed in place")
    files = RankFiles.open(source)
    _require_halves(files, layout)
    args = files.args
    documents = list(chain(*files.documents))
    dropped = [key for key in sorted(TRAINING_STATE) if any(key in document for document in documents)]
    num_bytes = sum(tensor.nbytes for document in documents for _, tensor in flattened(document["model"]))
    num_permuted = 0
    with staged_directory(out) as staging:
        require_space(staging, num_bytes, out)
        for path, document in zip(chain(*files.paths), documents, strict=True):
            model, permuted = _updated(document["model"], args, path)
            num_permuted += permuted
            record = {**document.get(RECORD, {}), "rotary_layout": INTERLEAVED}
            kept = {key: value for key, value in document.items() if key not in TRAINING_STATE}
            updated = staging / path.relative_to(source)
            updated.parent.mkdir(parents=True)
            write_torch_file(updated, {**kept, "model": model, RECORD: record}, advance=advance)
        for name in (TRACKER, *TOKENIZER_FILES):
            if (source / name).is_file():
                shutil.copyfile(source / name, staging / name)
    if dropped:
        report(
            f"{', '.join(dropped)} were omitted, as they have the old layout: resume training from the weights "
            "(--finetune), not from the optimizer's state"
        )
    return num_permuted // len(files.paths[0])  # each rank has a part of every projection of its stage


def _require_halves(files: RankFiles, layout: str | None) -> None:
    recorded = files.rotary_layout
    if recorded == INTERLEAVED:
        raise ConfigError(
            f"{files.directory} records that its rotary pairs are interleaved already: permuting again would ruin it"
        )
    if layout is None and recorded is None:
        raise ConfigError(
            f"{files.directory} does not record its rotary layout, and it cannot be detected. If it was converted at "
            f"commit 332cf3c of its system or earlier, give --layout {HALVES}; if later, it needs no update"
        )
    if layout not in (None, HALVES):
        raise ConfigError(f"only the layout {HALVES!r} can be updated, not {layout!r}")


def _updated(
    tree: Mapping[str, Any], args: Mapping[str, Any], file: Path, prefix: str = ""
) -> tuple[dict[str, Any], int]:
    """Return the model of one rank with permuted QKV projections, and their number."""
    updated: dict[str, Any] = {}
    permuted = 0
    for key, value in tree.items():
        name = prefix + str(key)
        if isinstance(value, Mapping):
            updated[key], below = _updated(value, args, file, f"{name}.")
            permuted += below
        elif not isinstance(value, Tensor):
            updated[key] = value
        elif ".query_key_value." in (trained_name := trained_spelling(name)):
            matrix = as_matrix(value)
            order = interleaved_from_halves(args, matrix.rows, trained_name, file)
            updated[key] = OutputTensor(name, tuple(value.shape), value.dtype, RowsOf(matrix, order))
            permuted += 1
        else:
            updated[key] = output_tensor(name, value)
    return updated, permuted
