"""One tiny model in one published format: its files, its two implementations, and their results."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from megacore.checkpoint import Checkpoint
from megacore.checkpoint.matrix import as_matrix
from megacore.config import ModelConfig
from megacore.errors import LayoutError
from megacore.hookspecs import ReferenceModel
from megacore.model import DecoderModel, load_model, read_config
from megacore.parallel import ParallelContext, check_tensor_parallel, materialize
from megacore.plugins import Family, get_family
from megacore.testing.checks.base import FamilyChecks
from megacore.testing.numerics import logits_and_gradients
from megacore.weights import convert, export
from megacore.weights.binding import BoundMap, bind
from megacore.weights.formats import PublishedCheckpoint, format_for
from megacore.weights.rules import QKVOrder

_BATCH = 2
_MAX_LENGTH = 24


class Case:
    """The data that all checks of one configuration and one source share, computed on first use."""

    def __init__(self, tests: FamilyChecks, config: ModelConfig, source: str, directory: Path) -> None:
        self.tests = tests
        self.config = config
        self.source = source
        self._directory = directory
        self._checkpoints: dict[tuple[int, int], Path] = {}
        length = min(_MAX_LENGTH, config.max_position_embeddings - 1) // 2 * 2  # even, for sequence parallelism at tp 2
        tokens = torch.randint(0, config.vocab_size, (_BATCH, length + 1), generator=torch.Generator().manual_seed(1))
        self.input_ids, self.targets = tokens[:, :-1], tokens[:, 1:]

    @cached_property
    def family(self) -> Family:
        return get_family(self.tests.family)

    # The published side

    @cached_property
    def published(self) -> PublishedCheckpoint:
        """The checkpoint of random weights, written by the author's ``publish``."""
        directory = self._directory / "published"
        directory.mkdir()
        self.tests.publish(self.config, directory, self.source)
        return self.open(directory)

    def open(self, directory: Path) -> PublishedCheckpoint:
        return format_for(self.family.family, self.source).open(directory)

    def read(self, published: PublishedCheckpoint) -> dict[str, Tensor]:
        """Return the tensors that the model needs. Raise WeightMapError if some are missing or unknown."""
        shapes = self.bound.source_shapes()
        self.bound.check_sources(published.shapes(shapes), str(published.directory))
        matrices = {name: published.matrix(name, shape) for name, shape in shapes.items()}
        return {
            name: matrix.read(slice(0, matrix.rows), slice(0, matrix.columns)).reshape(shapes[name]).clone()
            for name, matrix in matrices.items()
        }

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """The published tensors, by name."""
        return self.read(self.published)

    @cached_property
    def reference(self) -> ReferenceModel:
        return self.tests.reference(self.config, self.published.directory, self.source)

    @cached_property
    def reference_logits(self) -> Tensor:
        with torch.no_grad():
            return self.reference(self.input_ids)

    @cached_property
    def reference_gradients(self) -> dict[str, Tensor]:
        """The gradients of the summed loss through the reference, by published name."""
        parameters = self.tests.reference_parameters(self.reference)
        loss = F.cross_entropy(
            self.reference(self.input_ids).flatten(0, 1).float(), self.targets.flatten(), reduction="sum"
        )
        names = list(self.bound.source_shapes())
        gradients = torch.autograd.grad(loss, [parameters[name] for name in names])
        return dict(zip(names, gradients, strict=True))

    # Our side

    @cached_property
    def bound(self) -> BoundMap:
        return bind(self.family, self.config, self.source)

    @cached_property
    def max_tp(self) -> int:
        """The tensor-parallel size to test: 2, or 1 if an odd number of query heads share a single key-value head."""
        try:
            check_tensor_parallel(self.bound.specs, 2)
        except LayoutError:
            if self.config.num_kv_heads > 1:
                raise
            return 1
        return 2

    def checkpoint(self, *, tp: int = 1, pp: int = 1) -> Path:
        """Return the converted checkpoint, cut over ``tp`` × ``pp`` ranks."""
        if (tp, pp) not in self._checkpoints:
            out = self._directory / f"tp{tp}-pp{pp}"
            convert(self.family, self.published.directory, out, source=self.source, tp=tp, pp=pp)
            self._checkpoints[tp, pp] = out
        return self._checkpoints[tp, pp]

    def load(self, *, tp: int = 1, pp: int = 1) -> dict[str, Tensor]:
        """Return the parameters of our model in a single process, from a checkpoint cut over ``tp`` × ``pp``."""
        model = load_model(Checkpoint(self.checkpoint(tp=tp, pp=pp)), ParallelContext.single(), dtype=torch.float32)
        return {name: parameter.detach() for name, parameter in model.named_parameters()}

    def export(self, *, tp: int = 1, pp: int = 1) -> PublishedCheckpoint:
        """Return the converted checkpoint, exported to its original format."""
        out = self._directory / f"exported-from-tp{tp}-pp{pp}"
        if not out.exists():
            export(self.checkpoint(tp=tp, pp=pp), out, format=self.source)
        return self.open(out)

    @cached_property
    def converted_config(self) -> ModelConfig:
        """The configuration read from the published file; :attr:`config`, if the plugin is correct."""
        return read_config(self.family, Checkpoint(self.checkpoint()))

    @cached_property
    def parameters(self) -> dict[str, Tensor]:
        """The parameters of our model, converted from the published checkpoint."""
        return self.load()

    @cached_property
    def logits(self) -> Tensor:
        """The logits of our model in a single process."""
        with torch.no_grad():
            logits: Tensor = self.model()(self.input_ids)
        return logits

    def model(
        self,
        changed: Mapping[str, Tensor] | None = None,
        config: ModelConfig | None = None,
        layer_config: ModelConfig | None = None,
    ) -> DecoderModel:
        """Return our model in a single process, with some parameters ``changed``, or other configurations."""

        def build_layer(config: ModelConfig, layer_index: int, parallel: ParallelContext) -> nn.Module:
            return self.family.build_layer(layer_config or config, layer_index, parallel)

        model = DecoderModel(config or self.converted_config, build_layer, ParallelContext.single())
        parameters = {**self.parameters, **(changed or {})}
        materialize(model, model.parallel, lambda name, spec: parameters[name])
        return model

    @cached_property
    def gradients(self) -> dict[str, Tensor]:
        """The gradients of the summed loss through our model in a single process, by native name."""
        return logits_and_gradients(ParallelContext.single(), self.checkpoint(), self.input_ids, self.targets)[1]

    def to_native(self, tensors: Mapping[str, Tensor], *, order: QKVOrder | None = None) -> dict[str, Tensor]:
        """Return published ``tensors`` as native ones, by the weight map; ``order`` replaces the plugin's own."""
        natives = {}
        for name, rule in self.bound.rules.items():
            spec = self.bound.specs[name]
            parts = [as_matrix(tensors[part]) for part in rule.sources]
            native = rule.to_native(parts, order or self.bound.order)
            natives[name] = native.read(slice(0, native.rows), slice(0, native.columns)).reshape(spec.shape)
        return natives

    def to_source(self, natives: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return native tensors, or their gradients, as published ones, by the inverse weight map."""
        shapes = self.bound.source_shapes()
        sources = {}
        for name, rule in self.bound.rules.items():
            rows, columns = self.bound.specs[name].matrix_shape
            native = as_matrix(natives[name].reshape(rows, columns))
            for part, matrix in zip(rule.sources, rule.to_source(native, self.bound.order), strict=True):
                sources[part] = matrix.read(slice(0, matrix.rows), slice(0, columns)).reshape(shapes[part])
        return sources
