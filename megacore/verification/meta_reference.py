"""The reference of checkpoints in Meta's own format: Meta's implementation, which is built on fairscale.

The plugin names its package. The files are read here independently of megacore's reader, by the names of their tensors,
so that a fault in the reader cannot affect both sides.
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
from torch._C._distributed_c10d import HashStore

from megacore.checkpoint.input_files import read_json_object
from megacore.errors import CheckpointError, PluginError

# The dimension along which the ranks' parts of a weight are concatenated; every rank has the whole norms.
_CONCATENATED_DIMS = {"wq": 0, "wk": 0, "wv": 0, "w1": 0, "w3": 0, "output": 0, "wo": 1, "w2": 1}
_ROPE_THETA = 10000.0  # for files without it: the constant of the implementations that they were written for


class MetaReference:
    """Meta's ``Transformer`` on this rank alone, called as ``reference(input_ids) -> logits``."""

    def __init__(self, model: Any, device: torch.device) -> None:
        self.model = model
        self.device = device

    @torch.no_grad()
    def __call__(self, input_ids: Tensor) -> Tensor:
        """Compute the logits of whole sequences, for which the model's key-value cache gets exactly their length."""
        for layer in self.model.layers:
            attention = layer.attention
            shape = (*input_ids.shape, attention.n_local_kv_heads, attention.head_dim)
            attention.cache_k, attention.cache_v = (torch.zeros(shape, device=self.device) for _ in range(2))
        with _model_parallel_group_of_this_rank():
            logits: Tensor = self.model(input_ids, 0)
        return logits

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

        ``implementation`` is the package with the modules ``args`` (``ModelArgs``) and ``model`` (``Transformer``), and
        ``extra`` the argument of ``pip install`` that installs it. No sequence may be longer than ``max_seq_len``.

        Raises:
            PluginError: if the implementation is not installed.
            CheckpointError: if ``path`` cannot be loaded into it.
        """
        try:
            arguments_class = import_module(f"{implementation}.args").ModelArgs
            transformer_class = import_module(f"{implementation}.model").Transformer
        except ImportError as error:
            raise PluginError(
                f"the reference {path} is in Meta's format, which needs Meta's own implementation, but that is not "
                f"installed ({error}): pip install '{extra}'. Or give the same model in the Hugging Face format as the "
                "reference"
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
        for layer in model.layers:  # each call creates smaller ones; these have the maximum length
            layer.attention.cache_k = layer.attention.cache_v = None
        weights = {name: state.pop(name).to(device, dtype) for name in list(state)}  # frees each source tensor
        try:
            missing = model.load_state_dict(weights, strict=False, assign=True).missing_keys
        except RuntimeError as error:
            raise CheckpointError(f"Meta's implementation cannot load the reference {path}: {error}") from error
        if missing:
            raise CheckpointError(f"the reference {path} lacks {', '.join(missing[:8])}")
        return cls(model.eval(), device)


def _merged_state(path: Path, dim: int) -> dict[str, Tensor]:
    files = sorted(path.glob("consolidated.*.pth"))
    if not files:
        raise CheckpointError(f"the reference {path} has no consolidated.*.pth")
    try:
        shards = [torch.load(file, map_location="cpu", mmap=True, weights_only=True) for file in files]
        return {name: _merged(name, [shard[name] for shard in shards], dim) for name in shards[0]}
    except Exception as error:  # torch raises many kinds for a file that it cannot read
        raise CheckpointError(f"the reference {path} cannot be read: {error}") from error


def _merged(name: str, parts: list[Tensor], dim: int) -> Tensor:
    dims = {**_CONCATENATED_DIMS, "tok_embeddings": 1 if parts[0].shape[-1] < dim else 0}
    module = name.removesuffix(".weight").rpartition(".")[2]
    return torch.cat(parts, dim=dims[module]) if module in dims and len(parts) > 1 else parts[0]


@contextmanager
def _model_parallel_group_of_this_rank() -> Iterator[None]:
    """Give fairscale's layers a model-parallel group with this rank alone, within the block.

    fairscale's ``initialize_model_parallel`` must be called on all ranks of the default process group, but only the
    first rank has a reference. The earlier groups of torch and fairscale are restored afterwards.
    """
    initialize: Any = import_module("fairscale.nn.model_parallel.initialize")
    previous = initialize._MODEL_PARALLEL_GROUP
    is_initialized = dist.is_initialized()
    if is_initialized:
        group = dist.new_group([dist.get_rank()], backend="gloo", use_local_synchronization=True)
    else:
        dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
        group = dist.group.WORLD
    initialize._MODEL_PARALLEL_GROUP = group
    try:
        yield
    finally:
        initialize._MODEL_PARALLEL_GROUP = previous
        dist.destroy_process_group(group if is_initialized else None)
