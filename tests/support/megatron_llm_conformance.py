"""The conformance kit on the format megatron-llm: what the plugins that read it share.

The reference is transformers' model. On every call its weights are made anew of the tensors that the file holds, by the
format's description, so that their gradients are known under the names that the format has for them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megacore import ModelConfig
from megacore.plugins import get_family
from megacore.testing import ModelFamilyTests, randomize
from megatron_llm_files import TRACKER, Model, load, model_of, rank_file, write_megatron_llm

Tensors = Mapping[str, Tensor]


class Reference:
    """``model`` of transformers with weights in the format megatron-llm."""

    def __init__(self, model: nn.Module, stored: Tensors, published: Callable[[Tensors], Tensors]) -> None:
        self.model = model
        self.stored = {name: tensor.clone().requires_grad_() for name, tensor in stored.items()}
        self._published = published

    def __call__(self, input_ids: Tensor) -> Tensor:
        return torch.func.functional_call(self.model, dict(self._published(self.stored)), (input_ids,)).logits


class MegatronLlmFormatTests(ModelFamilyTests):
    """Against transformers, on a file that is written and read with the plainest operations of torch."""

    sources = ("megatron-llm",)

    def publish(self, config: ModelConfig, directory: Path, source: str) -> None:
        model = self._of_transformers(config)
        randomize(model)
        write_megatron_llm(directory, self.taken_apart(model, config), spelling="trained")

    def reference(self, config: ModelConfig, directory: Path, source: str) -> Reference:
        said = (directory / TRACKER).read_text()
        folder = said if said == "release" else f"iter_{int(said):07d}"
        held = load(rank_file(directory, 0, 0, 1, folder=folder))["model"]["language_model"]
        stored = {f"encoder.{name}": tensor for name, tensor in held["encoder"].items()}
        stored["embedding.word_embeddings.weight"] = held["embedding"]["word_embeddings"]["weight"][: config.vocab_size]
        if "lm_head" in held:
            stored["lm_head"] = held["lm_head"][: config.vocab_size]
        model = self._of_transformers(config)
        return Reference(model, stored, lambda tensors: self.put_together(tensors, config))

    def reference_parameters(self, reference: Reference) -> Tensors:
        return reference.stored

    def taken_apart(self, model: Any, config: ModelConfig) -> Model:
        """What a model of transformers holds: of a Llama, unless a subclass says otherwise."""
        return model_of(model.state_dict(), model.config)

    def put_together(self, stored: Tensors, config: ModelConfig) -> Tensors:
        """The inverse of :meth:`taken_apart` for the tensors of a file."""
        published = {
            "model.embed_tokens.weight": stored["embedding.word_embeddings.weight"],
            "model.norm.weight": stored["encoder.final_layernorm.weight"],
        }
        if "lm_head" in stored:
            published["lm_head.weight"] = stored["lm_head"]
        for number in range(config.num_layers):
            theirs, ours = f"model.layers.{number}", f"encoder.layers.{number}"
            blocks = heads_in_halves(stored[f"{ours}.self_attention.query_key_value.weight"], config)
            up, gate = stored[f"{ours}.mlp.dense_h_to_4h.weight"].chunk(2)
            published |= {
                f"{theirs}.self_attn.q_proj.weight": blocks[:, :-2].flatten(0, 2),
                f"{theirs}.self_attn.k_proj.weight": blocks[:, -2].flatten(0, 1),
                f"{theirs}.self_attn.v_proj.weight": blocks[:, -1].flatten(0, 1),
                f"{theirs}.self_attn.o_proj.weight": stored[f"{ours}.self_attention.dense.weight"],
                f"{theirs}.mlp.gate_proj.weight": gate,
                f"{theirs}.mlp.up_proj.weight": up,
                f"{theirs}.mlp.down_proj.weight": stored[f"{ours}.mlp.dense_4h_to_h.weight"],
                f"{theirs}.input_layernorm.weight": stored[f"{ours}.input_layernorm.weight"],
                f"{theirs}.post_attention_layernorm.weight": stored[f"{ours}.post_attention_layernorm.weight"],
            }
        return published

    def _of_transformers(self, config: ModelConfig) -> Any:
        family = get_family(self.family)
        return family.load_reference(config, None, torch.float32, torch.device("cpu")).model


def heads_in_halves(fused: Tensor, config: ModelConfig) -> Tensor:
    """Grouped rows ``[kv_heads, query heads + 2, head_dim, hidden]``, rotary pairs ``(2i, 2i + 1)`` made halves."""
    blocks = fused.unflatten(0, (config.num_kv_heads, -1, config.head_dim))
    rotated = torch.cat((blocks[:, :-1, 0::2], blocks[:, :-1, 1::2]), dim=2)
    return torch.cat((rotated, blocks[:, -1:]), dim=1)
