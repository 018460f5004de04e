"""Web pairs: sound and broken files, truth in the texts, and no clue to the class outside the picture."""

import io

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from rsplatform.world.alt_text import SUBJECTS, describe_overhead, make_alt_text
from rsplatform.world.encoding import Envelope, draw_envelope, encode
from rsplatform.world.ground_pictures import draw_ground_picture
from rsplatform.world.web import PairTask, make_pairs, plan_pairs

LARGEST_SIZE_RULE_ACCURACY = 0.60
SHOWN = ("overhead", "ground", "diagram")


@pytest.fixture(scope="module")
def pairs() -> list[dict]:
    rows = [row for task in plan_pairs(11, "pairs", 160) for row in make_pairs(task)]
    return sorted(rows, key=lambda row: row["row"])


def test_every_row_is_made_once(pairs: list[dict]) -> None:
    assert [row["row"] for row in pairs] == list(range(160))
    assert len({row["id"] for row in pairs}) == 160


def test_sound_files_decode_and_broken_ones_do_not(pairs: list[dict]) -> None:
    for row in pairs:
        if row["truth"] != "broken":
            with Image.open(io.BytesIO(row["image"])) as picture:
                picture.load()
                assert picture.format in ("JPEG", "PNG", "WEBP")
                assert min(picture.size) >= 96 and max(picture.size) <= 224
    assert 2 <= sum(row["truth"] == "broken" for row in pairs) <= 30


@pytest.mark.parametrize("damage", ["truncated", "empty", "html"])
@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
def test_damaged_files_cannot_be_read(damage: str, image_format: str) -> None:
    pixels_HWC, _ = draw_ground_picture(np.random.default_rng(1), (120, 100))
    data = encode(pixels_HWC, Envelope(120, 100, image_format, 80, False, 1.0, damage))
    with pytest.raises((OSError, SyntaxError)), Image.open(io.BytesIO(data)) as picture:
        picture.load()


def _outer_features(row: dict) -> list[float]:
    with Image.open(io.BytesIO(row["image"])) as picture:
        width, height = picture.size
        form = {"JPEG": 0.0, "PNG": 1.0, "WEBP": 2.0}[str(picture.format)]
        has_exif = float(bool(picture.getexif()))
    length = len(row["image"])
    return [width, height, width / height, width * height, length, length / (width * height), form, has_exif]


def _best_rule_accuracy(values_P: NDArray[np.float64], truth_P: NDArray[np.bool_]) -> float:
    """Balanced accuracy of the best threshold, either way round."""
    best = 0.5
    for threshold in np.quantile(values_P, np.linspace(0.05, 0.95, 19)):
        above = values_P > threshold
        accuracy = (above[truth_P].mean() + (~above[~truth_P]).mean()) / 2
        best = max(best, accuracy, 1 - accuracy)
    return float(best)


def test_size_form_and_length_do_not_tell_overhead_pictures(pairs: list[dict]) -> None:
    sound = [row for row in pairs if row["truth"] != "broken"]
    features_PF = np.array([_outer_features(row) for row in sound])
    truth_P = np.array([row["truth"] == "overhead" for row in sound])
    for column in features_PF.T:
        assert _best_rule_accuracy(column, truth_P) <= LARGEST_SIZE_RULE_ACCURACY


@pytest.mark.parametrize("row", range(4))
def test_envelopes_are_drawn_without_the_picture(row: int) -> None:
    """Whatever a row shows, its file has the same size, format, camera data, length and address."""
    tasks = [PairTask(3, "train_pairs", -1 if truth != "overhead" else 0, ((row, truth),)) for truth in SHOWN]
    rows = [make_pairs(task)[0] for task in tasks]
    first, *others = [(_outer_features(row), row["url"], row["id"]) for row in rows]
    assert all(other == first for other in others)
    assert len({row["image"] for row in rows}) == len(SHOWN), "the pictures themselves differ"


def test_each_row_has_an_envelope_of_its_own() -> None:
    drawn = {draw_envelope(np.random.default_rng(seed), 0.1) for seed in range(50)}
    assert len(drawn) == 50
    assert draw_envelope(np.random.default_rng(4), 0.1) == draw_envelope(np.random.default_rng(4), 0.1)


def test_the_two_sets_share_no_picture(pairs: list[dict]) -> None:
    labelled = [row for task in plan_pairs(11, "train_pairs", 24) for row in make_pairs(task)]
    assert not {row["image"] for row in labelled} & {row["image"] for row in pairs}
    assert {row["is_overhead"] for row in labelled} == {True, False}
    assert all(row["truth"] != "broken" for row in labelled)


def test_all_sorts_of_texts_appear(pairs: list[dict]) -> None:
    assert {row["alt_truth"] for row in pairs} == {"good", "junk", "injected"}
    good = [row["alt_text"] for row in pairs if row["alt_truth"] == "good"]
    assert len(good) > 0.5 * len(pairs) and len(set(good)) > 0.6 * len(good)
    injected = [row["alt_text"] for row in pairs if row["alt_truth"] == "injected"]
    assert any("gnore previous" in text for text in injected) and any("<" in text for text in injected)


def test_a_good_text_names_what_is_there_and_nothing_else() -> None:
    words_of = {name: words for name, _, words in SUBJECTS}
    for seed in range(40):
        rng = np.random.default_rng(seed)
        text = describe_overhead(rng, {"stadium": 0.2, "field": 0.5}, {"stadium": ["Velmar Arena"]}).lower()
        assert any(word.lower() in text for word in words_of["stadium"])
        assert not any(word in text for word in ("runway", "harbour", "forest", "water"))


def test_junk_says_nothing_about_the_picture_but_injected_text_carries_it() -> None:
    good = "aerial view of a runway"
    for seed in range(60):
        assert good in make_alt_text(np.random.default_rng(seed), "injected", good)
        junk = make_alt_text(np.random.default_rng(seed), "junk", good)
        assert good not in junk or len(junk) > 10 * len(good)
