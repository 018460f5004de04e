"""The world as a folder: deterministic, idempotent, refusing, and true to its own masks and landmarks."""

import hashlib
import json
from pathlib import Path
from typing import Any

import geopandas
import numpy as np
import pytest
import rasterio
import rasterio.features
from pydantic import ValidationError

from rsplatform.artifacts import Artifact
from rsplatform.world.build import count_made
from rsplatform.world.generate import WorldConfig, WorldError, make_world
from rsplatform.world.palettes import CLASS_NAMES

TINY = WorldConfig(
    seed=5, scene_size_px=256, num_train_scenes=2, num_val_scenes=1, num_web_pairs=30, num_train_pairs=40
)


@pytest.fixture(scope="module")
def tiny_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(TINY, tmp_path_factory.mktemp("world"), num_workers=1)


def _digests(folder: Path) -> dict[str, str]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def test_bytes_depend_on_the_config_alone_not_on_the_workers(tiny_world: Path, tmp_path: Path) -> None:
    again = make_world(TINY, tmp_path / "again", num_workers=2)
    assert _digests(again) == _digests(tiny_world)


def test_the_counts_of_its_artifact_are_read_back_from_the_files(tmp_path: Path) -> None:
    artifact = Artifact(str(tmp_path), "world/tiny/v1")
    config = TINY.model_copy(update={"num_web_pairs": 7, "num_train_pairs": 5, "num_val_scenes": 0})
    folder = make_world(config, Path(artifact.uri), num_workers=1)
    features = json.loads((folder / "landmarks.geojson").read_text())["features"]
    expected = {"scenes": 2, "masks": 2, "landmarks": len(features), "web_pairs": 7, "web_train_pairs": 5}
    assert count_made(artifact) == expected and features
    (folder / "scenes/train_001.tif").unlink()
    assert count_made(artifact) == expected | {"scenes": 1}


def test_another_seed_gives_another_land(tiny_world: Path, tmp_path: Path) -> None:
    bare = {"num_web_pairs": 0, "num_train_pairs": 0, "num_train_scenes": 1, "num_val_scenes": 0}
    other = make_world(TINY.model_copy(update={**bare, "seed": 6}), tmp_path / "other", num_workers=1)
    assert (other / "scenes/train_000.tif").read_bytes() != (tiny_world / "scenes/train_000.tif").read_bytes()


def test_a_finished_world_is_left_alone(tiny_world: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in tiny_world.rglob("*")}
    make_world(TINY, tiny_world)
    assert {path: path.stat().st_mtime_ns for path in tiny_world.rglob("*")} == before


def test_a_finished_world_of_another_config_is_refused_with_the_difference(tiny_world: Path) -> None:
    with pytest.raises(WorldError, match="num_web_pairs: 30 there, 31 asked"):
        make_world(TINY.model_copy(update={"num_web_pairs": 31}), tiny_world)


def test_leftovers_of_another_world_are_refused(tmp_path: Path) -> None:
    (tmp_path / "scenes").mkdir()
    (tmp_path / "scenes/train_900.tif").touch()
    with pytest.raises(WorldError, match=r"train_900\.tif: not of this world"):
        make_world(TINY, tmp_path, num_workers=1)


def test_a_broken_description_is_refused(tmp_path: Path) -> None:
    (tmp_path / "world.json").write_text("{")
    with pytest.raises(WorldError, match=r"world\.json: not a world's description"):
        make_world(TINY, tmp_path, num_workers=1)


def test_unknown_config_keys_are_errors() -> None:
    with pytest.raises(ValidationError, match="sede"):
        WorldConfig.model_validate({"sede": 3})


def test_progress_counts_every_piece_of_work(tmp_path: Path) -> None:
    config = TINY.model_copy(update={"num_web_pairs": 2, "num_train_pairs": 0, "num_train_scenes": 1})
    calls: list[tuple[int, int, str]] = []
    make_world(config, tmp_path, progress=lambda *call: calls.append(call), num_workers=1)
    assert [done for done, _, _ in calls] == list(range(1, len(calls) + 1))
    assert {total for _, total, _ in calls} == {len(calls)}


def test_scenes_and_masks_share_grids_in_two_zones(tiny_world: Path) -> None:
    zones = set()
    for path in sorted((tiny_world / "scenes").iterdir()):
        with rasterio.open(path) as scene, rasterio.open(tiny_world / "masks" / path.name) as mask:
            assert (scene.count, scene.dtypes[0], scene.nodata) == (3, "uint8", 0)
            assert scene.block_shapes[0] == (256, 256) and scene.overviews(1) == [2, 4]
            assert (scene.transform, scene.crs, scene.shape) == (mask.transform, mask.crs, mask.shape)
            assert mask.read(1).max() < len(CLASS_NAMES)
            assert scene.tags()["TIFFTAG_DATETIME"].startswith("202")
            zones.add((scene.crs.to_epsg(), scene.res[0]))
    assert zones == {(32614, 2.0), (32735, 2.5)}


def test_one_place_is_seen_on_two_dates_from_shifted_grids(tiny_world: Path) -> None:
    with (
        rasterio.open(tiny_world / "scenes/train_000.tif") as first,
        rasterio.open(tiny_world / "scenes/train_001.tif") as second,
    ):
        assert first.crs == second.crs
        shift_px = (second.bounds.left - first.bounds.left) / first.res[0]
        assert 0 < shift_px < 20 and shift_px % 1 > 0.01
        assert first.tags()["TIFFTAG_DATETIME"] != second.tags()["TIFFTAG_DATETIME"]
        assert (first.read() != second.read()).mean() > 0.5


def test_landmarks_lie_where_the_masks_say(tiny_world: Path) -> None:
    landmarks = geopandas.read_file(tiny_world / "landmarks.geojson")
    assert landmarks["id"].is_unique
    assert set(landmarks["kind"]) <= set(CLASS_NAMES[1:])
    for path in sorted((tiny_world / "masks").glob("*.tif")):
        with rasterio.open(path) as mask:
            near: Any = landmarks.to_crs(mask.crs).cx[slice(*mask.bounds[::2]), slice(*mask.bounds[1::2])]
            classes_HW = mask.read(1)
            polygons = near[near.geom_type.isin(["Polygon", "MultiPolygon"])]
            for kind in set(polygons["kind"]):
                shapes = polygons[polygons["kind"] == kind].geometry
                inside = rasterio.features.geometry_mask(shapes, classes_HW.shape, mask.transform, invert=True)
                drawn = classes_HW == CLASS_NAMES.index(kind)
                # Roads may be drawn over a field's or a wood's margin; nothing is drawn where no landmark is.
                assert (drawn & ~inside).sum() <= 0.02 * drawn.sum() + 20, kind
                assert (drawn & inside).sum() >= 0.8 * inside.sum() - 20, kind
    assert json.loads((tiny_world / "masks/classes.json").read_text())["8"] == "forest"


def test_roads_are_lines_with_a_width(tiny_world: Path) -> None:
    landmarks = geopandas.read_file(tiny_world / "landmarks.geojson")
    roads: Any = landmarks[landmarks["kind"] == "road"]
    assert len(roads) and set(roads.geom_type) == {"LineString"}
    assert roads["width_m"].between(6, 14).all()
    assert np.isnan(landmarks[landmarks["kind"] != "road"]["width_m"]).all()
