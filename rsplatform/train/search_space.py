"""What a sweep searches in: a recipe's fields by their dotted keys, and how the values of each are drawn and moved.

In: a recipe as a document, values by dotted key. Out: the recipe's document with those values. Pure functions of the
random generator that they are given. Trains nothing.
"""

import math
from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import numpy as np
from pydantic import Field, model_validator

from rsplatform.config import Config, ConfigError

Values = dict[str, Any]


class SearchField(Config):
    """How one field is drawn. Exactly one of: `choices`, between two numbers (`uniform`, or `log_uniform` on a log
    scale), or whole numbers from low to high, both among them (`integers`). Numbers are kept to three digits."""

    choices: list[Any] | None = Field(default=None, min_length=1)
    uniform: tuple[float, float] | None = None
    log_uniform: tuple[float, float] | None = None
    integers: tuple[int, int] | None = None

    @model_validator(mode="after")
    def _one_way(self) -> "SearchField":
        given = [name for name in SearchField.model_fields if getattr(self, name) is not None]
        if len(given) != 1:
            told = f"not {' and '.join(given)}" if given else "none is given"
            ways = "choices: […], uniform: [low, high], log_uniform: [low, high], integers: [low, high]"
            raise ValueError(f"give one of {ways}; {told}")
        if self.choices is None:
            low, high = self.ends
            if not low < high:
                raise ValueError(f"{given[0]} needs low < high, got [{low}, {high}]")
            if self.log_uniform is not None and low <= 0:
                raise ValueError(f"log_uniform needs 0 < low, got {low}; uniform may reach 0")
        return self

    @property
    def ends(self) -> tuple[Any, Any]:
        """The lowest and the highest value, the first and the last choice."""
        if self.choices is not None:
            return self.choices[0], self.choices[-1]
        bounds = self.uniform or self.log_uniform or self.integers
        assert bounds is not None, "the validator demands one"
        return bounds

    def draw(self, rng: np.random.Generator) -> Any:
        """One value."""
        if self.choices is not None:
            return self.choices[int(rng.integers(len(self.choices)))]
        low, high = self.ends
        if self.integers is not None:
            return int(rng.integers(low, high, endpoint=True))
        if self.log_uniform is not None:
            return self._kept(math.exp(rng.uniform(math.log(low), math.log(high))))
        return self._kept(rng.uniform(low, high))

    def move(self, value: Any, factor: float, rng: np.random.Generator) -> Any:
        """A value beside `value`: times `factor` within the bounds, an integer by at least 1, a choice to a neighbour.

        What no factor moves, a zero or an only choice, is drawn again.
        """
        if self.choices is not None:
            at = self.choices.index(value)
            neighbours = [i for i in (at - 1, at + 1) if 0 <= i < len(self.choices)]
            return self.choices[neighbours[int(rng.integers(len(neighbours)))]] if neighbours else value
        if value == 0:
            return self.draw(rng)
        if self.integers is None:
            return self._kept(value * factor)
        low, high = self.integers
        moved = round(value * factor)
        if moved == value:
            moved += 1 if factor > 1 else -1
        return min(max(moved, low), high)

    def _kept(self, value: float) -> float:
        low, high = self.ends
        return min(max(float(f"{value:.3g}"), low), high)


def with_values(document: Mapping[str, Any], values: Values) -> dict[str, Any]:
    """A copy of a recipe's document in which the fields of dotted keys have these values.

    Shares of a mixture stay shares: sources that have a value in `values` get it, the others of that phase divide what
    is left as they did before; where all have one, their sum is made 1.

    Raises:
        ConfigError: the document has no such field, or the values of a mixture leave nothing for its other sources.
    """
    changed = deepcopy(dict(document))
    for key, value in values.items():
        set_value(changed, key, value)
    mixtures = {key.rpartition(".")[0] for key in values if is_share(key)}
    for key in sorted(mixtures):
        chosen = {name: values[f"{key}.{name}"] for name in get_value(document, key) if f"{key}.{name}" in values}
        set_value(changed, key, _shares(key, get_value(document, key), chosen))
    return changed


def is_share(key: str) -> bool:
    """Whether a dotted key is the share of one source in a phase's mixture."""
    return key.split(".")[0] == "phases" and key.split(".")[2:3] == ["mixture"] and key.count(".") == 3


def _shares(key: str, before: Mapping[str, float], chosen: Mapping[str, float]) -> dict[str, float]:
    others = {name: share for name, share in before.items() if share > 0 and name not in chosen}
    total = sum(chosen.values())
    if not others:
        if total <= 0:
            raise ConfigError(f"{key}: {_told(chosen)} draw nothing at all; one must be above 0")
        return {name: chosen.get(name, 0.0) / total for name in before}
    left = 1 - total
    if left <= 0:
        raise ConfigError(f"{key}: {_told(chosen)} leave nothing for {', '.join(others)}; keep their sum below 1")
    shares = {name: left * share / sum(others.values()) for name, share in others.items()} | dict(chosen)
    return {name: shares.get(name, 0.0) for name in before}


def _told(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def set_value(document: Any, dotted_key: str, value: Any) -> None:
    """Set an existing field in place; list items are named by their index.

    Raises:
        ConfigError: the document has no such field.
    """
    parent, _, last = dotted_key.rpartition(".")
    holder = get_value(document, parent) if parent else document
    holder[_checked(holder, last, dotted_key)] = value


def get_value(document: Any, dotted_key: str) -> Any:
    """The field of a dotted key.

    Raises:
        ConfigError: the document has no such field.
    """
    for part in dotted_key.split("."):
        document = document[_checked(document, part, dotted_key)]
    return document


def _checked(holder: Any, part: str, dotted_key: str) -> str | int:
    if isinstance(holder, list):
        if part.isdigit() and int(part) < len(holder):
            return int(part)
        raise ConfigError(f"{dotted_key}: {part!r} is no index of a list of {len(holder)}; the first is 0")
    if isinstance(holder, dict) and part in holder:
        return part
    valid = f"valid here: {', '.join(sorted(holder))}" if isinstance(holder, dict) else "its parent holds no fields"
    raise ConfigError(f"{dotted_key}: the recipe has no field {part!r} ({valid})")
