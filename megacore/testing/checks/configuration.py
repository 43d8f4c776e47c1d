"""Checks of the configuration: both directions, wrong values, and a tiny configuration that reveals faults."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from megacore.config import ModelConfig
from megacore.errors import ConfigError
from megacore.model import ACTIVATIONS
from megacore.testing.case import Case
from megacore.testing.checks.base import FamilyChecks

_CONFIG_MISTAKES = (ConfigError, KeyError, TypeError, ValueError, ArithmeticError)
"""Errors that ``config_from_source`` may raise for a bad file: the core turns them into a ConfigError with its name."""


class ConfigurationChecks(FamilyChecks):
    """Checks of the configuration."""

    def test_the_configuration_can_show_a_fault(self, style: str) -> None:
        """The tiny configuration has what the other checks need: 2 layers, 2 rotary pairs in a head.

        Troubleshooting: with a single layer, a layer number that is off by one goes unnoticed.
        """
        config = self.tiny_configs()[style]
        assert config.num_layers >= 2, "give the tiny configuration 2 layers or more"
        assert config.head_dim >= 4, "give the tiny configuration a head_dim of 4 or more: 2 is a single rotary pair"
        assert config.max_position_embeddings >= 9, "give the tiny configuration max_position_embeddings of 9 or more"

    def test_the_configuration_reads_both_ways(self, case: Case) -> None:
        """``config_from_source(config_to_source(config))`` is ``config``, and so is the configuration of a real file.

        The same holds for other values of the vocabulary, the layers, eps and the rotary base, unless
        ``config_to_source`` refuses them with a ConfigError.

        Troubleshooting: a key that only one of the two functions knows, or that has another name in the format, falls
        back to a default. A field that the format cannot express must have one value; refuse all others.
        """
        family, config = case.family.family, case.config
        assert type(config) is family.config_class, "config_class of the ModelFamily is not the class of the config"
        assert config.family == self.family
        stored = json.loads(json.dumps(config.to_dict()))
        assert family.config_class.from_dict(stored) == config, "the config does not survive being stored as JSON"

        assert differing_fields(config, _round_trip(case, config)) == {}, "lost on the way to the format and back"
        read = family.config_from_source(case.published.config, case.source)
        file = case.published.config_file.name
        assert differing_fields(config, read) == {}, f"{file} of a real checkpoint reads differently"

        names = ["vocab_size", "num_layers", "norm_eps", *["rope_theta"] * (config.position_embedding == "rotary")]
        for name in names:
            changed = dataclasses.replace(config, **{name: 2 * getattr(config, name)})
            try:
                back = _round_trip(case, changed)
            except ConfigError:
                continue
            assert differing_fields(changed, back) == {}, f"{name} is lost on the way to the format and back"

    def test_a_wrong_configuration_is_refused(self, case: Case) -> None:
        """An unsupported value raises a ConfigError that names it; a missing key raises no unexpected error.

        The check tries an activation and (format ``hf``) a ``rope_type`` that do not exist, and leaves out each key.

        Troubleshooting: look values up in a dictionary of the supported ones, and raise ConfigError otherwise; read a
        key without a default as ``published["key"]``, whose KeyError the core explains.
        """
        read, source = case.family.family.config_from_source, case.source
        published = case.family.family.config_to_source(case.config, source)

        for key in published:
            incomplete = {name: value for name, value in published.items() if name != key}
            try:
                read(incomplete, source)
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


def _round_trip(case: Case, config: ModelConfig) -> ModelConfig:
    family = case.family.family
    written = json.loads(json.dumps(family.config_to_source(config, case.source)))
    return family.config_from_source(written, case.source)


def differing_fields(expected: ModelConfig, found: ModelConfig) -> dict[str, str]:
    """Return the fields that differ, with both values."""
    fields = [field.name for field in dataclasses.fields(expected)]
    pairs = {name: (getattr(expected, name), getattr(found, name, None)) for name in fields}
    return {name: f"{theirs!r} instead of {ours!r}" for name, (ours, theirs) in pairs.items() if ours != theirs}


def _keys_of_activation(case: Case) -> list[str]:
    """Return the keys of the published configuration that change with the activation."""
    write = case.family.family.config_to_source
    published = write(case.config, case.source)
    keys: list[str] = []
    for activation in ACTIVATIONS:
        try:
            changed = write(dataclasses.replace(case.config, activation=activation), case.source)
        except Exception:  # the format does not support this activation
            continue
        keys += [key for key, value in changed.items() if value != published.get(key) and isinstance(value, str)]
    return list(dict.fromkeys(keys))
