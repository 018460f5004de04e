"""Files say what was computed: polygons rasterise back to the mask, areas are true, failures leave nothing."""

import json

import numpy as np
import pytest
import rasterio
import torch
from rasterio.features import rasterize
from rasterio.warp import transform_geom

from rsplatform.geo import Grid
from rsplatform.localize.decide import NO_DATA, label_pixels
from rsplatform.localize.scene import Strip
from rsplatform.localize.vectorize import Legend, write_mask, write_polygons, write_scores

LEGEND = Legend(("open land", "a stadium", "a sports ground", "Wasser – tief"), (0, 1, 1, 2), "abc123")
UTM = Grid("EPSG:32633", (2.0, 0.0, 500_000.0, 0.0, -2.0, 5_300_000.0), 90, 70)


def blocks(grid, seed=0):
    """Scores with regions of several pixels, some missing."""
    generator = np.random.default_rng(seed)
    coarse = generator.random((4, grid.height // 5, grid.width // 5), dtype=np.float32)
    scores = np.kron(coarse, np.ones((1, 5, 5), dtype=np.float32))
    scores[:, :10, :10] = np.nan
    return scores


def strips(scores, rows=23):
    for row in range(0, scores.shape[1], rows):
        yield Strip(row, torch.from_numpy(scores[:, row : row + rows]))


def write_all(folder, grid, scores, min_area_m2=0.0):
    paths = folder / "scores.tif", folder / "mask.tif", folder / "polygons.geojson"
    write_scores(paths[0], grid, strips(scores), LEGEND)
    write_mask(paths[1], paths[0], grid, LEGEND)
    count = write_polygons(paths[2], paths[1], paths[0], LEGEND, min_area_m2)
    collection = json.loads(paths[2].read_text(encoding="utf-8"))
    assert count == len(collection["features"])
    assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in paths)
    return (*paths, collection)


def test_rasters_are_cogs_that_carry_their_origin(tmp_path):
    scores = blocks(UTM)
    score_path, mask_path, _, _ = write_all(tmp_path, UTM, scores)
    with rasterio.open(score_path) as raster:
        assert raster.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"
        np.testing.assert_array_equal(raster.read(), scores)
        assert raster.descriptions == LEGEND.prompts
        assert raster.tags()["model_hash"] == "abc123"
        assert (raster.crs.to_epsg(), raster.transform) == (32633, UTM.affine)
    with rasterio.open(mask_path) as raster:
        assert raster.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"
        assert raster.nodata == NO_DATA and json.loads(raster.tags()["prompts"]) == list(LEGEND.prompts)
        labels = raster.read(1)
    np.testing.assert_array_equal(labels, label_pixels(scores, LEGEND.class_of_prompt))
    assert (labels[:10, :10] == NO_DATA).all() and (labels == NO_DATA).sum() == 100


def test_polygons_rasterise_back_to_the_mask(tmp_path):
    scores = blocks(UTM, seed=1)
    _, mask_path, _, collection = write_all(tmp_path, UTM, scores)
    with rasterio.open(mask_path) as raster:
        labels = raster.read(1)
    back = rasterize(
        (
            (transform_geom("EPSG:4326", UTM.crs, feature["geometry"]), feature["properties"]["class_id"])
            for feature in collection["features"]
        ),
        labels.shape,
        transform=UTM.affine,
        dtype="uint8",
    )
    np.testing.assert_array_equal(back, np.where(labels == NO_DATA, 0, labels))
    best = scores[1:3].max(axis=0)
    for feature in collection["features"]:
        properties = feature["properties"]
        assert properties["model_hash"] == "abc123"
        assert properties["prompt"] in LEGEND.prompts[1 : 3 if properties["class_id"] == 1 else 4]
    stadiums = [f["properties"] for f in collection["features"] if f["properties"]["class_id"] == 1]
    total = sum(stadium["area_m2"] for stadium in stadiums)
    mean = sum(stadium["score"] * stadium["area_m2"] for stadium in stadiums) / total
    assert mean == pytest.approx(best[labels == 1].mean(), abs=1e-3)


# Web Mercator on WGS 84 at 60°N: cos² times the two radii of curvature over the equatorial radius squared.
ECCENTRICITY_SQUARED = 0.00669437999
MERCATOR_60N = 0.25 * (1 - ECCENTRICITY_SQUARED) / (1 - 0.75 * ECCENTRICITY_SQUARED) ** 2


@pytest.mark.parametrize(
    ("grid", "pixel_area_m2"),
    [
        # On its central meridian UTM shrinks lengths to 0.9996.
        (UTM, 4.0 / 0.9996**2),
        (Grid("EPSG:3857", (2.0, 0.0, 0.0, 0.0, -2.0, 8_399_737.9), 90, 70), 4.0 * MERCATOR_60N),
    ],
)
def test_areas_are_true_on_the_ground(tmp_path, grid, pixel_area_m2):
    scores = np.zeros((4, grid.height, grid.width), dtype=np.float32)
    scores[3, 20:50, 10:60] = 1.0
    scores[3, 30:40, 20:30] = -1.0
    *_, collection = write_all(tmp_path, grid, scores)
    (feature,) = collection["features"]
    assert feature["properties"]["area_m2"] == pytest.approx(1400 * pixel_area_m2, rel=1e-4)
    assert feature["properties"]["prompt"] == "Wasser – tief"
    assert len(feature["geometry"]["coordinates"]) == 2


def test_small_regions_are_left_out(tmp_path):
    scores = np.zeros((4, UTM.height, UTM.width), dtype=np.float32)
    scores[1, 5:7, 5:7] = 1.0
    scores[1, 20:30, 20:30] = 1.0
    *_, collection = write_all(tmp_path, UTM, scores, min_area_m2=50.0)
    (feature,) = collection["features"]
    assert feature["properties"]["area_m2"] == pytest.approx(400, rel=2e-3)


@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
def test_without_a_crs_coordinates_are_pixels_and_the_file_says_so(tmp_path):
    grid = Grid("", (1.0, 0.0, 0.0, 0.0, 1.0, 0.0), 90, 70)
    scores = np.zeros((4, 70, 90), dtype=np.float32)
    scores[1, 20:30, 40:60] = 1.0
    score_path, mask_path, polygon_path, collection = write_all(tmp_path, grid, scores)
    assert "no CRS" in collection["coordinates"]
    (feature,) = collection["features"]
    assert feature["properties"]["area_px"] == 200 and "area_m2" not in feature["properties"]
    columns, rows = zip(*feature["geometry"]["coordinates"][0], strict=True)
    assert (min(columns), max(columns), min(rows), max(rows)) == (40, 60, 20, 30)
    with pytest.raises(ValueError, match="has no CRS"):
        write_polygons(polygon_path, mask_path, score_path, LEGEND, min_area_m2=1.0)


def test_a_failure_leaves_nothing_and_keeps_what_was_there(tmp_path):
    scores = blocks(UTM)
    path = tmp_path / "scores.tif"

    def breaking():
        yield next(strips(scores))
        raise OSError("the encoder's machine went away")

    with pytest.raises(OSError, match="went away"):
        write_scores(path, UTM, breaking(), LEGEND)
    assert not list(tmp_path.iterdir())
    write_scores(path, UTM, strips(scores), LEGEND)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="fill 23 of 70 rows"):
        write_scores(path, UTM, list(strips(scores))[:1], LEGEND)
    with pytest.raises(ValueError, match="strip at row 23"):
        write_scores(path, UTM, list(strips(scores))[1:], LEGEND)
    assert path.read_bytes() == before and [entry.name for entry in tmp_path.iterdir()] == ["scores.tif"]
