"""Search fields: every value drawn or moved is one that the field allows; shares stay shares; errors say what to do."""

import numpy as np
import pytest

from rsplatform.config import ConfigError
from rsplatform.train.search_space import SearchField, with_values

FIELDS = [
    SearchField(choices=["tiny", "mini", "small"]),
    SearchField(uniform=(0.0, 2.0)),
    SearchField(log_uniform=(1.23456e-5, 1e-2)),
    SearchField(integers=(1, 6)),
]


def allowed(field: SearchField, value: object) -> bool:
    if field.choices is not None:
        return value in field.choices
    low, high = field.ends
    assert isinstance(value, int if field.integers else float)
    return low <= value <= high


@pytest.mark.parametrize("field", FIELDS)
def test_what_is_drawn_or_moved_is_allowed_and_a_function_of_the_generator(field: SearchField) -> None:
    def walk() -> list[object]:
        rng = np.random.default_rng(3)
        value, values = field.draw(rng), []
        for number in range(200):
            value = field.draw(rng) if number % 20 == 0 else field.move(value, (0.8, 1.2)[number % 3 == 0], rng)
            values.append(value)
        return values

    values = walk()
    assert all(allowed(field, value) for value in values)
    assert len(set(values)) > 2 and values == walk()


def test_a_move_goes_where_its_factor_points() -> None:
    rng = np.random.default_rng(0)
    assert SearchField(uniform=(0.0, 10.0)).move(5.0, 1.2, rng) == 6.0
    assert SearchField(log_uniform=(1e-4, 1e-2)).move(9e-3, 1.2, rng) == 1e-2, "the bound holds"
    assert SearchField(integers=(1, 9)).move(2, 1.2, rng) == 3, "at least 1"
    assert SearchField(integers=(1, 9)).move(2, 0.8, rng) == 1
    assert SearchField(integers=(1, 9)).move(1, 0.8, rng) == 1
    choices = SearchField(choices=[1, 2, 4, 8])
    assert {choices.move(4, 1.2, rng) for _ in range(30)} == {2, 8}
    assert choices.move(8, 1.2, rng) == 4, "the last one has one neighbour"
    assert SearchField(choices=[True]).move(True, 0.8, rng) is True
    assert SearchField(uniform=(0.0, 1.0)).move(0.0, 1.2, rng) > 0, "no factor moves a zero"


@pytest.mark.parametrize(
    ("field", "words"),
    [
        ({}, "none is given"),
        ({"choices": [8], "log_uniform": [1, 2]}, "not choices and log_uniform"),
        ({"uniform": [2, 2]}, "low < high"),
        ({"integers": [3, 1]}, "low < high"),
        ({"integers": [1.5, 3]}, "integer"),
        ({"log_uniform": [0, 1]}, "uniform may reach 0"),
        ({"uniform": [0, float("inf")]}, "finite"),
    ],
)
def test_a_bad_field_is_refused(field: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        SearchField.model_validate(field)


def test_values_are_set_in_a_copy_and_shares_stay_shares() -> None:
    mixture = {"web_pairs": 0.2, "chips": 0.6, "scenes": 0.2}
    document = {"model": {"size": "mini"}, "phases": [{"mixture": mixture, "schedule": {"learning_rate": 1e-3}}]}
    changed = with_values(document, {"model.size": "tiny", "phases.0.mixture.web_pairs": 0.6})
    assert changed["model"] == {"size": "tiny"} and document["model"] == {"size": "mini"}
    assert changed["phases"][0]["mixture"] == pytest.approx({"web_pairs": 0.6, "chips": 0.3, "scenes": 0.1})
    every = {
        f"phases.0.mixture.{name}": value for name, value in {"web_pairs": 1.0, "chips": 2.0, "scenes": 1.0}.items()
    }
    shares = with_values(document, every)["phases"][0]["mixture"]
    assert shares == pytest.approx({"web_pairs": 0.25, "chips": 0.5, "scenes": 0.25})


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("phases.0.schedule.learning_rat", 1, "no field 'learning_rat' .valid here: learning_rate"),
        ("phases.1.schedule.learning_rate", 1, "no index of a list of 1"),
        ("model.size.name", 1, "its parent holds no fields"),
        ("phases.0.mixture.web_pairs", 1.0, "leave nothing for chips"),
    ],
)
def test_fields_that_are_not_there_are_refused(key: str, value: object, words: str) -> None:
    phase = {"mixture": {"web_pairs": 0.5, "chips": 0.5}, "schedule": {"learning_rate": 1e-3}}
    with pytest.raises(ConfigError, match=words):
        with_values({"model": {"size": "mini"}, "phases": [phase]}, {key: value})
