"""Model plugins: discovery, checks that isolate a broken one, and dispatch to the plugin that owns a family.

Plugins are loaded on first use, never when a module is imported. An unusable plugin is recorded with the reason, which
is part of the error for its family; other families are not affected.
"""

from __future__ import annotations

import inspect
import logging
import os
import re
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cache
from importlib.metadata import Distribution, entry_points, version
from types import FunctionType, MethodType
from typing import TYPE_CHECKING, Any, TypeVar

import pluggy

from megacore import hookspecs
from megacore.errors import ConfigError, PluginError
from megacore.hookspecs import FAMILY_HOOKS, PROJECT, ModelFamily

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import torch
    from torch import nn

    from megacore.config import ModelConfig
    from megacore.hookspecs import ReferenceModel
    from megacore.parallel import ParallelContext
    from megacore.weights.rules import WeightMap

log = logging.getLogger(__name__)

DISABLE_VARIABLE = "MEGACORE_DISABLE_PLUGINS"  # distributions whose plugins are not loaded, separated by commas
HOOKS = ("model_families", *FAMILY_HOOKS)

_Result = TypeVar("_Result")


@dataclass(kw_only=True)
class LoadedPlugin:
    """A plugin that was found, usable or not.

    Attributes:
        entry_point: Name of its entry point, by convention the name of its family.
        plugin: Module or object with the hooks; ``None`` if the plugin is unusable.
        hooks: Names of the hooks that it implements or wraps.
        families: Declared families; empty if the plugin is unusable or only wraps the hooks of others.
        error: Reason why it is unusable, the end of a sentence that begins with :attr:`label`.
        disabled: True if the user disabled it.
    """

    distribution: str
    version: str
    entry_point: str
    plugin: object | None = None
    hooks: tuple[str, ...] = ()
    families: tuple[ModelFamily, ...] = ()
    error: PluginError | None = None
    disabled: bool = False

    @property
    def label(self) -> str:
        """Distribution and version, for messages."""
        return f"{self.distribution} {self.version}"

    @property
    def status(self) -> str:
        """``"active"``, ``"failed"`` or ``"disabled"``."""
        if self.disabled:
            return "disabled"
        return "failed" if self.error else "active"


@dataclass(frozen=True, kw_only=True)
class Family:
    """A model family bound to the plugin that owns it: the hooks of :mod:`megacore.hookspecs`, called on it alone.

    Each raises :class:`~megacore.errors.PluginError` if the plugin returns ``None``, and passes its exceptions through.
    """

    family: ModelFamily
    plugin: LoadedPlugin
    registry: PluginRegistry = field(repr=False)

    @property
    def name(self) -> str:
        return self.family.name

    @property
    def label(self) -> str:
        """Distribution and version of the owner."""
        return self.plugin.label

    def weight_map(self, config: ModelConfig, source: str) -> WeightMap:
        """Return the map of format ``source``; see :func:`megacore.hookspecs.weight_map`."""
        return self._call(hookspecs.weight_map, config=config, source=source)

    def qkv_permutation(self, config: ModelConfig, source: str) -> Sequence[int]:
        """Return the row order of the QKV projection; see :func:`megacore.hookspecs.qkv_permutation`."""
        return self._call(hookspecs.qkv_permutation, config=config, source=source)

    def load_reference(
        self, config: ModelConfig, path: Path | None, dtype: torch.dtype, device: torch.device
    ) -> ReferenceModel:
        """Load an independent implementation; see :func:`megacore.hookspecs.load_reference`."""
        return self._call(hookspecs.load_reference, config=config, path=path, dtype=dtype, device=device)

    def build_layer(self, config: ModelConfig, layer_index: int, parallel: ParallelContext) -> nn.Module:
        """Build one layer; see :func:`megacore.hookspecs.build_layer`."""
        return self._call(hookspecs.build_layer, config=config, layer_index=layer_index, parallel=parallel)

    def preset(self, size: str) -> ModelConfig:
        """Return the configuration of a published ``size``. Raises :class:`ConfigError` with the known sizes."""
        presets = self.family.presets
        if size not in presets:
            raise ConfigError(
                f"model family {self.name!r} has no size {size!r}. Known sizes: {', '.join(presets) or 'none'}."
            )
        return self.family.config_class(family=self.name, **presets[size])

    def _call(self, hook: Callable[..., _Result], **arguments: Any) -> _Result:
        name = hook.__name__
        result: _Result | None = self.registry._hook_caller(self.plugin.plugin, name)(**arguments)
        if result is None:
            wrappers = [other.label for other in self.registry.plugins if name in other.hooks and not other.families]
            hint = f" It is wrapped by {', '.join(wrappers)}: does each wrapper return its result?" if wrappers else ""
            raise PluginError(f"{name} of model family {self.name!r} returned None, from {self.label}.{hint}")
        return result


class PluginRegistry:
    """The plugins of one process, sorted by the names of their entry points.

    A new registry is empty: fill it with :meth:`load_entry_points` or :meth:`register`. The rest of megacore uses
    :func:`default_registry`.
    """

    def __init__(self) -> None:
        self.plugins: list[LoadedPlugin] = []
        self._manager = _PluginManager(PROJECT)
        self._manager.add_hookspecs(hookspecs)

    def load_entry_points(self) -> None:
        """Load every installed plugin. A failure is recorded in :attr:`LoadedPlugin.error` and stops no other."""
        disabled = {_normalized(name.strip()) for name in os.environ.get(DISABLE_VARIABLE, "").split(",")}
        # An interrupted uninstallation can leave entry points of a distribution without a name; it is not installed.
        found = [(point, point.dist) for point in entry_points(group=PROJECT) if point.dist and point.dist.name]
        # Sorted, as their order is that of directories on the disk, which differs between machines.
        for entry_point, distribution in sorted(found, key=lambda pair: (pair[0].name, pair[1].name)):
            record = LoadedPlugin(
                distribution=distribution.name, version=distribution.version, entry_point=entry_point.name
            )
            self.plugins.append(record)
            if _normalized(record.distribution) in disabled:
                record.disabled, record.error = True, PluginError(f"is disabled by {DISABLE_VARIABLE}")
                continue
            try:
                _check_pin(distribution)
                with _attribute_errors("could not be imported"):
                    plugin = entry_point.load()
                self._register(record, plugin)
            except PluginError as error:
                record.error = error
                log.debug("plugin %s %s", record.label, error, exc_info=True)

    def register(
        self, plugin: object, *, distribution: str, version: str = "0", entry_point: str | None = None
    ) -> LoadedPlugin:
        """Add a plugin that is in memory. Raises :class:`PluginError`, and changes nothing, if it is unusable."""
        record = LoadedPlugin(distribution=distribution, version=version, entry_point=entry_point or distribution)
        try:
            self._register(record, plugin)
        except PluginError as error:
            raise PluginError(f"{record.label} {error}") from error.__cause__
        self.plugins.append(record)
        return record

    def list_families(self) -> list[str]:
        """Return the names that :meth:`get_family` knows, sorted."""
        return sorted({family.name for record in self.plugins for family in record.families})

    def families_for_architecture(self, architecture: str) -> list[str]:
        """Return the families that read ``architecture``, an entry in a Hugging Face ``config.json``, sorted."""
        families = (family for record in self.plugins for family in record.families)
        return sorted({family.name for family in families if architecture in family.architectures})

    def get_family(self, name: str) -> Family:
        """Return the family called ``name``, bound to the one plugin that owns it.

        Raises:
            PluginError: if no plugin or more than one declares the family, or its plugin is unusable.
        """
        owners = [(record, family) for record in self.plugins for family in record.families if family.name == name]
        if not owners:
            raise PluginError(self._missing_reason(name))
        if len(owners) > 1:
            lines = "".join(f"  - {record.label}\n" for record, _ in owners)
            raise PluginError(
                f"model family {name!r} is provided by {len(owners)} plugins:\n{lines}"
                f"Uninstall all but one, or set {DISABLE_VARIABLE}=<distribution>[,<distribution>]."
            )
        [(owner, family)] = owners
        return Family(family=family, plugin=owner, registry=self)

    def _missing_reason(self, name: str) -> str:
        unusable = [record for record in self.plugins if record.error]
        # The families of a broken plugin are unknown; by convention its entry point has the family's name.
        if culprits := [record for record in unusable if record.entry_point == name]:
            reasons = "; ".join(f"{record.label} {record.error}" for record in culprits)
            return f"model family {name!r} is not available: {reasons}"

        families = self.list_families()
        nearest = _nearest(name, [*families, *(record.entry_point for record in unusable)])
        is_plain = re.fullmatch(r"\w[\w.-]*", name, re.ASCII) is not None
        suggestion = f"; pip install {PROJECT}-{_normalized(name)}." if is_plain else "."
        message = f"no plugin for {name if is_plain else repr(name)} is installed"
        message += f". Did you mean {nearest!r}?" if nearest else suggestion
        message += f" Installed: {', '.join(families) or 'none'}."
        if unusable:
            message += f"\nNot loaded: {', '.join(record.label for record in unusable)}; `megacore plugins` says why."
        return message

    def _register(self, record: LoadedPlugin, plugin: object) -> None:
        """Check ``plugin``, register it with pluggy and read its families; on failure leave no trace of it."""
        with _attribute_errors("could not be examined"):
            hooks = self._manager.implementations(plugin)
            faults = list(_plugin_faults(plugin, hooks))
        if faults:
            raise PluginError("; ".join(faults))
        for other in self.plugins:
            if other.plugin is plugin:
                raise PluginError(f"is loaded already, by entry point {other.entry_point!r} of {other.label}")

        name = f"{record.distribution}:{record.entry_point}"  # two distributions may use one entry-point name
        try:
            with _attribute_errors("was refused"):
                self._manager.register(plugin, name)
            families = self._declared_families(plugin) if "model_families" in hooks else ()
        except PluginError:
            # Its hooks would be called for other families. pluggy < 1.7 half registers even a plugin that it rejects.
            if self._manager.has_plugin(name):
                self._manager.unregister(name=name)
            raise
        record.plugin, record.hooks, record.families = plugin, tuple(hooks), families

    def _declared_families(self, plugin: object) -> tuple[ModelFamily, ...]:
        with _attribute_errors("could not declare its families"):
            # A generator runs here, so that its exceptions are attributed to the plugin too.
            results = self._hook_caller(plugin, "model_families")()
            families = tuple(family for declared in results for family in declared)
        if not families:
            raise PluginError("returned no family from model_families")
        if others := [family for family in families if not isinstance(family, ModelFamily)]:
            raise PluginError(f"returned {others[0]!r} from model_families, which is not a ModelFamily")
        names = [family.name for family in families]
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise PluginError(f"declares more than once: {', '.join(repeated)}")
        return families

    def _hook_caller(self, plugin: object, hook: str) -> pluggy.HookCaller:
        """Return the caller of ``hook`` without the plugins of other families; plugins that only wrap remain."""
        others = [record.plugin for record in self.plugins if record.families and record.plugin is not plugin]
        return self._manager.subset_hook_caller(hook, others)


class _PluginManager(pluggy.PluginManager):
    def parse_hookimpl_opts(self, plugin: object, name: str) -> pluggy.HookimplOpts | None:
        # pluggy < 1.7 reads every attribute, which runs properties and a lazy module's __getattr__: that could import
        # torch. Anything but a plain function is no hook, in any version.
        attribute = inspect.getattr_static(plugin, name, None)
        if not isinstance(attribute, FunctionType | MethodType | staticmethod | classmethod):
            return None
        return super().parse_hookimpl_opts(plugin, name)

    def implementations(self, plugin: object) -> dict[str, pluggy.HookimplOpts]:
        """Return the options of each function of ``plugin`` that is marked as a hook, by the function's name."""
        options = {name: self.parse_hookimpl_opts(plugin, name) for name in dir(plugin)}
        return {name: found for name, found in options.items() if found is not None}


@cache
def default_registry() -> PluginRegistry:
    """Return the registry of the installed plugins. The first call loads them."""
    registry = PluginRegistry()
    registry.load_entry_points()
    return registry


def get_family(name: str) -> Family:
    """Return an installed model family; see :meth:`PluginRegistry.get_family`."""
    return default_registry().get_family(name)


def list_families() -> list[str]:
    """Return the names of the installed model families, sorted."""
    return default_registry().list_families()


def _normalized(name: str) -> str:
    from packaging.utils import canonicalize_name

    return canonicalize_name(name)


def _check_pin(distribution: Distribution) -> None:
    """Raise PluginError if ``distribution`` requires another megacore, which pip reports as a mere warning."""
    from packaging.requirements import Requirement

    installed = version(PROJECT)
    with _attribute_errors("has unreadable requirements"):
        needs = [Requirement(requirement) for requirement in distribution.requires or ()]
    for need in needs:
        applies = _normalized(need.name) == PROJECT and (need.marker is None or need.marker.evaluate())
        if applies and not need.specifier.contains(installed, prereleases=True):
            raise PluginError(f"needs {PROJECT} {need.specifier}, installed is {installed}")


def _plugin_faults(plugin: object, hooks: Mapping[str, pluggy.HookimplOpts]) -> Iterator[str]:
    """Yield each fault of a plugin as the end of a sentence about it.

    pluggy raises for some of them, in words that differ between its versions, and ignores the others.
    """
    if inspect.isclass(plugin):
        yield f"registers the class {plugin.__name__}, not an instance of it"
        return
    if not isinstance(plugin, Hashable):  # pluggy keeps plugins in sets: this one would break the calls of all others
        yield f"registers an unhashable {type(plugin).__name__} object"
    if not hooks:
        yield "implements no hook; are its functions marked with @hookimpl?"
        return

    for name, options in hooks.items():
        if options["specname"]:
            # pluggy < 1.7 calls these even on plugins that it is to leave out.
            yield f"implements {options['specname']} as {name}: name the function after the hook, without specname"
        elif name in HOOKS:
            yield from _signature_faults(getattr(plugin, name), name, wraps=_wraps(options))
        elif not options["optionalhook"]:
            nearest = _nearest(name, HOOKS)
            yield f"implements an unknown hook {name!r}" + (f" (did you mean {nearest!r}?)" if nearest else "")

    own = [name for name in HOOKS if name in hooks and not _wraps(hooks[name])]
    missing = [name for name in FAMILY_HOOKS if name not in own]
    if "model_families" in own and missing:
        yield f"lacks the hooks {', '.join(missing)}"
    elif "model_families" in hooks and "model_families" not in own:
        yield "wraps model_families, which a plugin implements for itself only"
    elif own and "model_families" not in own:
        yield f"implements {', '.join(own)} without declaring a family in model_families"


def _signature_faults(function: Any, hook: str, *, wraps: bool) -> Iterator[str]:
    known = inspect.signature(getattr(hookspecs, hook)).parameters
    for parameter in inspect.signature(function).parameters.values():
        # pluggy < 1.7 never passes an argument that has a default; no version passes a keyword-only one.
        if parameter.kind in (parameter.KEYWORD_ONLY, parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            bare = parameter.replace(annotation=parameter.empty, default=parameter.empty)
            yield f"takes {bare} in {hook}, which is never passed: name the arguments it uses, without * or **"
        elif parameter.default is not parameter.empty:
            yield f"gives {parameter.name!r} a default in {hook}, which would replace the value: remove it"
        elif parameter.name not in known:
            accepted = f"it has {', '.join(known)}" if known else "it has none"
            yield f"takes an unknown argument {parameter.name!r} in {hook}; {accepted}"
    if hook in FAMILY_HOOKS and inspect.isgeneratorfunction(function) and not wraps:
        yield f"yields in {hook}: return the result, or wrap with @hookimpl(wrapper=True)"


def _wraps(options: pluggy.HookimplOpts) -> bool:
    return options["wrapper"] or options["hookwrapper"]


def _nearest(name: str, known: Sequence[str]) -> str | None:
    return next(iter(get_close_matches(name.lower(), known, n=1)), None)


@contextmanager
def _attribute_errors(prefix: str) -> Iterator[None]:
    """Turn any exception of a plugin into a PluginError that begins with ``prefix``, but for Ctrl-C."""
    try:
        yield
    except (Exception, SystemExit) as error:
        reason = f"{type(error).__name__}: {error}".removesuffix(": ")
        raise PluginError(f"{prefix}: {' '.join(reason.split())}") from error
