"""Hook specifications: everything that a model plugin provides.

A plugin declares its families in :func:`model_families`. megacore then calls the other four hooks **only on the plugin
that owns the family**, so an implementation never has to ask "is this my model?". Other plugins may wrap a hook.

Rules for implementations:

* Take only the arguments you use, by the names below, and give none of them a default.
* Never return ``None``.
* Import torch and transformers inside the function: every ``megacore`` command loads every plugin.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import pluggy

from megacore.config import ModelConfig

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from torch import Tensor, nn

    from megacore.parallel import ParallelContext
    from megacore.weights.rules import WeightMap

PROJECT = "megacore"
"""The name of the pluggy project, and of the entry-point group that plugins register in."""

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@dataclass(frozen=True, kw_only=True)
class ModelFamily:
    """One family of models and the reading and writing of its published configuration files.

    Attributes:
        name: The value of ``--model``, for example ``"mpt"``.
        architectures: The entries of ``architectures`` in a Hugging Face ``config.json`` that this family reads.
        sources: The checkpoint formats that the plugin's weight maps cover.
        config_from_source: ``(published, source) -> ModelConfig``; ``published`` is the parsed configuration file of
            a checkpoint in format ``source``. It raises :class:`~megacore.errors.ConfigError`, naming the key, for
            each setting that the plugin does not implement.
        config_to_source: ``(config, source) -> dict``, the inverse. Keys that it does not return keep the value of the
            checkpoint that was converted.
        config_class: The class of the model configuration in a native checkpoint.
        presets: The published sizes, by the value of ``--size``, as keyword arguments of ``config_class`` (without
            ``family``). A checkpoint's own configuration is compared with them and never replaced by them.
        hub: The repository of each size on the Hugging Face hub, ``owner/name``, by the value of ``--size``. ``megacore
            convert --model mpt --size 7`` fetches it. It must hold safetensors in format ``"hf"``, and may be gated.
    """

    name: str
    architectures: tuple[str, ...]
    config_from_source: Callable[[Mapping[str, Any], str], ModelConfig]
    config_to_source: Callable[[Any, str], dict[str, Any]]
    sources: tuple[str, ...] = ("hf",)
    config_class: type[ModelConfig] = ModelConfig
    presets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    hub: Mapping[str, str] = field(default_factory=dict)


class ReferenceModel(Protocol):
    """An independent implementation to compare with, in evaluation mode."""

    def __call__(self, input_ids: Tensor) -> Tensor:
        """Return the logits, ``[batch, sequence, vocabulary]``, of ``input_ids``, ``[batch, sequence]``."""


@hookspec
def model_families() -> Iterable[ModelFamily]:  # type: ignore[empty-body]
    """Declare the model families that this plugin implements. Called once, when the plugin is loaded.

    Example:
        >>> from megacore import ModelConfig, ModelFamily, hookimpl
        >>> def config_from_source(published, source):
        ...     return ModelConfig(
        ...         family="tiny",
        ...         num_layers=published["n_layers"],
        ...         hidden_size=published["d_model"],
        ...         ffn_hidden_size=4 * published["d_model"],
        ...         num_attention_heads=published["n_heads"],
        ...         num_kv_heads=published["n_heads"],
        ...         head_dim=published["d_model"] // published["n_heads"],
        ...         vocab_size=published["vocab_size"],
        ...         max_position_embeddings=2048,
        ...         norm_eps=1e-5,
        ...     )
        >>> def config_to_source(config, source):
        ...     return {"architectures": ["TinyForCausalLM"], "n_layers": config.num_layers}
        >>> @hookimpl
        ... def model_families():
        ...     return [
        ...         ModelFamily(
        ...             name="tiny",
        ...             architectures=("TinyForCausalLM",),
        ...             config_from_source=config_from_source,
        ...             config_to_source=config_to_source,
        ...         )
        ...     ]
        >>> [family.name for family in model_families()]
        ['tiny']
    """


@hookspec(firstresult=True)
def weight_map(config: ModelConfig, source: str) -> WeightMap:  # type: ignore[empty-body]
    """Return the map between a checkpoint in format ``source`` ("hf", "meta", ...) and megacore's parameters.

    Every source tensor must be used exactly once (or be listed as ignored) and every megacore parameter produced
    exactly once. The map is data, not code: megacore runs it in both directions, a few megabytes at a time. ``*``
    stands for the layer number.

    Raise :class:`~megacore.errors.UnsupportedSourceError` for a format that the plugin does not read.

    Example:
        >>> from megacore import hookimpl
        >>> @hookimpl
        ... def weight_map(config):
        ...     from megacore.weights import Copy, FusedQKV, Stacked, WeightMap
        ...
        ...     return WeightMap(
        ...         Copy("embedding.word_embeddings.weight", "wte.weight"),
        ...         FusedQKV(
        ...             "decoder.layers.*.self_attention.linear_qkv.weight",
        ...             q="blocks.*.q.weight",
        ...             k="blocks.*.k.weight",
        ...             v="blocks.*.v.weight",
        ...         ),
        ...         Stacked("decoder.layers.*.mlp.linear_fc1.weight", gate="blocks.*.w1", up="blocks.*.w3"),
        ...     )
        >>> [rule.native for rule in weight_map(config=None).rules]  # doctest: +NORMALIZE_WHITESPACE
        ['embedding.word_embeddings.weight',
         'decoder.layers.*.self_attention.linear_qkv.weight',
         'decoder.layers.*.mlp.linear_fc1.weight']
    """


@hookspec(firstresult=True)
def qkv_permutation(config: ModelConfig, source: str) -> Sequence[int]:  # type: ignore[empty-body]
    """Return the row order of megacore's fused QKV projection in terms of the source's rows.

    Row ``i`` of megacore's projection is row ``result[i]`` of the source's query, key and value rows, taken in the
    order in which the weight map lists them. The length is ``(num_attention_heads + 2 * num_kv_heads) * head_dim``.
    The order accounts for the source's grouping of heads and its layout of rotary pairs, for weights and biases alike.
    Return ``range(length)`` if the layouts agree.

    megacore's own order is, for each key-value head, the query heads that share it, then the key, then the value.
    Within a head the rotary pairs are ``(i, i + head_dim / 2)``.

    Example:
        Separate q, k and v with rotary halves; one head of two rows for each of 2 groups, multi-head attention:

        >>> from megacore import ModelConfig, hookimpl
        >>> @hookimpl
        ... def qkv_permutation(config):
        ...     from megacore.weights import grouped_qkv_rows
        ...
        ...     return grouped_qkv_rows(config)
        >>> config = ModelConfig(
        ...     family="tiny", num_layers=1, hidden_size=4, ffn_hidden_size=8, num_attention_heads=2, num_kv_heads=2,
        ...     head_dim=2, vocab_size=7, max_position_embeddings=16, norm_eps=1e-5,
        ... )
        >>> qkv_permutation(config)  # q0, k0, v0, q1, k1, v1
        [0, 1, 4, 5, 8, 9, 2, 3, 6, 7, 10, 11]
    """


@hookspec(firstresult=True)
def load_reference(  # type: ignore[empty-body]
    config: ModelConfig, path: Path | None, dtype: torch.dtype, device: torch.device
) -> ReferenceModel:
    """Load an independent implementation to compare with: ``reference(input_ids) -> logits``, in evaluation mode.

    ``path`` is a local checkpoint; ``None`` asks for random weights of the size in ``config``.

    Example:
        >>> from megacore import hookimpl
        >>> @hookimpl
        ... def load_reference(config, path, dtype, device):
        ...     import torch
        ...
        ...     embedding = torch.nn.Embedding(config.vocab_size, config.hidden_size, dtype=dtype, device=device)
        ...     return lambda input_ids: embedding(input_ids) @ embedding.weight.T
        >>> import torch
        >>> from types import SimpleNamespace
        >>> size = SimpleNamespace(vocab_size=7, hidden_size=4)
        >>> reference = load_reference(size, None, torch.float64, torch.device("cpu"))
        >>> reference(torch.tensor([[1, 2, 3]])).shape
        torch.Size([1, 3, 7])
    """


@hookspec(firstresult=True)
def build_layer(config: ModelConfig, layer_index: int, parallel: ParallelContext) -> nn.Module:  # type: ignore[empty-body]
    """Build transformer layer ``layer_index`` (from 0) out of the modules in :mod:`megacore.model`.

    The layer's ``forward(hidden, positions)`` takes and returns ``[batch, sequence, hidden_size]``; ``positions`` is a
    :class:`megacore.model.Positions`, which the layer passes to the attention. The modules distribute the parameters
    over processes; the layer need not.

    Example:
        >>> from megacore import ModelConfig, hookimpl
        >>> @hookimpl
        ... def build_layer(config, parallel):
        ...     from torch import nn
        ...
        ...     from megacore.model import GatedMLP, RMSNorm, SelfAttention
        ...
        ...     class TinyLayer(nn.Module):
        ...         def __init__(self):
        ...             super().__init__()
        ...             self.input_layernorm = RMSNorm(config, parallel)
        ...             self.self_attention = SelfAttention(config, parallel)
        ...             self.mlp = GatedMLP(config, parallel)
        ...
        ...         def forward(self, hidden, positions):
        ...             normed = self.input_layernorm(hidden)
        ...             return hidden + self.self_attention(normed, positions) + self.mlp(normed)
        ...
        ...     return TinyLayer()
        >>> from megacore.parallel import ParallelContext
        >>> config = ModelConfig(
        ...     family="tiny", num_layers=1, hidden_size=4, ffn_hidden_size=8, num_attention_heads=2, num_kv_heads=2,
        ...     head_dim=2, vocab_size=7, max_position_embeddings=16, norm_eps=1e-5,
        ... )
        >>> sorted(name for name, _ in build_layer(config, ParallelContext.single()).named_parameters())
        ... # doctest: +NORMALIZE_WHITESPACE
        ['input_layernorm.weight', 'mlp.linear_fc1.weight', 'mlp.linear_fc2.weight',
         'self_attention.linear_proj.weight', 'self_attention.linear_qkv.weight']
    """


FAMILY_HOOKS = ("weight_map", "qkv_permutation", "load_reference", "build_layer")
"""The hooks that a plugin must implement once it declares a family."""
