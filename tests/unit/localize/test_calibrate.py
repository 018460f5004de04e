"""Thresholds come from which images name a class, never from where: a better model needs no mask to be told apart."""

import inspect

import numpy as np
import pyarrow as pa
import pytest

from rsplatform.config import ConfigError
from rsplatform.localize import calibrate
from rsplatform.localize.calibrate import Calibration, Words, best_threshold, class_margins, thresholds

CHIPS = Calibration(chips="chips/a/v1", min_images=3)


def f1(margins: np.ndarray, named: np.ndarray, threshold: float) -> float:
    passing = margins > threshold
    return 2 * (passing & named).sum() / (passing.sum() + named.sum())


@pytest.mark.parametrize("seed", range(8))
def test_no_threshold_agrees_better_with_the_names(seed: int) -> None:
    generator = np.random.default_rng(seed)
    named = generator.random(60) < 0.3
    margins = np.round(generator.normal(0, 1, 60) + named, 1)  # with ties
    threshold, best = best_threshold(margins, named)
    assert f1(margins, named, threshold) == pytest.approx(best)
    assert best == pytest.approx(max(f1(margins, named, other) for other in np.arange(-5, 5, 0.05)))


def test_classes_that_are_told_apart_get_a_threshold_between() -> None:
    margins = np.array([0.5, 0.4, 0.1, 0.0, -0.2])
    threshold, best = best_threshold(margins, np.array([True, True, False, False, False]))
    assert (threshold, best) == (pytest.approx(0.25), 1.0)
    with pytest.raises(ValueError, match="no image"):
        best_threshold(margins, np.zeros(5, dtype=bool))


def test_margins_are_against_the_best_background() -> None:
    maps_PHW = np.array([0.1, 0.3, 0.2, 0.6, 0.5])[:, None, None] * np.ones((5, 2, 3))
    margins = class_margins(maps_PHW, [0, 0, 2, 1, 2])
    assert margins.shape == (2, 2, 3)
    np.testing.assert_allclose(margins[:, 0, 0], [0.3, 0.2])


def test_names_are_whole_words_in_any_case_and_number() -> None:
    words = Words((("stadium",), ("harbour", "port"), ("tank (oil)",)))
    assert words.named(["Two Stadiums beside a road"]) == [True, False, False]
    assert words.named(["an airport", "a Port in the north"]) == [False, True, False]
    assert words.named(["an airport"]) == words.named([]) == [False, False, False]
    assert words.named(["sports_stadium", "a tank, oil beside it"]) == [True, False, False]  # kinds join words by _
    assert words.named(["Tank-Oil"]) == [False, False, True]


def test_each_class_says_what_its_threshold_rests_on() -> None:
    named = [[True, False]] * 4 + [[False, True]] * 4
    margins = [[0.5, 0.1]] * 4 + [[0.2, 0.3]] * 4
    rows = pa.table({"named": named, "margins": margins})
    first, second = thresholds(rows, ["stadium", "harbour"], CHIPS)
    assert (first["threshold"], second["threshold"]) == (pytest.approx(0.35), pytest.approx(0.2))
    assert first["f1"] == 1.0 and first["f1_at_0"] == pytest.approx(2 / 3) and first["named"] == 4
    few = pa.table({"named": [[True]] * 2 + [[False]] * 6, "margins": [[0.1]] * 8})
    with pytest.raises(ConfigError, match=r"2 of 8 images of chips/a/v1 name 'stadium', at least 3 .*`words`"):
        thresholds(few, ["stadium"], CHIPS)


def test_no_field_and_no_argument_takes_a_mask() -> None:
    assert set(Calibration.model_fields) == {"chips", "captions", "max_images", "min_images"}
    for _, function in inspect.getmembers(calibrate, inspect.isfunction):
        assert not [name for name in inspect.signature(function).parameters if "mask" in name]
