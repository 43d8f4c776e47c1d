"""The rotary embedding as a Hugging Face ``config.json`` describes it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from megacore.config import DynamicNtkScaling, LinearScaling, ModelConfig, RotaryScaling, YarnScaling
from megacore.errors import ConfigError

ROTARY_METHODS: Mapping[str, type[RotaryScaling]] = {
    "linear": LinearScaling,
    "dynamic": DynamicNtkScaling,
    "yarn": YarnScaling,
}
"""What the format calls the ways of scaling the rotary embedding that are not one family's own."""


def rotary_from_hf(
    published: Mapping[str, Any], methods: Mapping[str, type[RotaryScaling]] = ROTARY_METHODS
) -> tuple[float, RotaryScaling | None]:
    """Read the rotary base and its scaling from a ``config.json``, in the spelling of transformers 4 or 5.

    Args:
        published: the parsed ``config.json``.
        methods: by ``rope_type``; a family adds its own to :data:`ROTARY_METHODS`.

    Raises:
        ConfigError: names the ``rope_type`` or the setting that is not implemented.
    """
    parameters = dict(published.get("rope_scaling") or published.get("rope_parameters") or {})
    rope_type = parameters.pop("rope_type", None) or parameters.pop("type", None) or "default"
    parameters.pop("type", None)
    theta = float(parameters.pop("rope_theta", None) or published.get("rope_theta") or 10000.0)
    partial = parameters.pop("partial_rotary_factor", None) or published.get("partial_rotary_factor")
    if partial not in (None, 1.0):
        raise ConfigError(f"partial_rotary_factor {partial} is not implemented: only the whole head is turned")
    if rope_type == "default":
        return theta, None
    if rope_type not in methods:
        raise ConfigError(
            f"rope_type {rope_type!r} is not implemented; implemented: default, {', '.join(sorted(methods))}"
        )
    method = methods[rope_type]
    fields = {field.name for field in dataclasses.fields(method)}
    if "original_max_position_embeddings" in fields:
        longest = published.get("max_position_embeddings", 2048)
        original = published.get("original_max_position_embeddings")
        parameters["original_max_position_embeddings"] = (
            original or parameters.get("original_max_position_embeddings") or longest
        )
        if parameters.get("factor") is None:
            parameters["factor"] = longest / parameters["original_max_position_embeddings"]
    parameters = {key: value for key, value in parameters.items() if value is not None}
    if unknown := sorted(set(parameters) - fields):
        raise ConfigError(f"rope_type {rope_type!r} with {', '.join(unknown)} is not implemented")
    try:
        return theta, method(**parameters)
    except TypeError as error:
        raise ConfigError(f"rope_type {rope_type!r} is incomplete in config.json: {error}") from error


def rotary_to_hf(config: ModelConfig, methods: Mapping[str, type[RotaryScaling]] = ROTARY_METHODS) -> dict[str, Any]:
    """The inverse of :func:`rotary_from_hf`, in both spellings, which agree, so that any reader finds its own."""
    scaling: dict[str, Any] = {"rope_type": "default"}
    if config.rope_scaling is not None:
        name = next(name for name, method in methods.items() if isinstance(config.rope_scaling, method))
        settings = dataclasses.asdict(config.rope_scaling)
        scaling = {"rope_type": name, **{key: value for key, value in settings.items() if value is not None}}
    return {
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling if config.rope_scaling is not None else None,
        "rope_parameters": {"rope_theta": config.rope_theta, **scaling},
    }
