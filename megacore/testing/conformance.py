"""The conformance kit: the test class that the author of a plugin subclasses. Its checks are in ``checks/``."""

from __future__ import annotations

import inspect
from typing import Any, ClassVar

import pytest

from megacore.testing.case import Case
from megacore.testing.checks.computation import ComputationChecks
from megacore.testing.checks.configuration import ConfigurationChecks
from megacore.testing.checks.planted_faults import PlantedFaultChecks
from megacore.testing.checks.plugin import PluginChecks
from megacore.testing.checks.weights import WeightChecks

_OVERRIDABLE = (
    "sources",
    "tiny_config",
    "tiny_configs",
    "publish",
    "reference",
    "reference_parameters",
)
"""Attributes that a subclass of :class:`ModelFamilyTests` may override."""


# pytest runs the checks of the last base class first.
class ModelFamilyTests(PlantedFaultChecks, ComputationChecks, WeightChecks, ConfigurationChecks, PluginChecks):
    """All checks that a model plugin has to pass, on random weights, on a CPU, without a network.

    Subclass it in a test file, with a name that pytest collects. Name the family, and return a configuration so small
    that a model of it runs in milliseconds, or several for a family with several styles:

    >>> class TestMpt(ModelFamilyTests):
    ...     family = "mpt"
    ...
    ...     def tiny_config(self):
    ...         return ModelConfig(
    ...             family="mpt",
    ...             num_layers=3,
    ...             hidden_size=24,
    ...             ffn_hidden_size=40,
    ...             num_attention_heads=6,
    ...             num_kv_heads=3,
    ...             head_dim=4,
    ...             vocab_size=99,
    ...             max_position_embeddings=64,
    ...             norm_eps=1e-3,
    ...             rope_theta=1234.0,
    ...         )

    Choose odd sizes that differ from one another, at least 2 layers and, if the family supports it, 2 key-value heads,
    and values that are nobody's default. Then values that the plugin ignores or hard-codes are detected.

    A check that cannot hold may only be overridden under ``@pytest.mark.xfail(reason="…")``.

    Attributes:
        family: Name of the family.
        sources: Formats to test, all that the family declares.
    """

    _cases: ClassVar[dict[tuple[str, str], Case]]

    def __init_subclass__(cls, **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        cls._cases = {}
        if "test_the_kit_is_intact" in vars(cls):
            raise TypeError(f"{cls.__name__} replaces test_the_kit_is_intact, which checks the others")

    @pytest.fixture
    def case(self, style: str, source: str, tmp_path_factory: pytest.TempPathFactory) -> Case:
        """Return the model of ``style`` in format ``source``, which the checks of one class share."""
        if (style, source) not in self._cases:
            directory = tmp_path_factory.mktemp(f"{self.family}-{source}")
            self._cases[style, source] = Case(self, self.tiny_configs()[style], source, directory)
        return self._cases[style, source]

    def test_the_kit_is_intact(self) -> None:
        """No check is deleted or overridden, except under ``@pytest.mark.xfail(reason="…")``.

        The same holds for the fixture ``case``, ``pytest_generate_tests`` and the kit's helpers. At least one
        configuration and one format are tested.

        Troubleshooting: give the reason why the check cannot hold for this family, and call the original::

            @pytest.mark.xfail(reason="the reference cannot compute gradients")
            def test_gradients_are_those_of_the_reference(self, case):
                super().test_gradients_are_those_of_the_reference(case)
        """
        changed = [
            name
            for kit_class in ModelFamilyTests.__mro__[:-1]
            for name, check in vars(kit_class).items()
            if not name.startswith("__")
            and name not in _OVERRIDABLE
            and (found := inspect.getattr_static(type(self), name)) is not check
            and not (name.startswith("test_") and _is_excused(found))
        ]
        assert not changed, f"deleted or overridden without @pytest.mark.xfail(reason=...): {', '.join(changed)}"
        assert self.tiny_configs(), "tiny_configs() returns no configuration: nothing is tested"
        assert self.sources, "sources names no format: nothing is tested"


def _is_excused(check: Any) -> bool:
    return any(mark.name == "xfail" and mark.kwargs.get("reason") for mark in getattr(check, "pytestmark", ()))
