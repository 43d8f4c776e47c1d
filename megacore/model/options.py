"""Settings of a model's computation: precision, recomputation, dropout, kernels, compilation."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from megacore.errors import PluginError
from megacore.model.attention import AttentionOptions, SelfAttention
from megacore.model.decoder import DecoderModel
from megacore.model.dropout import Dropout, HiddenDropout
from megacore.model.kernels import attention_kernel, norm_kernels
from megacore.model.norms import LayerNorm, RMSNorm
from megacore.parallel import ColumnParallelLinear, ParallelModule


@dataclass(frozen=True, kw_only=True)
class ComputeOptions:
    """Settings of a model's computation.

    Attributes:
        compute_dtype: Dtype of the arithmetic, if the parameters have a wider one; ``None`` for that of the parameters.
        caches_casts: True to cache casts of parameters; see :class:`~megacore.parallel.ParallelModule`.
        recompute: ``"none"``; ``"selective"``, everything between the projections of attention; ``"full"``, layers.
        recompute_layers: Number of layers recomputed together with ``"full"``.
        attention_dropout: Probability that an attention weight is dropped.
        hidden_dropout: Probability that an element of a residual branch is dropped.
        lima_dropout: True to let hidden dropout rise linearly from 0 at the first layer to its value at the last, with
            none at the embedding (Zhou et al., 2023, arXiv:2305.11206).
        dropout_seed: Seed of the run's dropout.
        attention: Name of the attention kernel in :data:`megacore.model.kernels.KERNELS`.
        norm: Name of the norm kernel in :data:`megacore.model.kernels.KERNELS`.
        compile: True to compile each layer with torch.
        splits_backward: True if the backward pass computes the gradients of parameters separately from those of
            activations.
    """

    compute_dtype: torch.dtype | None = None
    caches_casts: bool = False
    recompute: str = "none"
    recompute_layers: int = 1
    attention_dropout: float = 0.0
    hidden_dropout: float = 0.0
    lima_dropout: bool = False
    dropout_seed: int = 0
    attention: str = "auto"
    norm: str = "auto"
    compile: bool = False
    splits_backward: bool = False


def apply_options(model: DecoderModel, options: ComputeOptions) -> None:
    """Apply ``options`` to ``model``, which is whole or a stage.

    Raises:
        PluginError: when a layer of the family has no module to apply an option to.
    """
    if options.compile and model.parallel.tp_size > 1:
        # torch looks compiled code up on disk by the whole shape of a DTensor, which does not determine the size of a
        # rank's part of an uneven cut: without a tag, a rank was seen to run the code of another.
        torch.compiler.config.cache_key_tag = f"tp {model.parallel.tp_rank} of {model.parallel.tp_size}"
    for module in model.modules():
        if isinstance(module, ParallelModule):
            module.compute_dtype, module.caches_casts = options.compute_dtype, options.caches_casts
        if isinstance(module, ColumnParallelLinear):
            module.overlaps = not (options.splits_backward or options.compile)
        if isinstance(module, RMSNorm | LayerNorm):
            module.kernels = norm_kernels(options.norm)
    if hasattr(model, "embedding"):
        probability = 0.0 if options.lima_dropout else options.hidden_dropout
        model.embedding.hidden_dropout.dropout = Dropout(probability, options.dropout_seed) if probability else None
    for name, layer in model.decoder.layers.items():
        number, num_layers = int(name), model.config.num_layers
        scale = number / max(1, num_layers - 1) if options.lima_dropout else 1.0
        hidden = Dropout(scale * options.hidden_dropout, options.dropout_seed, number)
        attention = replace(hidden, probability=options.attention_dropout)
        dropouts = [module for module in layer.modules() if isinstance(module, HiddenDropout)]
        attentions = [module for module in layer.modules() if isinstance(module, SelfAttention)]
        _require_modules(model, options, bool(dropouts), bool(attentions))
        _refuse_torch_dropout(model, layer)
        for place, module in enumerate(dropouts, start=1):
            module.dropout = replace(hidden, place=place) if hidden.probability else None
        for place, module in enumerate(attentions, start=1):
            module.options = AttentionOptions(
                kernel=attention_kernel(options.attention),
                dropout=replace(attention, place=-place),
                recompute=options.recompute == "selective",
            )
        if options.compile:
            layer.compile()
    model.decoder.recompute_layers = options.recompute_layers if options.recompute == "full" else 0


def _require_modules(model: DecoderModel, options: ComputeOptions, has_dropout: bool, has_attention: bool) -> None:
    family = model.config.family
    if options.hidden_dropout and not has_dropout:
        raise PluginError(
            f"hidden_dropout is {options.hidden_dropout}, but the layers of {family} have no HiddenDropout: its plugin "
            "does not support it. Set it to 0"
        )
    needs_attention = options.attention_dropout or options.recompute == "selective" or options.attention != "auto"
    if needs_attention and not has_attention:
        raise PluginError(
            "attention_dropout, selective recomputation and a choice of the attention's kernel need megacore's "
            f"SelfAttention, which the layers of {family} do not use. Set attention_dropout to 0, recompute to none or "
            "full, and the kernel to auto"
        )


def _refuse_torch_dropout(model: DecoderModel, layer: nn.Module) -> None:
    """Refuse torch's own dropout, whose masks differ between ranks and when a layer is recomputed."""
    for name, module in layer.named_modules():
        if isinstance(module, _DropoutNd) and module.p > 0:
            raise PluginError(
                f"the layers of {model.config.family} have {name}, a {type(module).__name__} of p {module.p}, whose "
                "masks would differ between the ranks and when a layer is recomputed: use megacore.model.HiddenDropout "
                "in its place, and dropout.hidden in the run file"
            )
