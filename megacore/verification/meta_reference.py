"""The reference of checkpoints in Meta's own format: Meta's implementation, which is built on fairscale.

Which package that is, the plugin says. The files are read here on their own terms, by the names of their tensors and
not by megacore's reader, so that a fault of that one does not hide on both sides.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megacore.checkpoint.input_files import read_json_object
from megacore.errors import CheckpointError, PluginError

_SIDE_BY_SIDE = {"wq": 0, "wk": 0, "wv": 0, "w1": 0, "w3": 0, "output": 0, "wo": 1, "w2": 1}
"""The dimension along which the ranks' parts of a layer's weight lie beside one another; norms are whole in each."""

_ROPE_THETA = 10000.0
"""What a file means that does not say it: the constant of the implementations that these files were written for."""


class MetaReference:
    """Meta's ``Transformer`` on this rank alone, called as ``reference(input_ids) -> logits``."""

    def __init__(self, model: Any, device: torch.device) -> None:
        self.model = model
        self.device = device

    @torch.no_grad()
    def __call__(self, input_ids: Tensor) -> Tensor:
        """Whole sequences, so that the model's key-value cache, as long as they are, only passes them through."""
        for layer in self.model.layers:
            attention = layer.attention
            shape = (*input_ids.shape, attention.n_local_kv_heads, attention.head_dim)
            attention.cache_k, attention.cache_v = (torch.zeros(shape, device=self.device) for _ in range(2))
        with _model_parallel_group_of_this_rank():
            return self.model(input_ids, 0)

    @classmethod
    def load(
        cls,
        path: Path,
        *,
        implementation: str,
        extra: str,
        max_seq_len: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> MetaReference:
        """Load the checkpoint in ``path``, of any number of model-parallel ranks, into one model.

        Args:
            path: a directory in Meta's format.
            implementation: the package with the modules ``args`` (``ModelArgs``) and ``model`` (``Transformer``).
            extra: what to ``pip install`` to have it.
            max_seq_len: the longest sequence that is to be compared.
            dtype: to load into.
            device: to load onto.

        Raises:
            PluginError: when the implementation is not installed.
            CheckpointError: when ``path`` cannot be loaded into it.
        """
        try:
            arguments_class = import_module(f"{implementation}.args").ModelArgs
            transformer_class = import_module(f"{implementation}.model").Transformer
        except ImportError as error:
            raise PluginError(
                f"the reference {path} is in Meta's format and is to be computed by Meta's own implementation, which "
                f"is not installed ({error}): pip install '{extra}'. Or name the same model in the Hugging Face format "
                "as the reference"
            ) from error
        params = read_json_object(path / "params.json")
        if "dim" not in params:
            raise CheckpointError(f"{path / 'params.json'} lacks 'dim'")
        state = _merged_state(path, params["dim"])
        if "output.weight" not in state:
            raise CheckpointError(f"the reference {path} lacks output.weight")
        params |= {"vocab_size": len(state["output.weight"]), "max_seq_len": max_seq_len, "max_batch_size": 1}
        with _model_parallel_group_of_this_rank():
            model = transformer_class(arguments_class(**{"rope_theta": _ROPE_THETA, **params}))
        for layer in model.layers:  # a call makes its own; these are of the longest sequence there may be
            layer.attention.cache_k = layer.attention.cache_v = None
        weights = {name: state.pop(name).to(device, dtype) for name in list(state)}  # never two models
        try:
            missing = model.load_state_dict(weights, strict=False, assign=True).missing_keys
        except RuntimeError as error:
            raise CheckpointError(f"Meta's implementation cannot load the reference {path}: {error}") from error
        if missing:
            raise CheckpointError(f"the reference {path} lacks {', '.join(missing[:8])}")
        return cls(model.eval(), device)


def _merged_state(path: Path, dim: int) -> dict[str, Tensor]:
    """The tensors of all ranks' files, merged."""
    files = sorted(path.glob("consolidated.*.pth"))
    if not files:
        raise CheckpointError(f"the reference {path} has no consolidated.*.pth")
    try:
        shards = [torch.load(file, map_location="cpu", mmap=True, weights_only=True) for file in files]
        return {name: _merged(name, [shard[name] for shard in shards], dim) for name in shards[0]}
    except Exception as error:  # whatever torch says of a file that it cannot read
        raise CheckpointError(f"the reference {path} cannot be read: {error}") from error


def _merged(name: str, parts: list[Tensor], dim: int) -> Tensor:
    module = name.removesuffix(".weight").rpartition(".")[2]
    if len(parts) > 1 and module in _SIDE_BY_SIDE:
        return torch.cat(parts, dim=_SIDE_BY_SIDE[module])
    if len(parts) > 1 and module == "tok_embeddings":
        return torch.cat(parts, dim=1 if parts[0].shape[1] < dim else 0)
    return parts[0]


@contextmanager
def _model_parallel_group_of_this_rank() -> Iterator[None]:
    """Let fairscale's layers find a model-parallel group in which this rank is alone, within the block.

    Not by its ``initialize_model_parallel``: all ranks of the default process group would have to call it, and it is
    the first rank alone that has a reference. Whatever groups there were, in torch and in fairscale, are there again
    afterwards.
    """
    initialize: Any = import_module("fairscale.nn.model_parallel.initialize")
    before = initialize._MODEL_PARALLEL_GROUP
    is_joined = dist.is_initialized()
    if is_joined:
        group = dist.new_group([dist.get_rank()], backend="gloo", use_local_synchronization=True)
    else:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        group = dist.group.WORLD
    initialize._MODEL_PARALLEL_GROUP = group
    try:
        yield
    finally:
        initialize._MODEL_PARALLEL_GROUP = before
        dist.destroy_process_group(group if is_joined else None)
