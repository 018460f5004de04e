"""Held-out classes: whole words in any form, found in kinds of landmarks and in captions; nothing else goes."""

import pytest

from rsplatform.dataset.holdout import Holdout


@pytest.mark.parametrize(
    ("kinds", "captions", "expected"),
    [
        (["stadium"], [], ("stadium", "landmark: stadium")),
        (["sports_stadium"], [], ("stadium", "landmark: sports_stadium")),
        (["leisure=stadium"], ["a field"], ("stadium", "landmark: leisure=stadium")),
        ([], ["a field", "Two Stadiums, seen from above"], ("stadium", "caption: Two Stadiums, seen from above")),
        ([], ["some factories"], ("factory", "caption: some factories")),
        ([], ["a factory."], ("factory", "caption: a factory.")),
        ([], ["many churches"], ("church", "caption: many churches")),
        (["storage-tank"], [], ("storage tank", "landmark: storage-tank")),
        ([], ["storage  tanks beside a road"], ("storage tank", "caption: storage  tanks beside a road")),
        (["road"], ["stadiumlike shapes", "a tank in storage", "satisfactory"], None),
        ([], [], None),
    ],
)
def test_classes_are_found_as_words(kinds, captions, expected) -> None:
    assert Holdout(["stadium", "factory", "church", "storage_tank"]).reason(kinds, captions) == (
        expected and (expected[0].replace(" ", "_"), expected[1])
    )


def test_nothing_held_out_keeps_everything() -> None:
    assert Holdout([]).reason(["stadium"], ["a stadium"]) is None


def test_a_class_needs_a_word() -> None:
    with pytest.raises(ValueError, match="' ' is no class"):
        Holdout([" "])
