"""Every form of /v1/localize over every picture it takes, what /v1/caption says, and names that are no names."""

import base64
import io
from typing import Any

import numpy as np
import pytest
from PIL import Image
from test_serve_http import CHIP, app, picture, post, request, retrieval
from tiny_service import HOSTILE_CAPTION, SCENE

from rsplatform.serve.captioning import greedy_caption
from rsplatform.serve.retrieval import Retrieval

__all__ = ["app", "retrieval"]  # fixtures

OUTPUTS = {"scores": "maps", "mask": "masks", "geojson": "geojson"}
TEXTS = ["road", "water"]


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("kind", ["image", "chip_id", "scene_id"])
def test_every_picture_gives_every_output(app: Any, retrieval: Retrieval, kind: str, output: str) -> None:
    west, south, east, north = retrieval.catalogue.scenes[SCENE].bounds_lonlat
    about: dict[str, Any] = {"image": {"image": picture()}, "chip_id": {"chip_id": CHIP}}.get(kind, {})
    if kind == "scene_id":
        about = {"scene_id": SCENE, "bbox": [west, (south + north) / 2, (west + east) / 2, north]}
    response = post(app, "/v1/localize", about | {"texts": TEXTS, "output": output})
    if (kind, output) == ("image", "geojson"):
        assert response.status_code == 422 and "no place on Earth" in response.json()["detail"]
        return
    answer = response.json()
    assert {name for name in OUTPUTS.values() if answer[name]} == {OUTPUTS[output]}
    if output == "geojson":
        assert {feature["properties"]["text"] for feature in answer["geojson"]["features"]} == set(TEXTS)
    else:
        assert [item["text"] for item in answer[OUTPUTS[output]]] == TEXTS
    assert (answer["corners_lonlat"] is None) == (kind == "image")


def test_a_question_by_picture_brings_its_heatmaps_along(app: Any) -> None:
    """The same as a link gives where the picture is that of a chip; without `localize` there are none."""
    sent = base64.b64encode(request(app, "GET", f"/chips/{CHIP}.jpg").content).decode()
    (plain,) = post(app, "/v1/search", {"image": sent, "k": 1}).json()["results"]
    assert plain["heatmap_url"] is None and plain["spot"] is None
    (seen,) = post(app, "/v1/search", {"image": sent, "k": 1, "localize": True}).json()["results"]
    assert seen["chip_id"] == CHIP and seen["spot"]
    own = request(app, "GET", f"/heatmaps/{CHIP}.png?like={CHIP}").content
    kind, _, data = seen["heatmap_url"].partition(",")
    assert kind == "data:image/png;base64"
    found, expected = (np.asarray(Image.open(io.BytesIO(each))).astype(int) for each in (base64.b64decode(data), own))
    assert found.shape == expected.shape and np.abs(found - expected).max() <= 8  # float16 in the index


def test_a_caption_is_the_models_own_and_not_the_stored_one(app: Any, retrieval: Retrieval) -> None:
    chip_id = f"{SCENE}-0000"
    assert retrieval.chip(chip_id).caption == HOSTILE_CAPTION
    image = request(app, "GET", f"/chips/{chip_id}.jpg").content
    own = greedy_caption(retrieval.embedder, image, retrieval.chip(chip_id).ground_sample_distance_m or 0)
    said = post(app, "/v1/caption", {"chip_id": chip_id}).json()["caption"]
    assert said == own != HOSTILE_CAPTION


@pytest.mark.parametrize("name", ["../../etc/passwd", "..", ".git", "a/b", "a\\b", "a\x00b", "x" * 201, ""])
def test_a_name_that_could_be_a_path_is_refused_before_it_is_looked_up(app: Any, name: str) -> None:
    bodies = [
        ("/v1/search", {"chip_id": name}),
        ("/v1/localize", {"chip_id": name, "texts": ["a"]}),
        ("/v1/localize", {"scene_id": name, "bbox": [0, 0, 1, 1], "texts": ["a"]}),
        ("/v1/caption", {"chip_id": name}),
    ]
    for path, body in bodies:
        assert post(app, path, body).status_code == 422
    assert request(app, "GET", f"/heatmaps/{CHIP}.png", params={"like": name}).status_code == 422


@pytest.mark.parametrize("name", ["x' OR '1'='1", "town_north-0003'--", "%", 'a"b'])
def test_a_name_is_never_part_of_a_query(app: Any, name: str) -> None:
    assert post(app, "/v1/search", {"chip_id": name}).status_code == 404
    assert post(app, "/v1/caption", {"chip_id": name}).status_code == 404
    assert request(app, "GET", f"/heatmaps/{CHIP}.png", params={"like": name}).status_code == 404
