"""The independent implementation that a converted Llama is compared with: transformers' own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from megacore import ModelConfig
from megacore.errors import CheckpointError
from megacore.hookspecs import ReferenceModel
from megacore_llama.config import config_to_source


def load_transformers_model(
    config: ModelConfig, path: Path | None, dtype: torch.dtype, device: torch.device
) -> ReferenceModel:
    """Load the checkpoint in ``path``, or make one of random weights and the size in ``config``.

    Attention is written out in matrix products, so that a fault in a fused kernel does not hide on both sides.

    Raises:
        CheckpointError: when transformers cannot load ``path``.
    """
    logging.disable_progress_bar()
    if path is None:
        model = LlamaForCausalLM._from_config(
            LlamaConfig(**config_to_source(config, "hf")), dtype=dtype, attn_implementation="eager"
        )
    else:
        try:
            loaded: Any = LlamaForCausalLM.from_pretrained(
                path,
                dtype=dtype,
                attn_implementation="eager",
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"transformers cannot load the reference {path}: {error}") from error
        model, loading = loaded
        if loading["missing_keys"]:  # transformers would have filled them with random numbers
            raise CheckpointError(f"the reference {path} lacks {', '.join(sorted(loading['missing_keys'])[:8])}")
    return TransformersReference(model.to(device).eval())


class TransformersReference:
    """A transformers model, called as ``reference(input_ids) -> logits``."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        self.model = model

    def __call__(self, input_ids: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, use_cache=False).logits
