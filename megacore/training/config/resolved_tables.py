"""A run file with every key in it, defaults too."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from megacore.training.config.run_config import RunConfig


def resolved_tables(run: RunConfig) -> dict[str, dict[str, Any]]:
    """The tables of the run file that gives ``run``, as TOML has them: what was set, and the defaults of the rest.

    Left out are keys without a value, and those that mean nothing beside the others and are refused where they are
    set, even to their default: those of conversations in a run on text.
    """
    every = run.model_dump(mode="json", exclude_none=True)
    tables = {section: {} | table for section, table in run.model_dump(mode="json", exclude_unset=True).items()}
    tables = {section: _without_none(table) for section, table in tables.items()}
    for section, table in every.items():
        for key, default in table.items():
            if key in tables.get(section, {}):
                continue
            candidate = tables | {section: tables.get(section, {}) | {key: default}}
            if _gives(candidate, run):
                tables = candidate
    in_order = {section: {key: tables[section][key] for key in table if key in tables[section]}
                for section, table in every.items() if section in tables}  # fmt: skip
    assert _gives(in_order, run), "a run file that gives the same run"
    return in_order


def _without_none(table: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in table.items() if value is not None}


def _gives(tables: dict[str, dict[str, Any]], run: RunConfig) -> bool:
    try:
        return RunConfig.model_validate(tables) == run
    except ValidationError:
        return False
