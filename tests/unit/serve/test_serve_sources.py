"""An index of several chips tables and a folder of pictures is served whole: each picture from where it lies."""

import base64
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image
from test_serve_http import post, request
from tiny_service import CAPTIONS, CHIPS, MODEL, SCENE, finish, jpeg, make_artifacts, tiny_cluster

from rsplatform.artifacts import Artifact
from rsplatform.config import ConfigError, load_config
from rsplatform.curate.pipeline import run_plain
from rsplatform.index.build import BuildIndexConfig, index_pipeline
from rsplatform.index.embed import load_embedder
from rsplatform.index.finish import finish_index
from rsplatform.model.preprocess import ImageError
from rsplatform.serve.chip_pictures import MAX_SHOWN_PIXELS, shown_jpeg
from rsplatform.serve.deployment import ServeConfig, served_by
from rsplatform.serve.guard import Guarded
from rsplatform.serve.retrieval import Retrieval
from rsplatform.serve.routes import build_app
from rsplatform.serve.services import local_services

OTHER, MIXED, PHOTOS = "chips/other/v1", "index/mixed/v1", "index/photos/v1"
LARGE, SMALL = "photos:sub:large.png", "photos:small.jpg"


def noise(height: int, width: int, seed: int) -> np.ndarray:
    coarse = np.random.default_rng(seed).integers(0, 255, (height // 10, width // 10, 3), dtype=np.uint8)
    return np.kron(coarse, np.ones((10, 10, 1), dtype=np.uint8))


def build(root: str, data_root: Path, ref: str, **sources: Any) -> None:
    cluster = tiny_cluster(root, data_root=str(data_root))
    config = BuildIndexConfig.model_validate({"output": ref, "model": MODEL} | sources)
    artifact = Artifact(root, ref)
    counts = run_plain(*index_pipeline(config, cluster, artifact))
    finish_index(artifact.uri, load_embedder(root, MODEL).model_hash, config.exact_below_rows)
    finish(root, ref, counts)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with two chips artifacts of one scene, and a folder of two photographs beside it."""
    place = tmp_path_factory.mktemp("mixed")
    root = str(place / "artifacts")
    make_artifacts(root)
    shutil.copytree(Artifact(root, CHIPS).path(""), Artifact(root, OTHER).path(""))
    catalogue = Path(Artifact(root, OTHER).path("scenes.json"))
    entries = json.loads(catalogue.read_text())
    catalogue.write_text(json.dumps([entries[0] | {"landmark_attributions": ["© Mappers"]}]))
    (place / "photos" / "sub").mkdir(parents=True)
    (place / "photos" / "small.jpg").write_bytes(jpeg(noise(60, 120, 1)))
    Image.fromarray(noise(1500, 2000, 2)).save(place / "photos" / "sub" / "large.png", compress_level=1)
    chips = [{"chips": CHIPS, "captions": CAPTIONS}, {"chips": OTHER, "id_suffix": "~other"}]
    folders = [{"path": "photos", "scene": "photos"}]
    build(root, place, MIXED, chips=chips, folders=folders)
    build(root, place, PHOTOS, folders=folders)
    return place


def retrieval_of(place: Path, index: str, chips: list[str]) -> Retrieval:
    return Retrieval(tiny_cluster(str(place / "artifacts"), data_root=str(place)), MODEL, index, chips)


@pytest.fixture(scope="module")
def app(place: Path) -> Any:
    return build_app(local_services(retrieval_of(place, MIXED, [CHIPS, OTHER])), Guarded(2_000_000, 5))


def test_every_source_is_found_shown_and_looked_into(app: Any) -> None:
    assert request(app, "GET", "/health").json()["num_chips"] == 2 * 64 + 2
    for chip_id in (f"{SCENE}-0003", f"{SCENE}-0003~other", LARGE, SMALL):
        picture = request(app, "GET", f"/chips/{chip_id}.jpg")
        assert picture.headers["content-type"] == "image/jpeg" and picture.content.startswith(b"\xff\xd8")
        body = {"image": base64.b64encode(picture.content).decode(), "k": 2, "localize": True}
        found = post(app, "/v1/search", body).json()["results"]
        assert chip_id in {item["chip_id"] for item in found} and all(item["spot"] for item in found)
        assert np.isclose(found[0]["score"], 1, atol=0.02)
        like = post(app, "/v1/search", {"chip_id": chip_id, "k": 100}).json()["results"]
        assert len(like) == 100 and chip_id not in {item["chip_id"] for item in like}
        assert post(app, "/v1/localize", {"chip_id": chip_id, "texts": ["road"]}).status_code == 200
        assert isinstance(post(app, "/v1/caption", {"chip_id": chip_id}).json()["caption"], str)


def test_a_photograph_has_no_place_and_says_so(app: Any) -> None:
    image = base64.b64encode(request(app, "GET", f"/chips/{SMALL}.jpg").content).decode()
    (found,) = post(app, "/v1/search", {"image": image, "k": 1, "localize": True}).json()["results"]
    assert found["chip_id"] == SMALL and found["scene"] == "photos"
    unknown = ("bounds_lonlat", "corners_lonlat", "ground_sample_distance_m", "datetime")
    assert [found[name] for name in unknown] == [None] * 4
    assert found["spot"]["peak_lonlat"] is None and found["spot"]["box_lonlat"] is None
    world = post(app, "/v1/search", {"image": image, "k": 100, "bbox": [-180, -90, 180, 90]}).json()["results"]
    assert len(world) == 100 and all(item["bounds_lonlat"] for item in world)
    regions = post(app, "/v1/localize", {"chip_id": SMALL, "texts": ["road"], "output": "geojson"})
    assert regions.status_code == 422 and "no place on Earth" in regions.json()["detail"]
    mask = post(app, "/v1/localize", {"chip_id": SMALL, "texts": ["road"], "output": "mask"}).json()
    assert (mask["masks"][0]["height_px"], mask["masks"][0]["width_px"]) == (60, 120)
    assert mask["corners_lonlat"] is None


def test_a_heatmap_has_the_form_of_its_picture(app: Any) -> None:
    for chip_id, form in ((SMALL, 2), (LARGE, 4 / 3), (f"{SCENE}-0003", 1)):
        heat = Image.open(io.BytesIO(request(app, "GET", f"/heatmaps/{chip_id}.png?text=road").content))
        assert heat.width / heat.height == pytest.approx(form, rel=0.04)


def test_a_large_picture_is_shown_small_and_a_small_one_as_it_is(place: Path) -> None:
    small = (place / "photos" / "small.jpg").read_bytes()
    assert shown_jpeg(small) == small
    shown = Image.open(io.BytesIO(shown_jpeg((place / "photos" / "sub" / "large.png").read_bytes())))
    assert 0.9 * MAX_SHOWN_PIXELS < shown.width * shown.height <= MAX_SHOWN_PIXELS
    assert shown.width / shown.height == pytest.approx(4 / 3, rel=0.01)
    with pytest.raises(ImageError):
        shown_jpeg(small[:300])


def test_a_small_jpeg_that_says_where_and_how_it_was_taken_is_shown_without() -> None:
    pixels_HWC = noise(60, 120, 3)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    exif.get_ifd(ExifTags.IFD.GPSInfo)[ExifTags.GPS.GPSLatitudeRef] = "N"
    for told in ({"exif": exif}, {"xmp": b'<x tiff:Orientation="6"/>'}, {"comment": b"by me"}):
        buffer = io.BytesIO()
        Image.fromarray(pixels_HWC).save(buffer, "JPEG", quality=95, **told)
        assert set(told) & Image.open(buffer).info.keys()
        shown = Image.open(io.BytesIO(shown_jpeg(buffer.getvalue())))
        assert not shown.getexif() and not set(told) & shown.info.keys()
        assert shown.size == (120, 60), "turned, where the model is not"
        assert np.abs(np.asarray(shown).astype(int) - pixels_HWC).mean() < 12


def test_a_picture_that_is_gone_leaves_the_other_hits(place: Path) -> None:
    retrieval = retrieval_of(place, PHOTOS, [])
    app = build_app(local_services(retrieval), Guarded(2_000_000, 5))
    assert request(app, "GET", "/v1/stats").json()["scenes"] == []
    file = place / "photos" / "small.jpg"
    content = file.read_bytes()
    try:
        for broken in (None, content[:300]):
            file.unlink() if broken is None else file.write_bytes(broken)
            found = post(app, "/v1/search", {"text": "road", "k": 5, "localize": True}).json()["results"]
            assert {item["chip_id"]: bool(item["spot"]) for item in found} == {SMALL: False, LARGE: True}
            answer = request(app, "GET", f"/chips/{SMALL}.jpg")
            assert answer.status_code == 404 and "cannot be read any more" in answer.json()["detail"]
            assert str(place) not in answer.text
    finally:
        file.write_bytes(content)


def test_scenes_of_several_artifacts_are_one_catalogue(app: Any) -> None:
    stats = request(app, "GET", "/v1/stats").json()
    assert stats["chips"] == [CHIPS, OTHER]
    (scene,) = stats["scenes"]
    assert scene["id"] == SCENE and scene["attribution"] == "© Test <b>Survey</b>; © Mappers"


def test_chips_that_are_not_named_and_scenes_that_differ_are_refused(place: Path) -> None:
    with pytest.raises(ConfigError, match=f"{MIXED} holds pictures of {OTHER}, served are those of {CHIPS}"):
        retrieval_of(place, MIXED, [CHIPS])
    with pytest.raises(ConfigError, match=f"holds pictures of {OTHER}, {CHIPS}, served are those of no chips"):
        retrieval_of(place, MIXED, [])
    catalogue = Path(Artifact(str(place / "artifacts"), OTHER).path("scenes.json"))
    content = catalogue.read_text()
    (entry,) = json.loads(content)
    try:
        catalogue.write_text(json.dumps([entry | {"grid": entry["grid"] | {"width": 9}}]))
        with pytest.raises(ConfigError, match=f"scene {SCENE} of {CHIPS} and that of {OTHER} are different rasters"):
            retrieval_of(place, MIXED, [CHIPS, OTHER])
    finally:
        catalogue.write_text(content)


@pytest.mark.parametrize(("chips", "refs"), [("chips: chips/a/v1", 1), ("chips: [chips/a/v1, chips/b/v1]", 2), ("", 0)])
def test_a_recipe_names_one_or_several_chips_or_none(tmp_path: Path, chips: str, refs: int) -> None:
    (tmp_path / "r.yaml").write_text(f"output: deployment/a/v1\nmodel: {MODEL}\nindex: {MIXED}\n{chips}\n")
    config = load_config(ServeConfig, tmp_path / "r.yaml")
    assert len(served_by(config, tiny_cluster("/nowhere")).chips) == refs
