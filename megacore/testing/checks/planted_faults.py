"""Checks that faults planted in the model change its logits, so that the comparison with the reference has power."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from megacore.testing import faults
from megacore.testing.case import Case
from megacore.testing.checks.base import FamilyChecks
from megacore.testing.faults import Fault
from megacore.testing.numerics import VISIBLE


class PlantedFaultChecks(FamilyChecks):
    """Checks that planted faults are visible."""

    def test_a_transposed_weight_shows(self, case: Case) -> None:
        """A transposed square weight changes the logits.

        Troubleshooting: does the layer's ``forward`` use that weight?
        """
        self._check_visible(case, faults.transposed_weights)

    def test_swapped_keys_and_values_show(self, case: Case) -> None:
        """Swapped keys and values change the logits.

        Troubleshooting: does ``publish`` write random values, or a symmetric pattern?
        """
        self._check_visible(case, faults.swapped_keys_and_values)

    def test_a_wrong_rotary_layout_shows(self, case: Case) -> None:
        """Rotary pairs read as halves, or halves as pairs, change the logits.

        Troubleshooting: does the layer pass ``positions`` to its attention?
        """
        self._check_visible(case, faults.wrong_rotary_layout)

    def test_a_skipped_bias_shows(self, case: Case) -> None:
        """A skipped bias changes the logits.

        Troubleshooting: are the published biases zero, as in a newly constructed model? See ``publish``.
        """
        self._check_visible(case, faults.skipped_biases)

    def test_a_wrong_eps_shows(self, case: Case) -> None:
        """A different eps in the layers' norms changes the logits.

        Troubleshooting: choose an unusual ``norm_eps`` in the tiny configuration, for example 1e-3. If that does not
        help, the layer's norms do not use ``config.norm_eps``.
        """
        self._check_visible(case, faults.wrong_eps)

    def test_a_layer_off_by_one_shows(self, case: Case) -> None:
        """A parameter taken from the neighbouring layer changes the logits.

        Troubleshooting: do all layers have the same published weights? Is the parameter used?
        """
        self._check_visible(case, faults.layers_off_by_one)

    def test_swapped_gate_and_up_show(self, case: Case) -> None:
        """Swapped gate and up projections change the logits.

        Troubleshooting: with the identity as activation they do not.
        """
        self._check_visible(case, faults.swapped_gate_and_up)

    def _check_visible(self, case: Case, plant: Callable[[Case], Iterator[Fault]]) -> None:
        planted = list(plant(case))
        if not planted:
            pytest.skip("the fault does not apply to this model")
        hidden = [fault.description for fault in planted if not fault.is_visible(case)]
        assert not hidden, f"no logit moves by {VISIBLE:g} when {'; nor when '.join(hidden)}"
