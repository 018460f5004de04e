"""The localize job on a small random model: files, ledger and resume."""

import json
from pathlib import Path

import numpy as np
import pytest
import rasterio
import tiny_service

from rsplatform import storage
from rsplatform.cluster import Cluster
from rsplatform.config import ConfigError
from rsplatform.geo import Grid
from rsplatform.ledger import read_drops
from rsplatform.localize.run import LocalizeConfig, Sought, localize, resampled
from rsplatform.sources.scenes import SceneSource, describe_scene

CLASSES = [Sought(name="stadium", prompts=["a stadium"]), Sought(name="harbour", prompts=["harbour and water"])]
BACKGROUND = ["an aerial image of a field"]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Cluster:
    """A root with a random model, and a folder of one good scene, one truncated and one without CRS."""
    root = tmp_path_factory.mktemp("root")
    tiny_service.make_artifacts(str(root))
    scenes = root / "scenes"
    whole = (scenes / f"{tiny_service.SCENE}.tif").read_bytes()
    (scenes / "broken.tif").write_bytes(whole[: len(whole) // 3])
    profile = {"driver": "GTiff", "width": 64, "height": 64, "count": 3, "dtype": "uint8"}
    with rasterio.open(scenes / "lost.tif", "w", **profile) as raster:
        raster.write(np.zeros((3, 64, 64), np.uint8))
    return Cluster(root=str(root), data_root=str(root))


def config(**changes: object) -> LocalizeConfig:
    values = {
        "output": "localization/a/v1",
        "model": tiny_service.MODEL,
        "scenes": SceneSource(path="scenes"),
        "classes": CLASSES,
        "background_prompts": BACKGROUND,
        "ground_sample_distance_m": 4.0,
        "min_area_m2": 0.0,
    }
    return LocalizeConfig.model_validate(values | changes)


def test_maps_are_georeferenced_and_bad_scenes_have_a_reason(cluster: Cluster) -> None:
    artifact = localize(config(), cluster)
    manifest = artifact.manifest()
    assert manifest["counts"]["inputs"] == 3
    assert manifest["counts"]["kept"] == 1
    reasons = {Path(row["id"]).name: row["reason"] for row in read_drops(artifact).to_pylist()}
    assert reasons["lost.tif"] == "no_crs"
    assert reasons["broken.tif"] == "unreadable"
    with (
        rasterio.open(artifact.path(f"{tiny_service.SCENE}_scores.tif")) as scores,
        rasterio.open(artifact.path(f"{tiny_service.SCENE}_mask.tif")) as mask,
        rasterio.open(Path(cluster.root) / "scenes" / f"{tiny_service.SCENE}.tif") as scene,
    ):
        assert scores.count == len(CLASSES) + len(BACKGROUND)
        assert mask.res == (4.0, 4.0)
        np.testing.assert_allclose(mask.bounds, scene.bounds, atol=1e-6)
        assert set(np.unique(mask.read(1))) <= {0, 1, 2}
    polygons = json.loads(storage.read_bytes(artifact.path(f"{tiny_service.SCENE}.geojson")))["features"]
    assert len(polygons) == manifest["metrics"]["regions"]
    assert all(feature["properties"]["area_m2"] > 0 for feature in polygons)


def test_no_usable_scene_is_an_error(cluster: Cluster) -> None:
    with pytest.raises(ValueError, match="no usable scene among 1: no_crs"):
        localize(config(output="localization/b/v1", scenes=SceneSource(path="scenes", pattern="lost.tif")), cluster)
    with pytest.raises(ConfigError, match=r"\*\.jp2"):
        localize(config(output="localization/c/v1", scenes=SceneSource(path="scenes", pattern="*.jp2")), cluster)


@pytest.mark.parametrize("ground_sample_distance_m", [1.5, 2.0, 4.7])
def test_windows_of_a_resampled_scene_meet_without_seams(cluster: Cluster, ground_sample_distance_m: float) -> None:
    place = str(Path(cluster.root) / "scenes" / f"{tiny_service.SCENE}.tif")
    reader, grid = resampled(describe_scene(place, place, SceneSource(path=place)), ground_sample_distance_m)
    assert isinstance(grid, Grid)
    whole = reader.read_window(0, 0, reader.height_px, reader.width_px).astype(int)
    part = reader.read_window(11, 23, 40, 50).astype(int)
    assert np.abs(part - whole[11:51, 23:73]).max() <= 1  # rounding of the box's corner to float32
    assert grid.ground_sample_distance_m() == pytest.approx(ground_sample_distance_m, rel=0.02)
