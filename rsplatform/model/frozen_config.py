"""Mapping <-> frozen dataclass for the configs of the model room, which must run where only torch is installed.

In: a dict (from JSON). Out: a dataclass instance; an unknown or missing key is a ConfigKeyError that names it.
Does not convert types beyond list -> tuple: each config checks its own values in __post_init__.
"""

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any, TypeVar, cast

ConfigT = TypeVar("ConfigT")


class ConfigKeyError(ValueError):
    """A key that the config does not have, or one that it needs and did not get."""


def config_from_mapping(config_class: type[ConfigT], mapping: Mapping[str, Any], where: str) -> ConfigT:
    """Build `config_class` from `mapping`; `where` names the place in error messages.

    Raises:
        ConfigKeyError: on an unknown key (the nearest valid one is named) or a missing required key.
    """
    if not isinstance(mapping, Mapping):
        raise ConfigKeyError(f"{where}: expected a mapping of keys, got {type(mapping).__name__}")
    fields = {field.name: field for field in dataclasses.fields(cast(Any, config_class))}
    for key in mapping:
        if key not in fields:
            raise ConfigKeyError(f"{where}: {unknown_key_message(key, list(fields))}")
    for name, field in fields.items():
        has_default = field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
        if name not in mapping and not has_default:
            raise ConfigKeyError(f"{where}: required key '{name}' is missing")
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in mapping.items()}
    return config_class(**values)


def unknown_key_message(key: str, valid_keys: list[str]) -> str:
    """Say that `key` is unknown and which valid key is nearest to it."""
    nearest = difflib.get_close_matches(str(key), valid_keys, n=1, cutoff=0.0)
    hint = f"; did you mean '{nearest[0]}'?" if nearest else ""
    return f"unknown key '{key}'{hint} (valid: {', '.join(sorted(valid_keys))})"
