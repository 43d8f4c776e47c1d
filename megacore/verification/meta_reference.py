"""The reference of checkpoints in Meta's own format: Meta's implementation, which is built on fairscale.

The plugin names the package. The files are read here by the names of their tensors and not by megacore's reader, so
that a fault of that reader cannot affect both models.
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

_CONCATENATED_ALONG = {"wq": 0, "wk": 0, "wv": 0, "w1": 0, "w3": 0, "output": 0, "wo": 1, "w2": 1}
"""The dimension along which the ranks' parts of a weight are concatenated; every rank has the norms whole."""

_ROPE_THETA = 10000.0
"""The value for a file without the key: the constant of the implementations that such files were written for."""


class MetaReference:
    """Meta's ``Transformer`` on this rank alone, called as ``reference(input_ids) -> logits``."""

    def __init__(self, model: Any, device: torch.device) -> None:
        self.model = model
        self.device = device

    @torch.no_grad()
    def __call__(self, input_ids: Tensor) -> Tensor:
        """Return the logits. The key-value cache is as long as the sequences, so that it has no effect."""
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
            path: A directory in Meta's format.
            implementation: The package with the modules ``args`` (``ModelArgs``) and ``model`` (``Transformer``).
            extra: The argument of ``pip install`` that installs it.
            max_seq_len: The longest sequence to compare.
            dtype: The dtype to load into.
            device: The device to load onto.

        Raises:
            PluginError: if the implementation is not installed.
            CheckpointError: if ``path`` cannot be loaded into it.
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
        for layer in model.layers:  # each call creates its own; these have the maximum length
            layer.attention.cache_k = layer.attention.cache_v = None
        weights = {name: state.pop(name).to(device, dtype) for name in list(state)}  # never two models in memory
        try:
            missing = model.load_state_dict(weights, strict=False, assign=True).missing_keys
        except RuntimeError as error:
            raise CheckpointError(f"Meta's implementation cannot load the reference {path}: {error}") from error
        if missing:
            raise CheckpointError(f"the reference {path} lacks {', '.join(missing[:8])}")
        return cls(model.eval(), device)


def _merged_state(path: Path, dim: int) -> dict[str, Tensor]:
    """Return the tensors of all ranks' files, merged."""
    files = sorted(path.glob("consolidated.*.pth"))
    if not files:
        raise CheckpointError(f"the reference {path} has no consolidated.*.pth")
    try:
        shards = [torch.load(file, map_location="cpu", mmap=True, weights_only=True) for file in files]
        return {name: _merged(name, [shard[name] for shard in shards], dim) for name in shards[0]}
    except Exception as error:  # torch raises many kinds for a file that it cannot read
        raise CheckpointError(f"the reference {path} cannot be read: {error}") from error


def _merged(name: str, parts: list[Tensor], dim: int) -> Tensor:
    module = name.removesuffix(".weight").rpartition(".")[2]
    if len(parts) > 1 and module in _CONCATENATED_ALONG:
        return torch.cat(parts, dim=_CONCATENATED_ALONG[module])
    if len(parts) > 1 and module == "tok_embeddings":
        return torch.cat(parts, dim=1 if parts[0].shape[1] < dim else 0)
    return parts[0]


@contextmanager
def _model_parallel_group_of_this_rank() -> Iterator[None]:
    """Give fairscale's layers a model-parallel group of this rank alone within the block.

    fairscale's ``initialize_model_parallel`` must be called on all ranks of the default process group, but only the
    first rank has a reference. The previous groups of torch and fairscale are restored afterwards.
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
