"""The reference of families that transformers implements; the plugin provides the model class."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from megacore.errors import CheckpointError


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
            attention: Attention implementation of transformers: ``"eager"``, plain matrix products, so that a fault in
                a fused kernel cannot affect both sides; another one only if the eager one is known to be wrong.

        Raises:
            CheckpointError: when transformers cannot load ``path``, or would initialize missing weights.
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
