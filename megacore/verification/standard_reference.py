"""The reference of a standard decoder, by the format of its checkpoint: transformers' implementation, or Meta's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megacore.hookspecs import ReferenceModel
from megacore.verification.meta_reference import MetaReference
from megacore.verification.transformers_reference import TransformersReference
from megacore.weights.formats import recognise


def load_standard_reference(
    model_class: Any,
    published_config: dict[str, Any],
    path: Path | None,
    *,
    meta_implementation: str,
    meta_extra: str,
    max_seq_len: int,
    dtype: torch.dtype,
    device: torch.device,
) -> ReferenceModel:
    """Load the checkpoint in ``path`` or, if that is ``None``, make a model of random weights.

    A checkpoint in Meta's format is computed by :class:`MetaReference`, any other by :class:`TransformersReference`.

    Args:
        model_class: The model class of transformers, for example ``MptForCausalLM``.
        published_config: The ``config.json`` for random weights.
        path: A local checkpoint.
        meta_implementation: The package with Meta's modules ``args`` and ``model``.
        meta_extra: The argument of ``pip install`` that installs it.
        max_seq_len: The longest sequence that Meta's implementation is called with.
        dtype: The dtype to load into.
        device: The device to load onto.

    Raises:
        CheckpointError: if the implementation cannot load ``path``.
        PluginError: if Meta's implementation is needed and not installed.
    """
    if path is not None and recognise(path) == "meta":
        return MetaReference.load(
            path,
            implementation=meta_implementation,
            extra=meta_extra,
            max_seq_len=max_seq_len,
            dtype=dtype,
            device=device,
        )
    return TransformersReference.load(
        model_class, published_config, path, dtype=dtype, device=device, attention="eager"
    )
