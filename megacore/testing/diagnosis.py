"""Finding out why logits differ: undoing each of the usual mistakes until the logits agree."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations

from torch import Tensor

from megacore.model import ACTIVATIONS
from megacore.testing import faults
from megacore.testing.case import Case
from megacore.testing.faults import Fault
from megacore.testing.numerics import ATOL, RTOL, agree, largest_difference
from megacore.weights import grouped_qkv_rows
from megacore.weights.rules import QKVOrder


def explain(case: Case) -> str:
    """Return why our logits differ from the reference's."""
    ours, theirs = case.logits, case.reference_logits
    if ours.shape != theirs.shape:
        return f"our logits are {list(ours.shape)}, the reference's {list(theirs.shape)}"
    difference = (
        f"the logits differ from the reference's by up to {largest_difference(ours, theirs):.2g} "
        f"(allowed: {ATOL:g} + {RTOL:g} of the value)"
    )
    repairs = [repair.description for repair in _candidates(case) if _repairs(repair, case)]
    if repairs:
        return f"{difference}. They agree once" + "".join(f"\n  - {repair}" for repair in repairs)
    hints = "".join(f"\n  - {hint}" for hint in (*_unused_parameters(case), _position_hint(ours, theirs)))
    return f"{difference}. No single change to the weights or settings fixes that.{hints}"


def _candidates(case: Case) -> Iterator[Fault]:
    yield from faults.transposed_weights(case)
    for kind in ("", "weight", "bias"):
        yield from faults.swapped_keys_and_values(case, kind=kind)
    yield from faults.wrong_rotary_layout(case)
    yield from faults.swapped_gate_and_up(case)
    for step in (1, -1):
        yield from faults.layers_off_by_one(case, step=step)
    yield from _exchanged_parameters(case)
    yield from _other_orders(case)
    yield from _other_settings(case)


def _exchanged_parameters(case: Case) -> Iterator[Fault]:
    """Yield every exchange of two kinds of parameters of the same shape."""
    kinds = faults.by_kind(case.parameters)
    for (first, names), (second, partners) in combinations(kinds.items(), 2):
        if [case.parameters[name].shape for name in names] == [case.parameters[name].shape for name in partners]:
            pairs = [*zip(names, partners, strict=True), *zip(partners, names, strict=True)]
            exchanged = {name: case.parameters[partner] for name, partner in pairs}
            yield Fault(f"{first} and {second} change places", exchanged)


def _other_orders(case: Case) -> Iterator[Fault]:
    grouped = grouped_qkv_rows(case.config)
    for returned, rows in (("grouped_qkv_rows(config)", grouped), (f"range({len(grouped)})", range(len(grouped)))):
        order = QKVOrder.from_permutation(case.config, rows)
        yield Fault(f"qkv_permutation returns {returned}", case.to_native(case.tensors, order=order))


def _other_settings(case: Case) -> Iterator[Fault]:
    config = case.converted_config
    for activation in ACTIVATIONS:
        yield _setting(case, "activation", activation, layers_only=True)
    for eps in (config.norm_eps, 1e-3, 1e-5, 1e-6, 1e-8, 1e-12):
        yield _setting(case, "norm_eps", eps, layers_only=True)
        yield _setting(case, "norm_eps", eps, layers_only=False)
    for theta in (1e4, 5e5, 1e6):
        yield _setting(case, "rope_theta", theta, layers_only=False)


def _setting(case: Case, name: str, value: object, *, layers_only: bool) -> Fault:
    changed = replace(case.converted_config, **{name: value})  # type: ignore[arg-type]
    where = f"build_layer is given the {name}" if layers_only else f"the whole model has the {name}"
    return Fault(f"{where} {value}", config=None if layers_only else changed, layer_config=changed)


def _repairs(repair: Fault, case: Case) -> bool:
    try:
        return agree(repair.logits(case), case.reference_logits)
    except Exception:  # the layer refuses this change, so it is not the repair
        return False


def _unused_parameters(case: Case) -> Iterator[str]:
    for kind, names in faults.by_kind(case.parameters).items():
        doubled = {name: 2 * case.parameters[name] for name in names}
        if not Fault(kind, doubled).is_visible(case):
            yield f"{kind} has no influence on our logits: does the layer's forward use it?"


def _position_hint(ours: Tensor, theirs: Tensor) -> str:
    """Return a hint from the first position, which attends to itself only, independent of position embeddings."""
    if agree(ours[:, 0], theirs[:, 0]):
        return (
            "at the first position the logits agree: look at what depends on other positions, the rotary embedding "
            "(its theta, scaling, layout), the linear biases, the order and grouping of the query and key rows"
        )
    return (
        "at the first position already they differ: look at the norms, the MLP, the order of the residuals in your "
        "layer, and at the rules of the weight map, one by one"
    )
