"""Binding a weight map to one model, with a check that it covers every parameter and every source tensor."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from megacore.config import ModelConfig
from megacore.errors import WeightMapError
from megacore.model import model_specs
from megacore.parallel import ParameterSpec
from megacore.plugins import Family
from megacore.weights.rules import QKVOrder, Rule, WeightMap

_MAX_LISTED = 8


@dataclass(frozen=True)
class BoundMap:
    """A weight map whose rules cover the parameters of one model exactly.

    ``rules`` and ``specs`` are by native name, in the order of the model's parameters; ``order`` is that of QKV rows.
    """

    rules: dict[str, Rule]
    specs: dict[str, ParameterSpec]
    order: QKVOrder
    weight_map: WeightMap

    def source_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every source tensor of this model, by name."""
        shapes = {}
        for native, rule in self.rules.items():
            spec = self.specs[native]
            for name, rows in zip(rule.sources, rule.source_rows(spec.matrix_shape[0], self.order), strict=True):
                shapes[name] = (rows, *spec.flat_shape[1:])
        return shapes

    def check_sources(self, found: Mapping[str, tuple[int, ...]], where: str) -> None:
        """Raise :class:`WeightMapError`, listing the tensors that are missing, unknown or of another shape.

        ``found`` are the shapes of a checkpoint's tensors by name; ``where`` is the checkpoint, for the message.
        """
        needed = self.source_shapes()
        known = needed.keys() | self.weight_map.aliases.keys()
        unknown = [
            name
            for name in found
            if name not in known and not any(fnmatchcase(name, pattern) for pattern in self.weight_map.ignored)
        ]
        problems = _listed("missing", (name for name in needed if name not in found))
        problems += _listed("unknown to the weight map", unknown)
        problems += _listed(
            "of another shape than the configuration says",
            (
                f"{name} {list(found[name])} instead of {list(shape)}"
                for name, shape in needed.items()
                if name in found and found[name] != shape
            ),
        )
        if problems:
            raise WeightMapError(f"{where} does not hold the tensors of this model:\n" + "\n".join(problems))


def bind(family: Family, config: ModelConfig, source: str) -> BoundMap:
    """Bind the weight map of ``family`` for format ``source`` to the model that ``config`` describes.

    Raises:
        WeightMapError: if the rules do not produce every parameter exactly once, or use a source tensor twice.
        UnsupportedSourceError: if the family does not read that format.
        PluginError: if a hook of the family violates its contract.
    """
    specs = model_specs(config, family.build_layer)
    weight_map = family.weight_map(config, source)
    rules = weight_map.expand(config.num_layers)
    produced = Counter(rule.native for rule in rules)
    used = Counter(name for rule in rules for name in rule.sources)
    problems = _listed("not produced by any rule", (name for name in specs if name not in produced))
    problems += _listed("produced, but not a parameter of the model", (name for name in produced if name not in specs))
    problems += _listed("produced by several rules", (name for name, times in produced.items() if times > 1))
    problems += _listed("source tensors used by several rules", (name for name, times in used.items() if times > 1))
    if problems:
        raise WeightMapError(
            f"the weight map of {family.label} for {config.family} ({source}) does not fit its layers:\n"
            + "\n".join(problems)
        )
    by_name = {rule.native: rule for rule in rules}
    order = QKVOrder.from_permutation(config, family.qkv_permutation(config, source))
    return BoundMap({name: by_name[name] for name in specs}, specs, order, weight_map)


def _listed(problem: str, names: Iterable[str]) -> list[str]:
    """Return one line with the first few of ``names``, or no line if there are none."""
    all_names = list(names)
    if not all_names:
        return []
    more = f", and {len(all_names) - _MAX_LISTED} more" if len(all_names) > _MAX_LISTED else ""
    return [f"  {problem}: {', '.join(all_names[:_MAX_LISTED])}{more}"]
