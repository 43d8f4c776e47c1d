"""Standard decoders: RMSNorm, rotary positions, grouped-query attention and a gated MLP, one after the other.

Most published models are of this kind. :class:`StandardDecoder` answers a plugin's hooks for such a family. Each
published format has a module here with its tensor names and configuration keys, which other families use in part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from megacore.config import ModelConfig, RotaryScaling
from megacore.errors import UnsupportedSourceError
from megacore.hookspecs import ModelFamily

if TYPE_CHECKING:
    from megacore.weights.rules import WeightMap


@dataclass(frozen=True, kw_only=True)
class StandardDecoder:
    """A family of standard decoders; its methods are the answers of a plugin's hooks.

    torch is imported by the first call of a method, so that a plugin may create this object at import time.

    Attributes:
        name: The name of the family.
        architecture: The family's entry in ``architectures`` of a Hugging Face ``config.json``.
        model_type: The ``model_type`` there.
        context_length: The longest sequence of pretraining, which Meta's ``params.json`` does not have.
        rotary_methods: Scaling methods of this family alone, by their ``rope_type`` in ``config.json``.
    """

    name: str
    architecture: str
    model_type: str
    context_length: int
    sources: tuple[str, ...] = ("hf", "meta", "megatron-llm")
    rotary_methods: Mapping[str, type[RotaryScaling]] = field(default_factory=dict)

    def model_family(
        self, *, presets: Mapping[str, Mapping[str, Any]] | None = None, hub: Mapping[str, str] | None = None
    ) -> ModelFamily:
        """Return the declaration of the family; ``presets`` and ``hub`` are those of :class:`ModelFamily`."""
        return ModelFamily(
            name=self.name,
            architectures=(self.architecture,),
            config_from_source=self.config_from_source,
            config_to_source=self.config_to_source,
            sources=self.sources,
            presets=presets or {},
            hub=hub or {},
        )

    def config_from_source(self, published: Mapping[str, Any], source: str) -> ModelConfig:
        """Read the parsed configuration of a checkpoint. Raises :class:`ConfigError` for what is not implemented."""
        from megacore.weights.standard_decoder import hf, megatron_llm, meta

        self._require(source)
        if source == "meta":
            return meta.config_from_meta(published, family=self.name, max_position_embeddings=self.context_length)
        if source == "megatron-llm":
            return megatron_llm.config_from_megatron_llm(published, family=self.name)
        methods = {**hf.ROTARY_METHODS, **self.rotary_methods}
        return hf.standard_config_from_hf(published, family=self.name, rotary_methods=methods)

    def config_to_source(self, config: ModelConfig, source: str) -> dict[str, Any]:
        """Return the published configuration of ``config``, the inverse of :meth:`config_from_source`."""
        from megacore.weights.standard_decoder import hf, megatron_llm, meta

        self._require(source)
        if source == "meta":
            return meta.config_to_meta(config)
        if source == "megatron-llm":
            return megatron_llm.config_to_megatron_llm(config)
        return hf.standard_config_to_hf(
            config,
            architecture=self.architecture,
            model_type=self.model_type,
            rotary_methods={**hf.ROTARY_METHODS, **self.rotary_methods},
        )

    def weight_map(self, config: ModelConfig, source: str) -> WeightMap:
        """Return the weight map of format ``source``; see :func:`megacore.hookspecs.weight_map`."""
        from megacore.weights.standard_decoder import hf, megatron_llm, meta

        self._require(source)
        maps = {"hf": hf.standard_hf_map, "meta": meta.meta_map, "megatron-llm": megatron_llm.megatron_llm_map}
        return maps[source](config)

    def qkv_permutation(self, config: ModelConfig, source: str) -> Sequence[int]:
        """Return the row order of the QKV projection; see :func:`megacore.hookspecs.qkv_permutation`."""
        from megacore.weights.rules import grouped_qkv_rows
        from megacore.weights.standard_decoder.megatron_llm import interleaved_qkv_rows

        self._require(source)
        if source == "megatron-llm":
            return interleaved_qkv_rows(config)
        return grouped_qkv_rows(config, interleaved=source == "meta")

    def _require(self, source: str) -> None:
        if source not in self.sources:
            raise UnsupportedSourceError(
                f"{self.name} is read and written in the formats {', '.join(self.sources)}, not {source!r}"
            )
