"""Template captions: every kind is named, nothing else is, and the same chip gets the same words."""

from rsplatform.curate.template_captions import claims, write_captions

LANDMARKS = [
    {"id": "f", "kind": "field", "name": "", "position": "north", "area_fraction": 0.6},
    {"id": "s", "kind": "stadium", "name": "Brand Arena", "position": "southeast", "area_fraction": 0.01},
    {"id": "b1", "kind": "building", "name": "", "position": "west", "area_fraction": 0.02},
    {"id": "b2", "kind": "building", "name": "", "position": "west", "area_fraction": 0.02},
]


def test_every_kind_is_named_and_no_name_is() -> None:
    captions = write_captions("chip_1", LANDMARKS, 4)
    assert captions[0] == "an aerial image of a field, two buildings and a stadium"
    assert len(set(captions)) == len(captions) == 4
    assert not any("Brand" in caption for caption in captions)
    assert captions == write_captions("chip_1", LANDMARKS, 4)
    assert captions != write_captions("chip_2", LANDMARKS, 4)


def test_each_landmark_supports_one_claim() -> None:
    assert [claim["landmark_id"] for claim in claims(LANDMARKS)] == ["f", "s", "b1", "b2"]
    assert claims(LANDMARKS)[1]["text"] == "stadium in the southeast"
    assert write_captions("chip", [], 4) == []
