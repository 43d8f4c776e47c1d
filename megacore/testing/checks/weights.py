"""Checks of the weights: the weight map, the QKV permutation, and exact round trips."""

from __future__ import annotations

import torch
from torch import Tensor

from megacore.testing.case import Case
from megacore.testing.checks.base import FamilyChecks
from megacore.testing.checks.configuration import differing_fields
from megacore.weights.rules import FusedQKV, QKVOrder


class WeightChecks(FamilyChecks):
    """Checks of the weights."""

    def test_the_weight_map_accounts_for_every_tensor(self, case: Case) -> None:
        """Every parameter is produced once, every source tensor is used once or ignored, and all shapes agree.

        No parameter of the reference is ignored.

        Troubleshooting: the message lists the names. *Not produced*: a rule is missing, or its native name misspelt.
        *Produced, but not a parameter*: the layer lacks it. *Missing* or *unknown*: a source name is misspelt. A
        different shape: the rule uses the wrong tensor.
        """
        case.bound.check_sources(case.published.shapes(case.bound.source_shapes()), str(case.published.directory))
        learned = set(case.tests.reference_parameters(case.reference))
        used = {*case.bound.source_shapes(), *case.bound.weight_map.aliases}
        assert learned <= used, f"the reference learns what the weight map ignores: {', '.join(sorted(learned - used))}"

    def test_the_qkv_permutation_can_be_undone(self, case: Case) -> None:
        """The hook returns a permutation of the projection's rows, whose inverse restores weights and biases.

        The weight map applies it, in ``FusedQKV``, to the weight and to the bias of every ``linear_qkv``.

        Troubleshooting: the length is ``(num_attention_heads + 2 * num_kv_heads) * head_dim``, each row once.
        """
        order = QKVOrder.from_permutation(case.config, case.family.qkv_permutation(case.config, case.source))
        assert torch.equal(
            order.native_from_source[order.source_from_native], torch.arange(len(order.native_from_source))
        )
        unordered = [
            name for name, rule in case.bound.rules.items() if ".linear_qkv." in name and not isinstance(rule, FusedQKV)
        ]
        assert not unordered, f"FusedQKV must produce these, or qkv_permutation does not apply: {', '.join(unordered)}"
        back = case.to_source(case.to_native(case.tensors))
        changed = [name for name, tensor in case.tensors.items() if not torch.equal(back[name], tensor)]
        assert not changed, f"not the same after the weight map and back: {', '.join(changed)}"

    def test_the_round_trip_is_bit_exact(self, case: Case) -> None:
        """The checkpoint, converted and exported, is the published one: every bit of every tensor, and the config.

        The reference loads it and computes the same logits.

        Troubleshooting: if the rules are correct, a wrong round trip is a bug in megacore; report it.
        """
        self._check_round_trip(case, tp=1, pp=1)

    def test_the_round_trip_of_a_split_checkpoint_is_bit_exact(self, case: Case) -> None:
        """The round trip is exact from a checkpoint cut over tp 2 × pp 2 too, as far as the model can be cut.

        Troubleshooting: do all parameters of the layer belong to megacore's modules, which declare their cuts?
        """
        self._check_round_trip(case, tp=case.max_tp, pp=2)

    def test_a_split_checkpoint_loads_the_same(self, case: Case) -> None:
        """A checkpoint that is cut over tp and pp loads with exactly the same parameters.

        Troubleshooting: see the round trip of a split checkpoint.
        """
        split = case.load(tp=case.max_tp, pp=2)
        changed = [name for name, value in case.parameters.items() if not torch.equal(split[name], value)]
        assert not changed, f"not the same from a split checkpoint: {', '.join(changed)}"

    def _check_round_trip(self, case: Case, *, tp: int, pp: int) -> None:
        exported = case.export(tp=tp, pp=pp)
        back = case.read(exported)
        changed = [
            name
            for name, tensor in case.tensors.items()
            if back[name].dtype != tensor.dtype or not torch.equal(_bits(back[name]), _bits(tensor))
        ]
        assert not changed, f"not bit for bit the published tensors: {', '.join(changed)}"
        config = case.family.family.config_from_source(exported.config, case.source)
        assert differing_fields(case.config, config) == {}, f"{exported.config_file} is not the published one"
        with torch.no_grad():
            logits = self.reference(case.config, exported.directory, case.source)(case.input_ids)
        assert torch.equal(logits, case.reference_logits), (
            "the reference computes different logits from the exported files"
        )


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)
