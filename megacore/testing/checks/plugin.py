"""Checks of the plugin as a distribution: found, pinned, quick to import, with all hooks, sources and presets."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint, entry_points, version

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from megacore.errors import ConfigError, UnsupportedSourceError
from megacore.hookspecs import FAMILY_HOOKS, PROJECT
from megacore.plugins import Family, get_family
from megacore.testing.checks.base import FamilyChecks
from megacore.weights.binding import bind

_LOAD_WITHOUT_TORCH = """
import sys
from importlib.abc import MetaPathFinder
from importlib.metadata import EntryPoint

class Refuse(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name in ("torch", "transformers"):
            raise RuntimeError(f"{name} is imported while the plugin loads")

sys.meta_path.insert(0, Refuse())
list(EntryPoint(*sys.argv[1:]).load().model_families())
"""


class PluginChecks(FamilyChecks):
    """Checks of the plugin as a distribution."""

    def test_the_plugin_is_found(self) -> None:
        """An entry point in the group ``megacore`` leads to a plugin that declares the family.

        Troubleshooting: is the plugin installed (``pip install -e .``)? ``megacore plugins`` says why one is not used.
        """
        assert get_family(self.family).name == self.family
        assert _entry_point(get_family(self.family)).value

    def test_the_plugin_pins_the_core(self) -> None:
        """The distribution requires a range of megacore that contains this version, but not the next major one.

        Troubleshooting: ``dependencies = ["megacore>=0.1,<0.2", …]`` in ``pyproject.toml``, then install it again.
        """
        distribution = _entry_point(get_family(self.family)).dist
        assert distribution is not None
        requirements = [Requirement(text) for text in distribution.requires or ()]
        pins = [
            need.specifier
            for need in requirements
            if canonicalize_name(need.name) == PROJECT and (need.marker is None or need.marker.evaluate())
        ]  # not the requirements of an extra, such as `megacore[test]`
        installed = Version(version(PROJECT))
        assert pins, f"{distribution.name} does not require {PROJECT}: add it to the dependencies in pyproject.toml"
        for pin in pins:
            assert pin.contains(installed, prereleases=True), f"{PROJECT} {installed} is not in {pin}"
            assert not pin.contains(f"{installed.major + 1}.0"), f"{PROJECT} has no upper bound in '{pin}'"

    def test_importing_the_plugin_is_light(self) -> None:
        """Loading the plugin and declaring its families imports neither torch nor transformers.

        Troubleshooting: every ``megacore`` command loads every plugin. The traceback names the import: move it into
        the function that needs it, or under ``if TYPE_CHECKING``. ``megacore.model``, ``megacore.weights`` and
        ``megacore.parallel`` import torch; ``megacore``, ``megacore.config`` and ``megacore.errors`` do not.
        """
        entry = _entry_point(get_family(self.family))
        search_path = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        command = [sys.executable, "-c", _LOAD_WITHOUT_TORCH, entry.name, entry.value, entry.group]
        loading = subprocess.run(command, capture_output=True, text=True, env=os.environ | search_path)
        assert loading.returncode == 0, f"the plugin is not light:\n{loading.stderr}"

    def test_every_hook_is_implemented(self) -> None:
        """The plugin implements ``model_families`` and the four hooks that work for a family.

        Troubleshooting: is each function marked with ``@hookimpl``, in the module that the entry point names?
        """
        implemented = get_family(self.family).plugin.hooks
        missing = [hook for hook in ("model_families", *FAMILY_HOOKS) if hook not in implemented]
        assert not missing, f"not implemented: {', '.join(missing)}"

    def test_every_source_is_tested(self) -> None:
        """All ``sources`` that the family declares are tested, by this class and others for the family together.

        Troubleshooting: list every format that the weight maps support in ``ModelFamily(sources=…)``, and test it. A
        format that needs its own ``publish``, or an extra that may be missing, can have its own test class.
        """
        classes = [tests for tests in _all_subclasses(FamilyChecks) if getattr(tests, "family", None) == self.family]
        tested = {source for tests in classes for source in tests.sources}
        declared = get_family(self.family).family.sources
        untested = [source for source in declared if source not in tested]
        assert not untested, f"no test class of family {self.family!r} has {', '.join(untested)} among its sources"
        unknown = [source for source in self.sources if source not in declared]
        assert not unknown, f"family {self.family!r} does not declare the sources {', '.join(unknown)}"

    @pytest.mark.parametrize("hook", ["weight_map", "qkv_permutation"])
    def test_an_unsupported_source_is_refused(self, style: str, hook: str) -> None:
        """The hooks with a ``source`` argument raise UnsupportedSourceError for an unknown source.

        Troubleshooting: begin each with ``if source != "hf": raise UnsupportedSourceError(…)``, naming the known ones.
        """
        unknown = "no-such-format"
        try:
            answer = getattr(get_family(self.family), hook)(self.tiny_configs()[style], unknown)
        except UnsupportedSourceError as error:
            assert unknown in str(error), f"the message of {hook} does not name the format {unknown!r}: {error}"
        else:
            pytest.fail(f"{hook} answers for the unknown format {unknown!r} with {answer!r:.80}")

    def test_every_preset_is_a_model(self) -> None:
        """Each published size is a valid configuration that a weight map supports.

        A source that cannot represent a size, for example an older format, raises a ConfigError.

        Troubleshooting: the keys of ``presets`` are the fields of ``config_class``, without ``family``.
        """
        family = get_family(self.family)
        for size in family.family.presets:
            config = dataclasses.replace(family.preset(size), num_layers=2)
            refusals = {}
            for source in family.family.sources:
                try:
                    bind(family, config, source)
                except ConfigError as error:
                    refusals[source] = str(error)
            assert len(refusals) < len(family.family.sources), f"no source can hold size {size}: {refusals}"


def _all_subclasses(tests: type[FamilyChecks]) -> Iterator[type[FamilyChecks]]:
    for subclass in tests.__subclasses__():
        yield subclass
        yield from _all_subclasses(subclass)


def _entry_point(family: Family) -> EntryPoint:
    """Return the entry point through which ``family`` was found."""
    owner = family.plugin
    found = [
        point
        for point in entry_points(group=PROJECT, name=owner.entry_point)
        if point.dist is not None and point.dist.name == owner.distribution
    ]
    assert found, f"{owner.label} has no entry point {owner.entry_point!r} in the group {PROJECT!r}"
    return found[0]
