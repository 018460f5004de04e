"""Dotted keys (phases.0.steps) of a nested document, for what is logged line by line. Knows no recipe."""

from collections.abc import Mapping
from typing import Any


def flatten(document: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings and lists as dotted keys (phases.0.steps), as in the overrides of the command line."""
    flat: dict[str, Any] = {}
    for key, value in document.items():
        inner = dict(enumerate(value)) if isinstance(value, list | tuple) else value
        if isinstance(inner, Mapping) and inner:
            flat |= flatten(inner, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
