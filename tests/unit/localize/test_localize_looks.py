"""What a recipe of localize averages, and the grid that it names: both reach the files."""

import io
import re
from pathlib import Path

import numpy as np
import pytest
import rasterio
import tiny_service
from rasterio.transform import Affine
from rich.console import Console

from rsplatform.artifacts import Artifact
from rsplatform.cluster import Cluster
from rsplatform.config import ConfigError, validate
from rsplatform.curate.pipeline import run_plain
from rsplatform.ledger import read_drops
from rsplatform.localize import score_scenes
from rsplatform.localize.run import LocalizeConfig, localize_with
from rsplatform.stage import open_stage

PLACE = Affine(2.0, 0.0, 500_000.0, 0.0, -2.0, 5_500_000.0)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Cluster:
    """A root with a random model, and one scene of coarse blocks with a corner of no data."""
    root = tmp_path_factory.mktemp("root")
    tiny_service.make_artifacts(str(root))
    blocks_HWC = np.random.default_rng(0).integers(1, 255, (14, 11, 3), dtype=np.uint8)
    image_HWC = np.repeat(np.repeat(blocks_HWC, 13, axis=0), 13, axis=1)
    image_HWC[:40, :40] = 0
    write_scene(root / "one" / "a.tif", image_HWC, PLACE)
    return Cluster(root=str(root), data_root=str(root))


def write_scene(path: Path, image_HWC: np.ndarray, transform: Affine, crs: str | None = "EPSG:32632") -> None:
    path.parent.mkdir(exist_ok=True)
    height, width, count = image_HWC.shape
    profile = {"driver": "GTiff", "height": height, "width": width, "count": count, "nodata": 0}
    profile["dtype"] = image_HWC.dtype
    with rasterio.open(path, "w", crs=crs, transform=transform, **profile) as raster:
        raster.write(np.moveaxis(image_HWC, 2, 0))


def recipe(name: str, **changes: object) -> LocalizeConfig:
    values: dict[str, object] = {"output": f"localization/{name}/v1", "model": tiny_service.MODEL}
    values |= {"classes": [{"name": "stadium", "prompts": ["a stadium"]}], "background_prompts": ["a field"]}
    values |= {"scenes": {"path": "one"}, "ground_sample_distance_m": 2.0, "min_area_m2": 0.0}
    return validate(LocalizeConfig, values | changes, "recipe.yaml")


def localized(cluster: Cluster, name: str, **changes: object) -> Artifact:
    config = recipe(name, **changes)
    with open_stage(config, cluster) as stage:
        localize_with(config, cluster, stage, run_plain)
    return stage.artifact


def scores(artifact: Artifact) -> np.ndarray:
    with rasterio.open(artifact.path("a_scores.tif")) as raster:
        return raster.read()


def test_a_look_given_twice_changes_nothing(cluster: Cluster) -> None:
    once, twice = (scores(localized(cluster, f"times{len(scales)}", scales=scales)) for scales in ([], [{}]))
    np.testing.assert_allclose(once, twice, atol=1e-6)


@pytest.mark.parametrize(
    "looks",
    [{"scales": [{"relative_resolution": 0.5}, {"relative_resolution": 2.0, "window": 1}]}, {"phases": 2}],
    ids=["scales", "phases"],
)
def test_strips_leave_no_trace_in_what_is_averaged(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, looks: dict[str, object]
) -> None:
    found = []
    for name, patches in (("whole", 2**17), ("strips", 60)):
        monkeypatch.setattr(score_scenes, "STRIP_PATCHES", patches)
        found.append(scores(localized(cluster, f"{name}_{next(iter(looks))}", **looks)))
    np.testing.assert_allclose(*found, atol=1e-5)
    alone = scores(localized(cluster, f"alone_{next(iter(looks))}"))
    np.testing.assert_array_equal(np.isnan(alone), np.isnan(found[0]))
    assert np.nanmax(np.abs(alone - found[0])) > 1e-3


def test_phases_make_maps_depend_less_on_where_patches_begin(cluster: Cluster) -> None:
    """The same picture, three pixels further on the ground: the grid of patches cuts it elsewhere."""
    with rasterio.open(Path(cluster.root) / "one" / "a.tif") as raster:
        image_HWC = np.moveaxis(raster.read(), 0, 2)
    write_scene(Path(cluster.root) / "moved" / "a.tif", image_HWC, PLACE @ Affine.translation(3, 3))
    differences = []
    for phases in (1, 4):
        here = scores(localized(cluster, f"here{phases}", phases=phases))
        there = scores(localized(cluster, f"there{phases}", phases=phases, scenes={"path": "moved"}))
        differences.append(np.nanmean(np.abs(here - there)))
    assert 0 < differences[1] < 0.7 * differences[0]


def test_maps_lie_in_the_crs_of_the_recipe_else_in_the_zone_of_the_scene(cluster: Cluster) -> None:
    for name, changes, expected in (("zone", {}, 32632), ("named", {"maps_crs": "EPSG:3857"}, 3857)):
        artifact = localized(cluster, name, **changes)
        for ending in ("_scores.tif", "_mask.tif"):
            with rasterio.open(artifact.path(f"a{ending}")) as raster:
                assert raster.crs.to_epsg() == expected
                column, row = ~raster.transform @ (0.0, 0.0)
                assert (column, row) == pytest.approx((round(column), round(row)), abs=1e-4)
    with pytest.raises(ConfigError, match=r"maps_crs: .*'EPSG:1' is no CRS of a place on Earth; write one such as"):
        recipe("refused", maps_crs="EPSG:1")


def test_a_scene_too_large_for_one_grid_is_a_drop_with_a_remedy(cluster: Cluster) -> None:
    with rasterio.open(Path(cluster.root) / "one" / "a.tif") as raster:
        image_HWC = np.moveaxis(raster.read(), 0, 2)
    folder = Path(cluster.root) / "large"
    write_scene(folder / "a.tif", image_HWC, PLACE)
    write_scene(folder / "world.tif", image_HWC[:90], Affine(2.5, 0.0, -180.0, 0.0, -2.0, 90.0), "EPSG:4326")
    artifact = localized(cluster, "large", scenes={"path": "large"})
    (drop,) = read_drops(artifact).to_pylist()
    assert (drop["id"], drop["reason"]) == ("large/world.tif", "unusable_crs")
    assert "name a `maps_crs` that fits it" in drop["detail"]


@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
def test_a_scene_without_scale_is_a_drop_where_other_scales_are_asked_for(cluster: Cluster) -> None:
    image_HWC = np.random.default_rng(4).integers(1, 255, (60, 70, 3), dtype=np.uint8)
    write_scene(Path(cluster.root) / "nowhere" / "a.tif", image_HWC, PLACE)
    write_scene(Path(cluster.root) / "nowhere" / "b.tif", image_HWC, Affine.identity(), crs=None)
    source = {"path": "nowhere"}
    half = localized(cluster, "nowhere_half", scenes=source, scales=[{"relative_resolution": 0.5}])
    (drop,) = read_drops(half).to_pylist()
    assert (drop["id"], drop["reason"]) == ("nowhere/b.tif", "no_crs")
    assert "`scales` asks for relative_resolution 0.5; set a CRS with gdal_edit.py" in drop["detail"]
    windows = localized(cluster, "nowhere_windows", scenes=source, scales=[{"window": 5}])
    assert not read_drops(windows).to_pylist(), "windows need no scale"


def test_whoever_watches_sees_how_far_each_step_is(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score_scenes, "STRIP_PATCHES", 60)  # several strips
    seen = io.StringIO()
    monkeypatch.setattr("rich._console", Console(file=seen, force_terminal=True, width=120))
    localized(cluster, "watched")
    for step in ("describe scenes", "localize_strips", "localize"):
        assert re.search(rf"{step}\W.*100%", seen.getvalue()), step


def test_what_is_averaged_does_not_depend_on_where_the_raster_was_cut(cluster: Cluster) -> None:
    """Away from the cut by one tile of the coarsest look, which is 128 px."""
    image_HWC = np.random.default_rng(2).integers(1, 255, (330, 80, 3), dtype=np.uint8)
    write_scene(Path(cluster.root) / "long" / "a.tif", image_HWC, PLACE)
    write_scene(Path(cluster.root) / "cut" / "a.tif", image_HWC[21:], PLACE @ Affine.translation(0, 21))
    looks = {"scales": [{"relative_resolution": 0.5}], "phases": 2}
    whole, part = (scores(localized(cluster, name, scenes={"path": name}, **looks)) for name in ("long", "cut"))
    np.testing.assert_allclose(part[:, 144:], whole[:, 21 + 144 :], atol=1e-3)
    assert np.abs(part[:, :8] - whole[:, 21 : 21 + 8]).max() > 1e-3


def test_with_a_value_range_a_part_of_a_16_bit_scene_has_the_map_of_the_whole(cluster: Cluster) -> None:
    """Away from the cut by one tile, which is 64 px; the north of the whole is brighter than the part's land."""
    generator = np.random.default_rng(6)
    image_HWC = generator.integers(1, 3000, (200, 80, 3), dtype=np.uint16)
    image_HWC[:60] += 5000
    write_scene(Path(cluster.root) / "deep" / "a.tif", image_HWC, PLACE)
    write_scene(Path(cluster.root) / "deep_part" / "a.tif", image_HWC[61:], PLACE @ Affine.translation(0, 61))
    differences = []
    for name, changes in (("measured", {}), ("ranged", {"value_range": [0, 8000]})):
        whole, part = (
            scores(localized(cluster, f"{path}_{name}", scenes={"path": path} | changes))
            for path in ("deep", "deep_part")
        )
        differences.append(np.abs(part[:, 72:] - whole[:, 61 + 72 :]).max())
    assert differences[1] <= 1e-3 < differences[0]
