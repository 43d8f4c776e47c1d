"""Faults that the kit plants in a working model, to check that they change the logits."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megacore.config import ModelConfig
from megacore.testing.case import Case
from megacore.testing.numerics import logits_with
from megacore.weights import Stacked
from megacore.weights.rules import Rule, SwappedHalves

_LAYER = re.compile(r"\.layers\.(\d+)\.")


@dataclass(frozen=True)
class Fault:
    """A change to a model.

    Attributes:
        description: Description of the change, a clause.
        parameters: All parameters of the model, with the change.
        config: Configuration of the model, with the change.
        layer_config: Configuration that the layers are built from, if it is not ``config``.
    """

    description: str
    parameters: Mapping[str, Tensor]
    config: ModelConfig
    layer_config: ModelConfig | None = None

    def logits(self, case: Case) -> Tensor:
        """Return the logits of our model with the fault."""
        return logits_with(case.family, self.config, self.parameters, case.input_ids, layer_config=self.layer_config)


def transposed_weights(case: Case) -> Iterator[Fault]:
    """Transpose each square tensor of the source, in every layer. Others would not load if they were transposed."""
    for kind in dict.fromkeys(map(_kind, case.tensors)):
        chosen = [name for name in case.tensors if _kind(name) == kind]
        shape = case.tensors[chosen[0]].shape
        if len(shape) == 2 and shape[0] == shape[1]:
            changed = {name: case.tensors[name].T.contiguous() for name in chosen}
            yield _fault(case, f"{kind} is transposed", case.to_native({**case.tensors, **changed}))


def swapped_keys_and_values(case: Case, *, kind: str = "") -> Iterator[Fault]:
    """Swap keys and values in every layer: of weights and biases, or only of ``kind``."""

    def swap(heads: Tensor) -> Tensor:
        return torch.cat((heads[:, :-2], heads[:, -1:], heads[:, -2:-1]), dim=1)

    yield from _qkv_fault(case, f"the rows of keys and values{kind and f' ({kind})'} are swapped", swap, kind)


def wrong_rotary_layout(case: Case) -> Iterator[Fault]:
    """Reorder the rows of each query and key head from halves to interleaved pairs, and in reverse."""
    if case.config.position_embedding != "rotary":
        return
    halves = torch.arange(case.config.head_dim).view(2, -1)
    for description, order in (
        ("the rows of each query and key head go from rotary halves to interleaved pairs", halves.T.flatten()),
        (
            "the rows of each query and key head go from interleaved rotary pairs to halves",
            halves.T.flatten().argsort(),
        ),
    ):

        def reorder(heads: Tensor, order: Tensor = order) -> Tensor:
            return torch.cat((heads[:, :-1, order], heads[:, -1:]), dim=1)

        yield from _qkv_fault(case, description, reorder)


def skipped_biases(case: Case) -> Iterator[Fault]:
    """Set each kind of bias to zero, in every layer."""
    for kind, names in by_kind(case.parameters).items():
        if kind.endswith(".bias"):
            zeros = {name: torch.zeros_like(case.parameters[name]) for name in names}
            yield _fault(case, f"{kind} is left out", zeros)


def wrong_eps(case: Case) -> Iterator[Fault]:
    """Double the eps of the layers' norms."""
    config = replace(case.converted_config, norm_eps=2 * case.converted_config.norm_eps)
    yield Fault(f"norm_eps of the layers is {config.norm_eps:g}", case.parameters, case.converted_config, config)


def layers_off_by_one(case: Case, *, step: int = 1) -> Iterator[Fault]:
    """Take each kind of parameter from the next layer, or with ``step`` -1 from the previous one."""
    for kind, names in by_kind(case.parameters).items():
        if len(names) > 1:
            neighbours = names[step:] + names[:step]
            yield _fault(
                case,
                f"{kind} of each layer is taken from the {'next' if step == 1 else 'previous'} layer",
                {name: case.parameters[neighbour] for name, neighbour in zip(names, neighbours, strict=True)},
            )


def swapped_gate_and_up(case: Case) -> Iterator[Fault]:
    """Swap the two parts of each gated projection, in every layer."""
    gated = {name: type(rule).__name__ for name, rule in case.bound.rules.items() if _makes_two_parts(rule)}
    if gated:
        flipped = {name: torch.cat(case.parameters[name].chunk(2)[::-1]) for name in gated}
        kinds = " and ".join(dict.fromkeys(gated.values()))
        yield _fault(case, f"the two parts of the {kinds} rules (gate and up) are swapped", flipped)


def _makes_two_parts(rule: Rule) -> bool:
    return isinstance(rule, SwappedHalves) or (isinstance(rule, Stacked) and len(rule.sources) == 2)


def _qkv_fault(case: Case, description: str, change: Callable[[Tensor], Tensor], kind: str = "") -> Iterator[Fault]:
    """Apply ``change`` to the ``[groups, heads, head_dim, columns]`` of every QKV projection, weight and bias."""
    heads, head_dim = case.config.queries_per_kv + 2, case.config.head_dim
    changed = {
        name: change(value.reshape(value.shape[0], heads, head_dim, -1)).reshape(value.shape)
        for name, value in case.parameters.items()
        if f"linear_qkv.{kind}" in name and value.shape[:2] == (case.config.num_kv_heads, heads * head_dim)
    }
    if changed:
        yield _fault(case, description, changed)


def _fault(case: Case, description: str, changed: Mapping[str, Tensor]) -> Fault:
    return Fault(description, {**case.parameters, **changed}, case.converted_config)


def _kind(name: str) -> str:
    """Return a published name with ``*`` for the number of its layer."""
    return re.sub(r"\.\d+\.", ".*.", name)


def by_kind(parameters: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """Return the native names, in the order of the layers, by the name without the layer's number."""
    kinds: dict[str, list[str]] = {}
    for name in parameters:
        kinds.setdefault(_LAYER.sub(".layers.*.", name), []).append(name)
    return kinds
