"""The references of families that transformers implements, for a plugin's ``load_reference``."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from megacore.errors import CheckpointError
from megacore.hookspecs import ReferenceModel
from megacore.verification.meta_reference import MetaReference
from megacore.weights.formats import recognise


class TransformersReference:
    """A transformers model for causal language modelling, called as ``reference(input_ids) -> logits``."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, input_ids: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=input_ids, use_cache=False).logits
        return logits

    @classmethod
    def load(
        cls,
        model_class: Any,
        published_config: dict[str, Any],
        path: Path | None,
        *,
        dtype: torch.dtype,
        device: torch.device,
        attention: str,
    ) -> TransformersReference:
        """Load the checkpoint in ``path`` or, if that is ``None``, make a model of random weights.

        Args:
            model_class: Class of transformers, for example ``MptForCausalLM``.
            published_config: Contents of ``config.json``, for random weights.
            path: Local directory in the Hugging Face format.
            dtype: Dtype of the weights.
            device: Device of the weights.
            attention: Attention of transformers: ``"eager"``, plain matrix products, so that a fault in a fused kernel
                cannot affect both sides, unless the eager one is known to be wrong.

        Raises :class:`CheckpointError` if transformers cannot load ``path``, or would initialize missing weights.
        """
        # transformers draws its bar into files and logs too. It is imported already, as model_class is one of its own.
        import_module("transformers.utils.logging").disable_progress_bar()
        if path is None:
            config = model_class.config_class(**published_config)
            model = model_class._from_config(config, dtype=dtype, attn_implementation=attention)
            return cls(model.to(device).eval())
        try:
            model, loading = model_class.from_pretrained(
                path,
                dtype=dtype,
                attn_implementation=attention,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
            )
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise CheckpointError(f"transformers cannot load the reference {path}: {error}") from error
        if loading["missing_keys"]:  # transformers has filled them with random numbers
            raise CheckpointError(f"the reference {path} lacks {', '.join(sorted(loading['missing_keys'])[:8])}")
        return cls(model.to(device).eval())


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
    """Load the reference of a standard decoder by the format of ``path``.

    A checkpoint in Meta's format is loaded by :meth:`MetaReference.load`, with ``meta_implementation``, ``meta_extra``
    and ``max_seq_len``; any other, or ``None``, by :meth:`TransformersReference.load`. Their errors pass through.
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
