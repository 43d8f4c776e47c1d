"""The conformance kit: a test class that the author of a plugin subclasses.

Each check's docstring says what it demands and, under *Troubleshooting*, what to look at when it fails.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import EntryPoint, entry_points, version
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from torch import Tensor, nn

from megacore.config import ModelConfig
from megacore.errors import ConfigError, LayoutError, UnsupportedSourceError
from megacore.hookspecs import FAMILY_HOOKS, PROJECT, ReferenceModel
from megacore.model import ACTIVATIONS
from megacore.parallel import ParallelSizes, ParameterSpec, check_tensor_parallel
from megacore.plugins import Family, get_family
from megacore.testing import faults
from megacore.testing.case import Case
from megacore.testing.diagnosis import explain
from megacore.testing.faults import Fault
from megacore.testing.numerics import (
    VISIBLE,
    agree,
    differing_gradients,
    largest_difference,
    logits_and_gradients,
    logits_token_by_token,
    logits_with,
)
from megacore.testing.publishing import save_random
from megacore.testing.ranks import shared_pool
from megacore.weights.binding import bind
from megacore.weights.rules import FusedQKV, QKVOrder

_CONFIG_MISTAKES = (ConfigError, KeyError, TypeError, ValueError, ArithmeticError)
"""What ``config_from_source`` may raise for a bad file: the core turns it into a ConfigError that names the file."""

_OF_THE_AUTHOR = (
    "sources",
    "tiny_config",
    "tiny_configs",
    "publish",
    "reference",
    "reference_parameters",
    "_cases",
)
"""The attributes of :class:`ModelFamilyTests` that a subclass may have of its own."""

_LOAD_LIGHTLY = """
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


class ModelFamilyTests:
    """Every check that a model plugin has to pass, on random weights, on a CPU, without a network.

    Subclass it in a test file, with a name that pytest collects. Say which family is tested, and give a configuration
    so small that a model of it runs in milliseconds, or several where the family has several styles:

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

    Choose odd sizes that differ from one another, at least 2 layers and, where the family has them, 2 key-value heads,
    and values that are nobody's default: what is left out or hard-coded then shows.

    A check that cannot hold is overridden under ``@pytest.mark.xfail(reason="…")``; in no other way.

    Attributes:
        family: the name of the family.
        sources: the formats to test; all that the family declares.
    """

    family: ClassVar[str]
    sources: ClassVar[tuple[str, ...]] = ("hf",)

    _cases: ClassVar[dict[tuple[str, str], Case]]

    # What the author says

    def tiny_config(self) -> ModelConfig:
        """A configuration of the family's only style."""
        raise NotImplementedError(f"{type(self).__name__} needs a tiny_config(), or tiny_configs()")

    def tiny_configs(self) -> dict[str, ModelConfig]:
        """A configuration of each style, by a name for the reports."""
        return {"tiny": self.tiny_config()}

    def publish(self, config: ModelConfig, directory: Path, source: str) -> None:
        """Write a checkpoint of random weights in format ``source`` into the empty ``directory``.

        It has to be made without megacore's weight map, or a mistake in it would cancel out. For ``"hf"`` the model
        that ``load_reference`` returns for ``path=None`` does it, where its ``.model`` is one of transformers. Fill a
        model of your own with :func:`~megacore.testing.randomize`.
        """
        if source != "hf":
            raise NotImplementedError(
                f"override publish() to write a checkpoint of random weights in format {source!r}"
            )
        save_random(get_family(self.family).load_reference(config, None, torch.float32, _CPU), directory)

    def reference(self, config: ModelConfig, directory: Path, source: str) -> ReferenceModel:
        """The independent implementation, in float32, with the weights that :meth:`publish` wrote."""
        return get_family(self.family).load_reference(config, directory, torch.float32, _CPU)

    def reference_parameters(self, reference: ReferenceModel) -> Mapping[str, Tensor]:
        """The parameters of ``reference`` by their published names, for their gradients and to see that all are used.

        Works for a reference that is a module, or whose ``.model`` is one, if the files name tensors as the module
        does.
        """
        module = getattr(reference, "model", reference)
        if not isinstance(module, nn.Module):
            raise NotImplementedError(
                "load_reference returns neither a torch module nor an object with one in .model: override "
                "reference_parameters() in your subclass of ModelFamilyTests"
            )
        return dict(module.named_parameters())

    # How the checks run

    def __init_subclass__(cls, **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        if "test_the_kit_is_intact" in vars(cls):
            raise TypeError(f"{cls.__name__} replaces test_the_kit_is_intact, which watches over the others")
        cls._cases = {}

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        if "style" in metafunc.fixturenames:
            metafunc.parametrize("style", list(self.tiny_configs()))
        if "source" in metafunc.fixturenames:
            metafunc.parametrize("source", self.sources)

    @pytest.fixture
    def case(self, style: str, source: str, tmp_path_factory: pytest.TempPathFactory) -> Case:
        """The model of ``style`` in format ``source``, shared by the checks of one class."""
        if (style, source) not in self._cases:
            directory = tmp_path_factory.mktemp(f"{self.family}-{source}")
            self._cases[style, source] = Case(self, self.tiny_configs()[style], source, directory)
        return self._cases[style, source]

    # The plugin

    def test_the_kit_is_intact(self) -> None:
        """No check is deleted or overridden, except under ``@pytest.mark.xfail(reason="…")``.

        Neither is what the checks are run by: the fixture ``case``, ``pytest_generate_tests``, the kit's own helpers.
        And there is something to check: a configuration and a format at least.

        Troubleshooting: say why the check cannot hold for this family, and let the override call the original::

            @pytest.mark.xfail(reason="the reference cannot compute gradients")
            def test_gradients_are_those_of_the_reference(self, case):
                super().test_gradients_are_those_of_the_reference(case)
        """
        changed = [
            name
            for name, check in vars(ModelFamilyTests).items()
            if not name.startswith("__")
            and name not in _OF_THE_AUTHOR
            and (found := inspect.getattr_static(type(self), name)) is not check
            and not (name.startswith("test_") and _is_excused(found))
        ]
        assert not changed, f"deleted or overridden without @pytest.mark.xfail(reason=...): {', '.join(changed)}"
        assert self.tiny_configs(), "tiny_configs() gives no configuration: nothing is tested"
        assert self.sources, "sources names no format: nothing is tested"

    def test_the_plugin_is_found(self) -> None:
        """An entry point in the group ``megacore`` leads to a plugin that declares the family.

        Troubleshooting: is the plugin installed (``pip install -e .``)? ``megacore plugins`` says why one is not used.
        """
        assert get_family(self.family).name == self.family
        assert _entry_point(get_family(self.family)).value

    def test_the_plugin_pins_the_core(self) -> None:
        """The distribution requires a range of megacore that this one is in, and the next incompatible one is not.

        Troubleshooting: ``dependencies = ["megacore>=0.1,<0.2", …]`` in ``pyproject.toml``, then install it again.
        """
        distribution = _entry_point(get_family(self.family)).dist
        assert distribution is not None
        requirements = [Requirement(text) for text in distribution.requires or ()]
        pins = [
            need.specifier
            for need in requirements
            if canonicalize_name(need.name) == PROJECT and (need.marker is None or need.marker.evaluate())
        ]  # not those of an extra, as `megacore[test]` is
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
        found = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        arguments = (entry.name, entry.value, entry.group)
        loading = subprocess.run(
            [sys.executable, "-c", _LOAD_LIGHTLY, *arguments], capture_output=True, text=True, env=os.environ | found
        )
        assert loading.returncode == 0, f"the plugin is not light:\n{loading.stderr}"

    def test_every_hook_is_implemented(self) -> None:
        """The plugin implements ``model_families`` and the four hooks that work for a family.

        Troubleshooting: is each function marked with ``@hookimpl``, in the module that the entry point names?
        """
        implemented = get_family(self.family).plugin.hooks
        missing = [hook for hook in ("model_families", *FAMILY_HOOKS) if hook not in implemented]
        assert not missing, f"not implemented: {', '.join(missing)}"

    def test_every_source_is_tested(self) -> None:
        """``sources`` are those that the family declares, of this test class and others for the family together.

        Troubleshooting: a format that the weight maps cover is listed in ``ModelFamily(sources=…)``, and tested. One
        that needs a ``publish`` of its own, or an extra that may be missing, can have a test class of its own beside
        this one.
        """
        classes = [
            tests for tests in _all_subclasses(ModelFamilyTests) if getattr(tests, "family", None) == self.family
        ]
        tested = {source for tests in classes for source in tests.sources}
        declared = get_family(self.family).family.sources
        untested = [source for source in declared if source not in tested]
        assert not untested, f"no test class of family {self.family!r} has {', '.join(untested)} among its sources"
        unknown = [source for source in self.sources if source not in declared]
        assert not unknown, f"family {self.family!r} does not declare the sources {', '.join(unknown)}"

    @pytest.mark.parametrize("hook", ["weight_map", "qkv_permutation"])
    def test_an_unsupported_source_is_refused(self, style: str, hook: str) -> None:
        """The hooks that are given a source raise UnsupportedSourceError for one that they do not know.

        Troubleshooting: begin each with ``if source != "hf": raise UnsupportedSourceError(…)``, naming what is read.
        """
        unknown = "no-such-format"
        try:
            answer = getattr(get_family(self.family), hook)(self.tiny_configs()[style], unknown)
        except UnsupportedSourceError as error:
            assert unknown in str(error), f"the message of {hook} does not name the format {unknown!r}: {error}"
        else:
            pytest.fail(f"{hook} answers for the unknown format {unknown!r} with {answer!r:.80}")

    def test_every_preset_is_a_model(self) -> None:
        """Each published size is a valid configuration that a weight map fits.

        A source that cannot hold one, a format older than that size for example, says so with a ConfigError.

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

    # The configuration

    def test_the_configuration_can_show_a_fault(self, style: str) -> None:
        """The tiny configuration has what the other checks need: 2 layers, a pair of rotary pairs.

        Troubleshooting: a model of one layer hides a layer's number that is off by one.
        """
        config = self.tiny_configs()[style]
        assert config.num_layers >= 2, "give the tiny configuration 2 layers or more"
        assert config.head_dim >= 4, "give the tiny configuration a head_dim of 4 or more: 2 is a single rotary pair"
        assert config.max_position_embeddings >= 9, "give the tiny configuration max_position_embeddings of 9 or more"

    def test_the_configuration_reads_both_ways(self, case: Case) -> None:
        """``config_from_source(config_to_source(config))`` is ``config``, and a real file's configuration too.

        The same holds for other values of the vocabulary, the layers, eps and the rotary base, unless
        ``config_to_source`` refuses them with a ConfigError.

        Troubleshooting: a key that only one of the two functions knows, or that has another name in the format, falls
        back to a default. A field that the format cannot express has to have one value, and others refused.
        """
        family, config = case.family.family, case.config
        assert type(config) is family.config_class, "config_class of the ModelFamily is not the class of the config"
        assert config.family == self.family
        stored = json.loads(json.dumps(config.to_dict()))
        assert family.config_class.from_dict(stored) == config, "the config does not survive being stored as JSON"

        assert _differences(config, _there_and_back(case, config)) == {}, "lost on the way to the format and back"
        read = family.config_from_source(case.published.config, case.source)
        assert _differences(config, read) == {}, (
            f"{case.published.config_file.name} of a real checkpoint says otherwise"
        )

        others: dict[str, Any] = {
            "vocab_size": config.vocab_size + 1,
            "num_layers": config.num_layers + 1,
            "norm_eps": 2 * config.norm_eps,
        }
        if config.position_embedding == "rotary":
            others["rope_theta"] = 2 * config.rope_theta
        for name, value in others.items():
            changed = dataclasses.replace(config, **{name: value})
            try:
                back = _there_and_back(case, changed)
            except ConfigError:
                continue
            assert _differences(changed, back) == {}, f"{name} is lost on the way to the format and back"

    def test_a_wrong_configuration_is_refused(self, case: Case) -> None:
        """What the plugin does not implement is a ConfigError that names it; a missing key is no other accident.

        Tried: an activation and (format ``hf``) a ``rope_type`` that do not exist, and each key left out.

        Troubleshooting: look values up in a dictionary of what is implemented, and raise ConfigError otherwise; read
        what has no default as ``published["key"]``, whose KeyError the core explains.
        """
        read, source = case.family.family.config_from_source, case.source
        published = case.family.family.config_to_source(case.config, source)

        for key in published:
            lacking = {name: value for name, value in published.items() if name != key}
            try:
                read(lacking, source)
            except _CONFIG_MISTAKES:
                pass
            except Exception as error:
                pytest.fail(f"without {key!r}, config_from_source raises {error!r}; raise a ConfigError that names it")

        wrong: list[dict[str, Any]] = [{key: "no-such-activation"} for key in _keys_of_activation(case)]
        if case.config.position_embedding == "rotary" and source == "hf":
            scaling = {"rope_type": "no-such-type", "factor": 2.0}
            wrong.append({"rope_scaling": scaling, "rope_parameters": {"rope_theta": 10000.0, **scaling}})
        for change in wrong:
            try:
                accepted = read({**published, **change}, source)
            except ConfigError as error:
                named = ("no-such", *change)
                assert any(name in str(error) for name in named), f"the message does not name {change}: {error}"
            else:
                pytest.fail(f"config_from_source reads {change} without complaint, as {accepted}")

    # The weights

    def test_the_weight_map_accounts_for_every_tensor(self, case: Case) -> None:
        """Every parameter is produced once, every source tensor used once or ignored; all shapes agree.

        What is ignored is nothing that the reference learns.

        Troubleshooting: the message lists the names. *Not produced*: a rule is missing, or its native name misspelt.
        *Produced, but not a parameter*: the layer lacks it. *Missing* or *unknown*: a source name is misspelt. Another
        shape: the rule takes another tensor than you meant.
        """
        case.bound.check_sources(case.published.shapes(case.bound.source_shapes()), str(case.published.directory))
        learned = set(case.tests.reference_parameters(case.reference))
        used = {*case.bound.source_shapes(), *case.bound.weight_map.aliases}
        assert learned <= used, f"the reference learns what the weight map ignores: {', '.join(sorted(learned - used))}"

    def test_the_qkv_permutation_can_be_undone(self, case: Case) -> None:
        """The hook returns a permutation of the projection's rows; undone it gives back weights and biases.

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
        assert not unordered, f"FusedQKV has to make these, or qkv_permutation passes them by: {', '.join(unordered)}"
        back = case.to_source(case.to_native(case.tensors))
        changed = [name for name, tensor in case.tensors.items() if not torch.equal(back[name], tensor)]
        assert not changed, f"not the same after the weight map and back: {', '.join(changed)}"

    def test_the_round_trip_is_bit_exact(self, case: Case) -> None:
        """Converted and exported, the checkpoint is the published one: every bit of every tensor, and the config.

        The reference loads it and computes the same logits.

        Troubleshooting: a wrong round trip of right rules is megacore's fault; report it.
        """
        self._check_round_trip(case, tp=1, pp=1)

    def test_the_round_trip_of_a_split_checkpoint_is_bit_exact(self, case: Case) -> None:
        """The same from a checkpoint that is cut over tp 2 × pp 2, as far as the model can be cut.

        Troubleshooting: are all parameters of the layer those of megacore's modules, whose cuts it knows?
        """
        self._check_round_trip(case, tp=_tp_of(case), pp=2)

    def test_a_split_checkpoint_loads_the_same(self, case: Case) -> None:
        """Cut over tp and pp and loaded again, the model has the very same parameters.

        Troubleshooting: as for the round trip of a split checkpoint.
        """
        split = case.load(tp=_tp_of(case), pp=2)
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
        assert not changed, f"not bit for bit what was published: {', '.join(changed)}"
        config = case.family.family.config_from_source(exported.config, case.source)
        assert _differences(case.config, config) == {}, f"{exported.config_file} does not say what was published"
        with torch.no_grad():
            logits = self.reference(case.config, exported.directory, case.source)(case.input_ids)
        assert torch.equal(logits, case.reference_logits), "the reference computes other logits from the exported files"

    # The numbers

    def test_the_reference_is_independent_and_repeatable(self, case: Case) -> None:
        """The reference has the published weights, is in evaluation mode, and is not megacore's own code.

        Given no path it has random weights, in the dtype that was asked for.

        Troubleshooting: ``TransformersReference.load`` in ``megacore.verification`` does all of that.
        """
        with torch.no_grad():
            logits = case.reference(case.input_ids)
            assert torch.equal(logits, case.reference_logits), "two calls of the reference differ: is dropout on?"
            assert logits.shape == (*case.input_ids.shape, case.config.vocab_size)
            fresh = case.family.load_reference(case.config, None, torch.float64, _CPU)(case.input_ids)
        assert (fresh.shape, fresh.dtype) == (logits.shape, torch.float64), "with path=None and dtype float64"
        model = getattr(case.reference, "model", case.reference)
        assert not type(model).__module__.startswith("megacore."), f"{type(model)} is what it is to be compared with"
        held = case.tests.reference_parameters(case.reference)
        missing = [name for name in case.tensors if name not in held]
        assert not missing, f"the reference has no parameters {', '.join(missing)}: override reference_parameters()"
        other = [name for name, tensor in case.tensors.items() if not torch.equal(held[name], tensor)]
        assert not other, f"the reference has other weights than the files: {', '.join(other)}; does it load path?"

    def test_logits_are_those_of_the_reference(self, case: Case) -> None:
        """In float32, on logits of order 1, within rtol 1.3e-6 and atol 1e-5.

        Troubleshooting: the message says which change would make them agree, if one of the usual mistakes is behind
        it; otherwise, where to look.
        """
        spread = case.reference_logits.std().item()
        assert 0.3 < spread < 3, f"the bounds are for logits of order 1; these vary by {spread:.2g}: see publish()"
        if not agree(case.logits, case.reference_logits):
            pytest.fail(explain(case))

    def test_gradients_are_those_of_the_reference(self, case: Case) -> None:
        """The gradient of the loss by every tensor, taken to published names by the weight map, is the reference's.

        Troubleshooting: with logits that agree, something in the layer is detached, or computed twice.
        """
        problems = differing_gradients(case.to_source(case.gradients), case.reference_gradients)
        assert not problems, f"other gradients than the reference's: {', '.join(problems)}"

    def test_segments_of_a_row_do_not_see_each_other(self, case: Case) -> None:
        """Two segments packed into one row have the logits that the reference gives to each alone.

        Troubleshooting: does the layer hand ``positions`` on to its attention? An attention of your own has to keep to
        ``positions.segments``, and everything else in the layer to one token at a time.
        """
        first = max(1, case.input_ids.shape[1] // 3)
        numbers = (torch.arange(case.input_ids.shape[1]) >= first).int().expand(case.input_ids.shape)
        packed = logits_with(case.family, case.converted_config, case.parameters, case.input_ids, segments=numbers)
        with torch.no_grad():
            alone = torch.cat(
                [case.reference(case.input_ids[:, part]) for part in (slice(first), slice(first, None))], 1
            )
        apart = largest_difference(packed, alone)
        assert agree(packed, alone), f"packed into one row, the logits differ by up to {apart:.2g}"

    def test_tokens_that_come_one_by_one_have_the_logits_of_the_whole(self, case: Case) -> None:
        """Text is generated token by token, with the keys and values of those before it kept.

        Troubleshooting: megacore's ``SelfAttention`` keeps them. An attention of your own calls
        ``positions.cache.attend(self, query, key, value, positions)`` where ``positions.cache`` is not ``None``, and
        takes the angles of its rotary embedding from ``positions``; everything else in the layer keeps to one token.
        """
        third = max(1, case.input_ids.shape[1] // 3)
        starts = [third + row for row in range(len(case.input_ids))]
        stepwise = logits_token_by_token(case.family, case.converted_config, case.parameters, case.input_ids, starts)
        for ours, theirs, start in zip(stepwise, case.reference_logits, starts, strict=True):
            whole = theirs[start : start + len(ours)]
            apart = largest_difference(ours, whole)
            assert agree(ours, whole), f"token by token, the logits differ by up to {apart:.2g}"

    @pytest.mark.parametrize("sequence_parallel", [False, True], ids=["", "sequence-parallel"])
    def test_logits_and_gradients_at_tp_2(self, case: Case, sequence_parallel: bool) -> None:
        """Two processes that hold half the model each compute the reference's logits, and one process's gradients.

        Skipped for a configuration that two ranks cannot share: a single query head, or an odd number of them on a
        single key-value head.

        Troubleshooting: build the layer of modules in ``megacore.model``, with the ``parallel`` that it is given; a
        module of your own with parameters derives from ``megacore.parallel.ReplicatedModule`` and reads them with
        ``self.replicated(name)``.
        """
        if _tp_of(case) == 1:
            pytest.skip("this configuration cannot be cut over two ranks")
        results = shared_pool().run(
            logits_and_gradients,
            case.checkpoint(tp=2, pp=2),
            case.input_ids,
            case.targets,
            sizes=ParallelSizes(tp=2, sequence_parallel=sequence_parallel),
        )
        for logits, gradients in results:
            apart = largest_difference(logits, case.reference_logits)
            assert agree(logits, case.reference_logits), f"at tp 2 the logits differ by up to {apart:.2g}"
            problems = differing_gradients(gradients, case.gradients)
            assert not problems, f"at tp 2 other gradients than in one process: {', '.join(problems)}"

    # Planted faults: would the logits betray them?

    def test_a_transposed_weight_shows(self, case: Case) -> None:
        """A square weight that is transposed changes the logits.

        Troubleshooting: does the layer's ``forward`` use that weight?
        """
        self._check_visible(case, faults.transposed_weights)

    def test_swapped_keys_and_values_show(self, case: Case) -> None:
        """Keys in the place of values change the logits.

        Troubleshooting: does ``publish`` write random values, or a symmetric pattern?
        """
        self._check_visible(case, faults.swapped_keys_and_values)

    def test_a_wrong_rotary_layout_shows(self, case: Case) -> None:
        """Rotary pairs taken for halves, or halves for pairs, change the logits.

        Troubleshooting: does the layer hand ``positions`` on to its attention?
        """
        self._check_visible(case, faults.wrong_rotary_layout)

    def test_a_skipped_bias_shows(self, case: Case) -> None:
        """A bias that is left out changes the logits.

        Troubleshooting: are the published biases zero? A model fresh from its constructor has such; see ``publish``.
        """
        self._check_visible(case, faults.skipped_biases)

    def test_a_wrong_eps_shows(self, case: Case) -> None:
        """Norms in the layers with another eps change the logits.

        Troubleshooting: choose an unusual ``norm_eps`` in the tiny configuration, 1e-3 for example. If that does not
        help, the layer's norms have an eps of their own instead of ``config.norm_eps``.
        """
        self._check_visible(case, faults.wrong_eps)

    def test_a_layer_off_by_one_shows(self, case: Case) -> None:
        """A parameter taken from the neighbouring layer changes the logits.

        Troubleshooting: are the layers' published weights all the same? Is the parameter used?
        """
        self._check_visible(case, faults.layers_off_by_one)

    def test_swapped_gate_and_up_show(self, case: Case) -> None:
        """The gate in the place of the up projection changes the logits.

        Troubleshooting: with the identity as activation they would not.
        """
        self._check_visible(case, faults.swapped_gate_and_up)

    def _check_visible(self, case: Case, plant: Callable[[Case], Iterator[Fault]]) -> None:
        planted = list(plant(case))
        if not planted:
            pytest.skip("there is nothing in this model to plant the fault in")
        hidden = [fault.what for fault in planted if not largest_difference(fault.logits(case), case.logits) > VISIBLE]
        assert not hidden, f"no logit moves by {VISIBLE:g} when {'; nor when '.join(hidden)}"


_CPU = torch.device("cpu")


def _is_excused(check: Any) -> bool:
    return any(mark.name == "xfail" and mark.kwargs.get("reason") for mark in getattr(check, "pytestmark", ()))


def _all_subclasses(tests: type[ModelFamilyTests]) -> Iterator[type[ModelFamilyTests]]:
    for subclass in tests.__subclasses__():
        yield subclass
        yield from _all_subclasses(subclass)


def _entry_point(family: Family) -> EntryPoint:
    """The entry point that ``family`` was found through."""
    owner = family.plugin
    found = [
        point
        for point in entry_points(group=PROJECT, name=owner.entry_point)
        if point.dist is not None and point.dist.name == owner.distribution
    ]
    assert found, f"{owner.label} has no entry point {owner.entry_point!r} in the group {PROJECT!r}"
    return found[0]


def _there_and_back(case: Case, config: ModelConfig) -> ModelConfig:
    family = case.family.family
    written = json.loads(json.dumps(family.config_to_source(config, case.source)))
    return family.config_from_source(written, case.source)


def _differences(expected: ModelConfig, found: ModelConfig) -> dict[str, str]:
    """The fields that differ, with both values."""
    fields = [field.name for field in dataclasses.fields(expected)]
    pairs = {name: (getattr(expected, name), getattr(found, name, None)) for name in fields}
    return {name: f"{theirs!r} instead of {ours!r}" for name, (ours, theirs) in pairs.items() if ours != theirs}


def _keys_of_activation(case: Case) -> list[str]:
    """The keys of the published configuration that hold the activation: those that change with it."""
    write = case.family.family.config_to_source
    published = write(case.config, case.source)
    keys: list[str] = []
    for activation in ACTIVATIONS:
        try:
            other = write(dataclasses.replace(case.config, activation=activation), case.source)
        except Exception:  # the format has no word for this one
            continue
        keys += [key for key, value in other.items() if value != published.get(key) and isinstance(value, str)]
    return list(dict.fromkeys(keys))


def _tp_of(case: Case) -> int:
    """2, or 1 for a model with a single key-value head that an odd number of query heads share."""
    specs: dict[str, ParameterSpec] = case.bound.specs
    try:
        check_tensor_parallel(specs, 2)
    except LayoutError:
        if case.config.num_kv_heads > 1:
            raise
        return 1
    return 2


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)
