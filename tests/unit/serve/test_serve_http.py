"""The HTTP contract in process: every route, what bad input gets, and that data never becomes markup or SQL."""

import asyncio
import base64
import io
import json
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from tiny_service import CHIPS, HOSTILE_CAPTION, INDEX, MODEL, SCENE, make_all, make_model, tiny_cluster

from rsplatform.config import ConfigError
from rsplatform.serve.guard import Guarded
from rsplatform.serve.query import query_vector
from rsplatform.serve.retrieval import Retrieval
from rsplatform.serve.routes import build_app
from rsplatform.serve.services import local_services

CHIP = f"{SCENE}-0003"


@pytest.fixture(scope="module")
def retrieval(tmp_path_factory: pytest.TempPathFactory) -> Retrieval:
    root = str(tmp_path_factory.mktemp("served") / "artifacts")
    make_all(root)
    return Retrieval(tiny_cluster(root), MODEL, INDEX, CHIPS)


@pytest.fixture(scope="module")
def app(retrieval: Retrieval) -> Any:
    return build_app(local_services(retrieval), Guarded(max_body_bytes=2_000_000, max_body_seconds=5))


def request(app: Any, method: str, path: str, **content: Any) -> httpx.Response:
    async def once() -> httpx.Response:
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000") as client:
            return await client.request(method, path, **content)

    work: Coroutine[Any, Any, httpx.Response] = once()
    return asyncio.run(work)


def post(app: Any, path: str, body: Any) -> httpx.Response:
    return request(app, "POST", path, json=body)


def picture(size: tuple[int, int] = (80, 64), form: str = "PNG") -> str:
    pixels = np.random.default_rng(1).integers(0, 255, (*size, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, form)
    return base64.b64encode(buffer.getvalue()).decode()


def test_search_by_text_ranks_as_the_vectors_do(app: Any, retrieval: Retrieval) -> None:
    answer = post(app, "/v1/search", {"text": "a stadium", "k": 5}).json()
    vector_E = retrieval.embedder.embed_texts(["a stadium"])[0]
    assert [item["chip_id"] for item in answer["results"]] == [hit.id for hit in retrieval.index.search(vector_E, 5)]
    assert answer["model_hash"] == retrieval.embedder.model_hash
    assert all(item["heatmap_url"] and item["spot"] is None for item in answer["results"])


def test_a_chip_finds_itself_by_its_picture_and_others_by_its_id(app: Any, retrieval: Retrieval) -> None:
    image = request(app, "GET", f"/chips/{CHIP}.jpg").content
    body = {"image": base64.b64encode(image).decode(), "k": 1}
    assert post(app, "/v1/search", body).json()["results"][0]["chip_id"] == CHIP
    others = post(app, "/v1/search", {"chip_id": CHIP, "k": 63}).json()["results"]
    assert len(others) == 63 and CHIP not in {item["chip_id"] for item in others}


def test_localize_says_where_on_earth(app: Any) -> None:
    answer = post(app, "/v1/search", {"text": "road", "k": 4, "localize": True}).json()
    for item in answer["results"]:
        west, south, east, north = item["bounds_lonlat"]
        longitude, latitude = item["spot"]["peak_lonlat"]
        assert west <= longitude <= east and south <= latitude <= north
        inner = item["spot"]["box_lonlat"]
        assert inner[0] <= longitude <= inner[2] and inner[1] <= latitude <= inner[3]
        heatmap = request(app, "GET", item["heatmap_url"])
        assert Image.open(io.BytesIO(heatmap.content)).mode == "RGBA"


def test_filters_reach_the_index(app: Any, retrieval: Retrieval) -> None:
    chip = retrieval.chip(CHIP)
    center = [(chip.bounds_lonlat[i] + chip.bounds_lonlat[i + 2]) / 2 for i in (0, 1)]
    found = post(app, "/v1/search", {"text": "x", "bbox": [*center, *center]}).json()["results"]
    assert [item["chip_id"] for item in found] == [CHIP]
    found = post(app, "/v1/search", {"text": "x", "k": 64, "kinds": ["o'hara field"]}).json()["results"]
    assert found and all(item["kinds"] == ["o'hara field"] for item in found)
    assert post(app, "/v1/search", {"text": "x", "datetime": "../2020-01-01T00:00:00Z"}).json()["results"] == []
    assert post(app, "/v1/search", {"text": "x", "gsd_m": [5, 9]}).json()["results"] == []


def test_localize_gives_scores_and_regions(app: Any, retrieval: Retrieval) -> None:
    answer = post(app, "/v1/localize", {"chip_id": CHIP, "texts": ["road", "water"]}).json()
    assert [item["text"] for item in answer["maps"]] == ["road", "water"]
    assert np.array(answer["maps"][0]["scores"]).shape == (8, 8)
    regions = post(app, "/v1/localize", {"chip_id": CHIP, "texts": ["road"], "output": "geojson"}).json()["geojson"]
    west, south, east, north = retrieval.chip(CHIP).bounds_lonlat
    for feature in regions["features"]:
        for longitude, latitude in feature["geometry"]["coordinates"][0]:
            assert west - 1e-6 <= longitude <= east + 1e-6 and south - 1e-6 <= latitude <= north + 1e-6
    upload = post(app, "/v1/localize", {"image": picture((64, 160)), "texts": ["road"]}).json()["maps"][0]
    assert np.array(upload["scores"]).shape == (8, 20) and upload["spot"]["peak_lonlat"] is None


def test_a_box_of_a_scene_is_looked_at_like_a_picture_that_lies_on_earth(app: Any, retrieval: Retrieval) -> None:
    west, south, east, north = retrieval.catalogue.scenes[SCENE].bounds_lonlat
    middle = [(west + east) / 2, (south + north) / 2]
    bbox = [west, middle[1], middle[0], north]
    body = {"scene_id": SCENE, "bbox": bbox, "texts": ["road", "water"]}
    answer = post(app, "/v1/localize", body).json()
    rows, columns = np.array(answer["maps"][0]["scores"]).shape
    assert abs(rows - 32) <= 1 and abs(columns - 32) <= 1  # a quarter of 512 px in patches of 8 px
    for item in answer["maps"]:
        longitude, latitude = item["spot"]["peak_lonlat"]
        assert bbox[0] <= longitude <= bbox[2] and bbox[1] <= latitude <= bbox[3] and item["heatmap_url"] is None
    assert np.allclose(answer["corners_lonlat"], [bbox[:1] + bbox[3:], bbox[2:], [bbox[2], bbox[1]], bbox[:2]])
    coarse = post(app, "/v1/localize", body | {"gsd_m": 4}).json()["maps"][0]["scores"]
    assert abs(len(coarse) - 16) <= 1
    regions = post(app, "/v1/localize", body | {"output": "geojson"}).json()["geojson"]["features"]
    assert {feature["properties"]["text"] for feature in regions} == {"road", "water"}


def test_a_mask_has_the_size_of_the_picture_and_marks_the_peak(app: Any) -> None:
    for picture_of, size in (({"chip_id": CHIP}, (64, 64)), ({"image": picture((64, 160))}, (160, 64))):
        answer = post(app, "/v1/localize", picture_of | {"texts": ["road"], "output": "mask"}).json()
        (found,) = answer["masks"]
        mask_HW = np.asarray(Image.open(io.BytesIO(base64.b64decode(found["mask"]))))
        assert mask_HW.shape == size[::-1] == (found["height_px"], found["width_px"])
        assert set(np.unique(mask_HW)) == {0, 255}
        row, column = (int(part * side) for part, side in zip(found["spot"]["peak_fraction"], size[::-1], strict=True))
        assert mask_HW[row, column] == 255


def test_what_is_not_wanted_is_taken_away_from_the_query(app: Any, retrieval: Retrieval) -> None:
    written = post(app, "/v1/search", {"text": "a harbour, not a stadium or water", "k": 64}).json()
    assert written["read_as"] == {"wanted": ["a harbour"], "unwanted": ["a stadium", "water"]}
    spelled = post(app, "/v1/search", {"text": "a harbour", "without": ["a stadium", "water"], "k": 64}).json()
    results = [[item | {"heatmap_url": None} for item in each["results"]] for each in (spelled, written)]
    assert results[0] == results[1]  # but for the links, which ask as they were asked
    harbour_E, stadium_E, water_E = retrieval.embedder.embed_texts(["a harbour", "a stadium", "water"])
    vector_E = query_vector(harbour_E[None], np.stack([stadium_E, water_E]))
    best = retrieval.index.search(vector_E, 1)[0]
    assert written["results"][0]["chip_id"] == best.id and np.linalg.norm(vector_E) == pytest.approx(1, abs=1e-5)


def test_the_heatmap_of_a_hit_shows_the_whole_query(app: Any) -> None:
    body = {"text": "road, not water", "without": ["a stadium"], "k": 1, "localize": True}
    (hit,) = post(app, "/v1/search", body).json()["results"]
    scores = {}
    for name, extra in {"same": "", "plain": None}.items():
        url = hit["heatmap_url"] if extra == "" else f"/heatmaps/{hit['chip_id']}.png?text=road"
        scores[name] = request(app, "GET", url).content
    assert "without=a+stadium" in hit["heatmap_url"] and scores["same"] != scores["plain"]


def test_embed_predict_and_caption(app: Any, retrieval: Retrieval) -> None:
    image = picture()
    vectors = post(app, "/v1/embed", {"texts": ["road"], "images": [image]}).json()
    assert np.linalg.norm(vectors["image_embeddings"][0]) == pytest.approx(1, abs=1e-4)
    body = {"instances": [{"image": image}, {"text": "road"}, {"image": image, "texts": ["road", "water"]}]}
    predicted = post(app, "/predict", body | {"parameters": {"batch_size": 2}}).json()["predictions"]
    assert np.allclose(predicted[0]["embedding"], vectors["image_embeddings"][0], atol=1e-5)
    assert np.allclose(predicted[1]["embedding"], vectors["text_embeddings"][0], atol=1e-5)
    cosine = float(np.dot(vectors["image_embeddings"][0], vectors["text_embeddings"][0]))
    assert predicted[2]["scores"][0] == pytest.approx(cosine, abs=1e-4) and len(predicted[2]["scores"]) == 2
    first = post(app, "/v1/caption", {"chip_id": CHIP}).json()["caption"]
    assert first == post(app, "/v1/caption", {"chip_id": CHIP}).json()["caption"]


def test_health_stats_page_and_openapi(app: Any) -> None:
    assert request(app, "GET", "/health").json()["num_chips"] == 64
    stats = request(app, "GET", "/v1/stats").json()
    assert stats["kinds"]["stadium"] == 8 and stats["scenes"][0]["id"] == SCENE and "uri" not in stats["scenes"][0]
    page = request(app, "GET", "/")
    assert "unsafe" not in page.headers["content-security-policy"]
    assert "http://" not in page.text and "https://" not in page.text
    for path in ("/static/app.js", "/static/style.css", "/static/maplibre/maplibre-gl.js"):
        assert request(app, "GET", path).status_code == 200
    paths = request(app, "GET", "/openapi.json").json()["paths"]
    assert {"/v1/search", "/v1/localize", "/v1/embed", "/v1/caption", "/predict", "/health"} <= set(paths)
    assert "examples" in json.dumps(request(app, "GET", "/openapi.json").json())


BAD_BODIES = [
    ("/v1/search", {}, "exactly one"),
    ("/v1/search", {"text": "a", "chip_id": CHIP}, "exactly one"),
    ("/v1/search", {"text": "  "}, "text"),
    ("/v1/search", {"text": "a" * 513}, "text"),
    ("/v1/search", {"text": "a", "k": 101}, "k"),
    ("/v1/search", {"text": "a", "k": "many"}, "k"),
    ("/v1/search", {"text": "a", "bbox": [0, 10, 1, 5]}, "bbox"),
    ("/v1/search", {"text": "a", "bbox": [0, 1, 2]}, "bbox"),
    ("/v1/search", {"text": "a", "bbox": [-181, 0, 1, 5]}, "bbox"),
    ("/v1/search", {"text": "a", "gsd_m": [2, 1]}, "gsd_m"),
    ("/v1/search", {"text": "a", "datetime": "yesterday"}, "datetime"),
    ("/v1/search", {"text": "a", "colour": "red"}, "colour"),
    ("/v1/search", {"chip_id": "../../etc/passwd"}, "chip_id"),
    ("/v1/search", [], "dictionary"),
    ("/v1/localize", {"chip_id": CHIP, "texts": []}, "texts"),
    ("/v1/localize", {"image": "AAAA", "texts": ["a"], "output": "geojson"}, "no place on Earth"),
    ("/v1/localize", {"scene_id": SCENE, "texts": ["a"]}, "together"),
    ("/v1/localize", {"chip_id": CHIP, "gsd_m": 1, "texts": ["a"]}, "gsd_m"),
    ("/v1/localize", {"scene_id": SCENE, "bbox": [0, 0, 1, 1], "texts": ["a"]}, "touches the scene"),
    ("/v1/localize", {"scene_id": SCENE, "bbox": [-179, -80, 179, 80], "texts": ["a"]}, "at most"),
    ("/v1/search", {"text": "not a marina"}, "say also what to look for"),
    ("/v1/search", {"text": "a", "without": ["a"] * 9}, "without"),
    ("/v1/embed", {}, "at least one"),
    ("/predict", {"instances": []}, "instances"),
    ("/predict", {"instances": [{"texts": ["a"]}]}, "instance"),
]


@pytest.mark.parametrize(("path", "body", "word"), BAD_BODIES)
def test_bad_bodies_get_a_sentence_that_names_the_field(app: Any, path: str, body: Any, word: str) -> None:
    response = post(app, path, body)
    assert response.status_code == 422 and word in response.json()["detail"]


@pytest.mark.parametrize(
    "content", [b"{", b"\xff\xfe", b'{"text": NaN}', b'{"text": "\\ud800"}', b"null", b'{"k": 1e999}']
)
def test_broken_json_is_no_server_error(app: Any, content: bytes) -> None:
    response = request(app, "POST", "/v1/search", content=content, headers={"content-type": "application/json"})
    assert 400 <= response.status_code < 500 and response.json()["detail"]


def bomb() -> bytes:
    """A PNG whose header promises 60,000 x 60,000 pixels."""
    data = bytearray(base64.b64decode(picture((8, 8))))
    data[16:24] = (60_000).to_bytes(4, "big") * 2
    return bytes(data)


POISONED = {
    "bomb": bomb(),
    "cut off": base64.b64decode(picture((64, 64), "JPEG"))[:400],
    "text": b"hello",
    "svg": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
    "gif": base64.b64decode(picture((8, 8), "GIF")),
    "tiff": base64.b64decode(picture((8, 8), "TIFF")),
}


@pytest.mark.parametrize("name", POISONED)
@pytest.mark.parametrize("path", ["/v1/search", "/v1/localize", "/v1/caption", "/v1/embed", "/predict"])
def test_poisoned_pictures_are_refused(app: Any, path: str, name: str) -> None:
    image = base64.b64encode(POISONED[name]).decode()
    body: dict[str, Any] = {"image": image}
    if path == "/v1/localize":
        body["texts"] = ["a"]
    if path == "/v1/embed":
        body = {"images": [image]}
    if path == "/predict":
        body = {"instances": [body]}
    response = post(app, path, body)
    assert response.status_code == 422 and response.json()["detail"].startswith("image")


def test_base64_that_is_none_is_refused(app: Any) -> None:
    assert "base64" in post(app, "/v1/search", {"image": "not base64!"}).json()["detail"]


@pytest.mark.parametrize(
    "path",
    [
        *(
            "/chips/nowhere.jpg",
            "/chips/..%2F..%2Fetc%2Fpasswd.jpg",
            "/chips/%2e%2e.jpg",
            "/heatmaps/nowhere.png?text=a",
        ),
        *(
            f"/heatmaps/{CHIP}.png",
            "/tiles/nowhere/0/0/0.png",
            f"/tiles/{SCENE}/3/9/0.png",
            f"/tiles/{SCENE}/99/0/0.jpg",
        ),
        *("/tiles/..%2f..%2fx/0/0/0.png", f"/tiles/{SCENE}/a/0/0.png", f"/tiles/{SCENE}/0/0/0.exe"),
        *("/static/../app.py", "/static/%2e%2e/app.py", "/static/maplibre/..%2f__init__.py"),
    ],
)
def test_paths_that_name_nothing_are_refused(app: Any, path: str) -> None:
    assert request(app, "GET", path).status_code in {404, 422}


def test_tiles_show_the_scene(app: Any, retrieval: Retrieval) -> None:
    west, _, _, north = retrieval.catalogue.scenes[SCENE].bounds_lonlat
    zoom = 15
    x = int((west + 0.004 + 180) / 360 * 2**zoom)
    sine = np.sin(np.radians(north - 0.003))
    y = int((0.5 - np.log((1 + sine) / (1 - sine)) / (4 * np.pi)) * 2**zoom)
    tile = request(app, "GET", f"/tiles/{SCENE}/{zoom}/{x}/{y}.png")
    assert Image.open(io.BytesIO(tile.content)).size == (256, 256)
    assert request(app, "GET", f"/tiles/{SCENE}/{zoom}/{x}/{y}.jpg").headers["content-type"] == "image/jpeg"
    assert request(app, "GET", f"/tiles/{SCENE}/{zoom}/0/0.png").status_code == 204


def test_captions_travel_as_data(app: Any) -> None:
    found = post(app, "/v1/search", {"text": "x", "k": 64})
    assert HOSTILE_CAPTION in {item["caption"] for item in found.json()["results"]}
    assert found.headers["content-type"] == "application/json"
    assert found.headers["x-content-type-options"] == "nosniff"


def test_a_model_that_did_not_make_the_index_is_refused(retrieval: Retrieval, tmp_path: Path) -> None:
    root = str(tmp_path / "artifacts")
    make_all(root)
    make_model(root, "model/other/v1", seed=1)
    with pytest.raises(ConfigError, match="built with model"):
        Retrieval(tiny_cluster(root), "model/other/v1", INDEX, CHIPS)


def test_a_vrt_under_the_name_of_a_tif_is_not_opened(tmp_path: Path) -> None:
    root = str(tmp_path / "artifacts")
    make_all(root)
    scene = Path(root) / "scenes" / f"{SCENE}.tif"
    real = scene.rename(scene.with_name("secret.tif"))
    scene.write_text(
        '<VRTDataset rasterXSize="512" rasterYSize="512"><VRTRasterBand dataType="Byte" band="1"><SimpleSource>'
        f"<SourceFilename>{real}</SourceFilename></SimpleSource></VRTRasterBand></VRTDataset>"
    )
    app = build_app(
        local_services(Retrieval(tiny_cluster(root), MODEL, INDEX, CHIPS)), Guarded(1_000_000, max_body_seconds=5)
    )
    response = request(app, "GET", f"/tiles/{SCENE}/0/0/0.png")
    assert response.status_code == 404 and str(tmp_path) not in response.text
