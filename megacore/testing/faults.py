"""Faults that the kit plants in a working model, to check that they change the logits."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from megacore.config import ModelConfig
from megacore.testing.case import Case
from megacore.testing.numerics import VISIBLE, largest_difference
from megacore.weights import Stacked
from megacore.weights.rules import SwappedHalves


@dataclass(frozen=True)
class Fault:
    """A change to a model.

    Attributes:
        description: Description of the change, a clause.
        parameters: The changed parameters, by native name.
        config: Changed configuration of the model, if it differs.
        layer_config: Changed configuration that the layers are built from, if it differs from the model's.
    """

    description: str
    parameters: Mapping[str, Tensor] = field(default_factory=dict)
    config: ModelConfig | None = None
    layer_config: ModelConfig | None = None

    def logits(self, case: Case) -> Tensor:
        """Return the logits of our model with the fault."""
        with torch.no_grad():
            logits: Tensor = case.model(self.parameters, self.config, self.layer_config)(case.input_ids)
        return logits

    def is_visible(self, case: Case) -> bool:
        """Return whether the fault changes some logit visibly."""
        return largest_difference(self.logits(case), case.logits) > VISIBLE


def transposed_weights(case: Case) -> Iterator[Fault]:
    """Transpose each square tensor of the source, in every layer. Others would not load if they were transposed."""
    for kind, names in by_kind(case.tensors).items():
        shape = case.tensors[names[0]].shape
        if len(shape) == 2 and shape[0] == shape[1]:
            transposed = {name: case.tensors[name].T.contiguous() for name in names}
            yield Fault(f"{kind} is transposed", case.to_native({**case.tensors, **transposed}))


def swapped_keys_and_values(case: Case, *, kind: str = "") -> Iterator[Fault]:
    """Swap keys and values in every layer: of weights and biases, or only of ``kind``."""

    def swap(heads: Tensor) -> Tensor:
        return torch.cat((heads[:, :-2], heads[:, -1:], heads[:, -2:-1]), dim=1)

    yield from _qkv_fault(case, f"the rows of keys and values{kind and f' ({kind})'} are swapped", swap, kind)


def wrong_rotary_layout(case: Case) -> Iterator[Fault]:
    """Reorder the rows of each query and key head from halves to interleaved pairs, and in reverse."""
    if case.config.position_embedding != "rotary":
        return
    pairs = torch.arange(case.config.head_dim).view(2, -1).T.flatten()
    changes = {"rotary halves to interleaved pairs": pairs, "interleaved rotary pairs to halves": pairs.argsort()}
    for change, order in changes.items():

        def reorder(heads: Tensor, order: Tensor = order) -> Tensor:
            return torch.cat((heads[:, :-1, order], heads[:, -1:]), dim=1)

        yield from _qkv_fault(case, f"the rows of each query and key head go from {change}", reorder)


def skipped_biases(case: Case) -> Iterator[Fault]:
    """Set each kind of bias to zero, in every layer."""
    for kind, names in by_kind(case.parameters).items():
        if kind.endswith(".bias"):
            yield Fault(f"{kind} is left out", {name: torch.zeros_like(case.parameters[name]) for name in names})


def wrong_eps(case: Case) -> Iterator[Fault]:
    """Double the eps of the layers' norms."""
    config = replace(case.converted_config, norm_eps=2 * case.converted_config.norm_eps)
    yield Fault(f"norm_eps of the layers is {config.norm_eps:g}", layer_config=config)


def layers_off_by_one(case: Case, *, step: int = 1) -> Iterator[Fault]:
    """Take each kind of parameter from the next layer, or with ``step`` -1 from the previous one."""
    direction = "next" if step == 1 else "previous"
    for kind, names in by_kind(case.parameters).items():
        if len(names) > 1:
            neighbours = [case.parameters[name] for name in names[step:] + names[:step]]
            changed = dict(zip(names, neighbours, strict=True))
            yield Fault(f"{kind} of each layer is taken from the {direction} layer", changed)


def swapped_gate_and_up(case: Case) -> Iterator[Fault]:
    """Swap the two parts of each gated projection, in every layer."""
    gated = {
        name: type(rule).__name__
        for name, rule in case.bound.rules.items()
        if isinstance(rule, SwappedHalves) or (isinstance(rule, Stacked) and len(rule.sources) == 2)
    }
    if gated:
        flipped = {name: torch.cat(case.parameters[name].chunk(2)[::-1]) for name in gated}
        kinds = " and ".join(dict.fromkeys(gated.values()))
        yield Fault(f"the two parts of the {kinds} rules (gate and up) are swapped", flipped)


def _qkv_fault(case: Case, description: str, change: Callable[[Tensor], Tensor], kind: str = "") -> Iterator[Fault]:
    """Apply ``change`` to the ``[groups, heads, head_dim, columns]`` of every QKV projection, weight and bias."""
    heads, head_dim = case.config.queries_per_kv + 2, case.config.head_dim
    changed = {
        name: change(value.reshape(value.shape[0], heads, head_dim, -1)).reshape(value.shape)
        for name, value in case.parameters.items()
        if f"linear_qkv.{kind}" in name and value.shape[:2] == (case.config.num_kv_heads, heads * head_dim)
    }
    if changed:
        yield Fault(description, changed)


def by_kind(names: Iterable[str]) -> dict[str, list[str]]:
    """Return native or published names, in the order of the layers, by the name with ``*`` for the layer's number."""
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(re.sub(r"\.\d+\.", ".*.", name), []).append(name)
    return kinds
