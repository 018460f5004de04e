"""Files say what was computed: polygons rasterise back to the mask, areas are true, failures leave nothing."""

import json
from dataclasses import replace
from pathlib import Path

import geopandas
import numpy as np
import pyogrio
import pytest
import rasterio
import shapely
import torch
from rasterio.features import rasterize
from rasterio.warp import transform_geom

from rsplatform.geo import Grid
from rsplatform.localize.decide import NO_DATA, label_pixels
from rsplatform.localize.legend import Legend
from rsplatform.localize.products import ENDINGS, ProductRecipe, write_products
from rsplatform.localize.rasters import score_cog
from rsplatform.localize.scene import SceneReader, Strip
from rsplatform.localize.vectorize import Limits, write_vector_file

LEGEND = Legend(
    ("open land", "a stadium", "a sports ground", "Wasser – tief"),
    (0, 1, 1, 2),
    ("stadium", "Wasser"),
    "model/a/v1",
    "abc123",
)
UTM = Grid("EPSG:32633", (2.0, 0.0, 500_000.0, 0.0, -2.0, 5_300_000.0), 90, 70)
NOWHERE = Grid("", (1.0, 0.0, 0.0, 0.0, 1.0, 0.0), 90, 70)


def blocks(grid: Grid, seed: int = 0) -> np.ndarray:
    """Scores with regions of several pixels, some missing."""
    generator = np.random.default_rng(seed)
    coarse = generator.random((4, grid.height // 5, grid.width // 5), dtype=np.float32)
    scores = np.kron(coarse, np.ones((1, 5, 5), dtype=np.float32))
    scores[:, :10, :10] = np.nan
    return scores


def write_all(
    folder: Path, grid: Grid, scores: np.ndarray, limits: Limits | None = None, legend: Legend = LEGEND
) -> dict[str, Path]:
    """Patches of one pixel, so that the maps are the scores themselves."""
    strips = [Strip(row, torch.from_numpy(scores[:, row : row + 23])) for row in range(0, scores.shape[1], 23)]
    valid_HW = ~np.isnan(scores[0])

    def read_valid(row: int, column: int, height: int, width: int) -> np.ndarray:
        return valid_HW[row : row + height, column : column + width]

    def nothing(*window: int) -> np.ndarray:
        raise AssertionError("no pixel is needed")

    reader = SceneReader(grid.height, grid.width, nothing, read_valid)
    recipe = ProductRecipe(legend, 2.0, 1, limits or Limits(), None)
    objects = write_products(folder / "a", strips, reader, grid, recipe)
    paths = {ending: folder / f"a{ending}" for ending in ENDINGS}
    assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in paths.values())
    assert len(features(paths[".geojson"])) == len(objects)
    return paths


def features(path: Path) -> list[dict]:
    return json.loads(path.read_text(encoding="utf-8"))["features"]


def test_rasters_are_cogs_that_carry_their_origin(tmp_path: Path) -> None:
    scores = blocks(UTM)
    paths = write_all(tmp_path, UTM, scores)
    with rasterio.open(paths["_scores.tif"]) as raster:
        assert raster.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"
        np.testing.assert_array_equal(raster.read(), scores)
        assert raster.descriptions == LEGEND.prompts
        assert (raster.tags()["model_hash"], raster.tags()["model"]) == ("abc123", "model/a/v1")
        assert (raster.crs.to_epsg(), raster.transform) == (32633, UTM.affine)
    with rasterio.open(paths["_mask.tif"]) as raster:
        assert raster.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"
        assert raster.nodata == NO_DATA and json.loads(raster.tags()["class_names"]) == list(LEGEND.class_names)
        labels = raster.read(1)
    np.testing.assert_array_equal(labels, label_pixels(scores, LEGEND.class_of_prompt))
    assert (labels[:10, :10] == NO_DATA).all() and (labels == NO_DATA).sum() == 100


def test_polygons_rasterise_back_to_the_mask(tmp_path: Path) -> None:
    scores = blocks(UTM, seed=1)
    paths = write_all(tmp_path, UTM, scores)
    labels, found = label_pixels(scores, LEGEND.class_of_prompt), features(paths[".geojson"])
    back = rasterize(
        (
            (transform_geom("EPSG:4326", UTM.crs, feature["geometry"]), feature["properties"]["class_id"])
            for feature in found
        ),
        labels.shape,
        transform=UTM.affine,
        dtype="uint8",
    )
    np.testing.assert_array_equal(back, np.where(labels == NO_DATA, 0, labels))
    best = scores[1:3].max(axis=0)
    for feature in found:
        properties = feature["properties"]
        assert (properties["model"], properties["model_hash"]) == ("model/a/v1", "abc123")
        assert properties["class"] == LEGEND.class_names[properties["class_id"] - 1]
        assert properties["prompt"] in LEGEND.prompts[1 : 3 if properties["class_id"] == 1 else 4]
    stadiums = [f["properties"] for f in found if f["properties"]["class_id"] == 1]
    total = sum(stadium["area_m2"] for stadium in stadiums)
    mean = sum(stadium["score"] * stadium["area_m2"] for stadium in stadiums) / total
    assert mean == pytest.approx(best[labels == 1].mean(), abs=1e-3)


@pytest.mark.parametrize("ending", [".gpkg", ".fgb"])
def test_vector_files_hold_the_polygons_of_the_geojson(tmp_path: Path, ending: str) -> None:
    paths = write_all(tmp_path, UTM, blocks(UTM, seed=2))
    layer = "regions" if ending == ".gpkg" else None
    frame = geopandas.read_file(paths[ending], layer=layer)
    assert frame.crs == "EPSG:4326"
    expected = {json.dumps(item["properties"], sort_keys=True): item for item in features(paths[".geojson"])}
    assert len(frame) == len(features(paths[".geojson"]))
    columns = [name for name in frame.columns if name != "geometry"]
    for row in frame.to_dict("records"):
        twin = expected[json.dumps({name: row[name] for name in columns}, sort_keys=True)]
        assert set(columns) == {"class_id", "class", "prompt", "score", "area_m2", "model", "model_hash"}
        assert row["geometry"].equals(shapely.geometry.shape(twin["geometry"]))


def test_boxes_and_points_belong_to_their_regions(tmp_path: Path) -> None:
    """In the scene's own rows and columns: a box reaches exactly as far as its region, and the point lies in it."""
    paths = write_all(tmp_path, UTM, blocks(UTM, seed=3))
    layers = {name: geopandas.read_file(paths[".gpkg"], layer=name).to_crs(UTM.crs) for name in ("boxes", "points")}
    regions = geopandas.read_file(paths[".gpkg"], layer="regions").to_crs(UTM.crs)
    assert pyogrio.list_layers(paths[".gpkg"])[:, 0].tolist() == ["regions", "boxes", "points"]
    assert regions.geometry.contains(layers["points"].geometry).all()
    np.testing.assert_allclose(layers["boxes"].bounds, regions.bounds, atol=1e-3)
    for feature, bounds in zip(features(paths["_objects.geojson"]), regions.bounds.to_numpy(), strict=True):
        place = feature["properties"]
        left, top = UTM.affine @ (place["column_px"], place["row_px"])
        right = left + 2.0 * place["width_px"]
        np.testing.assert_allclose((left, top, right), (bounds[0], bounds[3], bounds[2]), atol=1e-3)
        assert shapely.geometry.shape(feature["geometry"]).contains(
            shapely.Point(place["point_lon"], place["point_lat"])
        )
        assert place["score"] <= 1 and place["class"] in LEGEND.class_names


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
def test_areas_are_true_on_the_ground(tmp_path: Path, grid: Grid, pixel_area_m2: float) -> None:
    paths = write_all(tmp_path, grid, frame_of_water(grid))
    (feature,) = features(paths[".geojson"])
    assert feature["properties"]["area_m2"] == pytest.approx(1400 * pixel_area_m2, rel=1e-4)
    assert feature["properties"]["prompt"] == "Wasser – tief"
    assert len(feature["geometry"]["coordinates"]) == 2


def frame_of_water(grid: Grid) -> np.ndarray:
    """A rectangle of 30 x 50 pixels with a hole of 10 x 10."""
    scores = np.zeros((4, grid.height, grid.width), dtype=np.float32)
    scores[3, 20:50, 10:60] = 1.0
    scores[3, 30:40, 20:30] = -1.0
    return scores


def test_small_regions_are_left_out(tmp_path: Path) -> None:
    scores = np.zeros((4, UTM.height, UTM.width), dtype=np.float32)
    scores[1, 5:7, 5:7] = 1.0
    scores[1, 20:30, 20:30] = 1.0
    paths = write_all(tmp_path, UTM, scores, Limits(min_area_m2=50.0))
    (feature,) = features(paths[".geojson"])
    assert feature["properties"]["area_m2"] == pytest.approx(400, rel=2e-3)
    assert len(geopandas.read_file(paths[".fgb"])) == len(geopandas.read_file(paths[".gpkg"], layer="points")) == 1


@pytest.mark.parametrize(("max_hole_m2", "num_pixels"), [(399.0, 1400), (401.0, 1500)])
def test_holes_are_filled_up_to_their_limit(tmp_path: Path, max_hole_m2: float, num_pixels: int) -> None:
    paths = write_all(tmp_path, UTM, frame_of_water(UTM), Limits(max_hole_m2=max_hole_m2))
    (feature,) = features(paths[".geojson"])
    assert feature["properties"]["area_m2"] == pytest.approx(num_pixels * 4.0, rel=1e-3)
    assert len(feature["geometry"]["coordinates"]) == (2 if num_pixels == 1400 else 1)


def test_a_hole_that_holds_another_object_stays(tmp_path: Path) -> None:
    """Unless that object is too small to be one: products never overlap."""
    scores = frame_of_water(UTM)
    scores[1, 33:36, 23:26] = 2.0
    found = [feature["properties"]["class"] for feature in features(write_all(tmp_path, UTM, scores)[".geojson"])]
    assert sorted(found) == ["Wasser", "stadium"]
    for limits, rings in ((Limits(max_hole_m2=1e4), 2), (Limits(min_area_m2=100.0, max_hole_m2=1e4), 1)):
        found = features(write_all(tmp_path, UTM, scores, limits)[".geojson"])
        water = next(feature for feature in found if feature["properties"]["class"] == "Wasser")
        assert len(water["geometry"]["coordinates"]) == rings


@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
def test_without_a_crs_coordinates_are_pixels_and_the_files_say_so(tmp_path: Path) -> None:
    scores = np.zeros((4, 70, 90), dtype=np.float32)
    scores[1, 20:30, 40:60] = 1.0
    scores[1, 2:4, 2:4] = 1.0
    # a pixel is taken for 2 m: 16 m² are too small
    paths = write_all(tmp_path, NOWHERE, scores, Limits(min_area_m2=20.0, pixel_size_m=2.0))
    assert "no CRS" in json.loads(paths[".geojson"].read_text())["coordinates"]
    (feature,) = features(paths[".geojson"])
    assert feature["properties"]["area_px"] == 200 and "area_m2" not in feature["properties"]
    columns, rows = zip(*feature["geometry"]["coordinates"][0], strict=True)
    assert (min(columns), max(columns), min(rows), max(rows)) == (40, 60, 20, 30)
    (box,) = features(paths["_objects.geojson"])
    assert (box["properties"]["point_column_px"], box["properties"]["point_row_px"]) == (50, 25)
    for ending in (".gpkg", ".fgb"):
        layer = "regions" if ending == ".gpkg" else None
        info = pyogrio.read_info(paths[ending], layer=layer)
        assert info["crs"] is None and "no CRS" in info["layer_metadata"]["DESCRIPTION"]
        assert geopandas.read_file(paths[ending], layer=layer).total_bounds.tolist() == [40, 20, 60, 30]
    with rasterio.open(paths["_mask.tif"]) as raster:
        assert raster.crs is None


def test_the_same_regions_give_the_same_bytes(tmp_path: Path) -> None:
    paths = write_all(tmp_path, UTM, blocks(UTM))
    before = {ending: path.read_bytes() for ending, path in paths.items()}
    write_all(tmp_path, UTM, blocks(UTM))
    assert [ending for ending, path in paths.items() if path.read_bytes() != before[ending]] == []


def test_nothing_found_is_written_too(tmp_path: Path) -> None:
    paths = write_all(tmp_path, UTM, np.zeros((4, UTM.height, UTM.width), dtype=np.float32))
    assert features(paths[".geojson"]) == features(paths["_objects.geojson"]) == []
    assert len(geopandas.read_file(paths[".fgb"])) == len(geopandas.read_file(paths[".gpkg"], layer="boxes")) == 0
    with pytest.raises(ValueError, match=r"a\.shp: vector files end in \.gpkg or \.fgb"):
        write_vector_file(tmp_path / "a.shp", [], LEGEND, UTM)


def test_a_failure_leaves_nothing_and_keeps_what_was_there(tmp_path: Path) -> None:
    scores, path = blocks(UTM), tmp_path / "scores.tif"

    def write(*rows: tuple[int, int]) -> None:
        with score_cog(path, UTM, LEGEND) as write_rows:
            for first, end in rows:
                write_rows(first, scores[:, first:end])
            if not rows:
                raise OSError("the encoder's machine went away")

    with pytest.raises(OSError, match="went away"):
        write()
    assert not list(tmp_path.iterdir())
    write((0, 23), (23, 70))
    before = path.read_bytes()
    with pytest.raises(ValueError, match="fill 23 of 70 rows"):
        write((0, 23))
    with pytest.raises(ValueError, match="rows from 23"):
        write((23, 46))
    assert path.read_bytes() == before and [entry.name for entry in tmp_path.iterdir()] == ["scores.tif"]


def test_a_region_whose_best_pixel_does_not_pass_is_background(tmp_path: Path) -> None:
    """In the mask and in every vector file; one that passes keeps its whole outline, holes of others included."""
    scores = np.zeros((4, 70, 90), dtype=np.float32)
    scores[0] = 0.1
    scores[1, 5:25, 5:25] = 0.15
    scores[2, 30:60, 5:25], scores[2, 44, 11] = 0.15, 0.4  # the same class by another prompt, better in one pixel
    scores[3, 30:60, 40:80] = 0.15
    scores[1, 40:50, 50:60] = 0.3  # inside a region that goes
    legend = replace(LEGEND, thresholds=(0.1, 0.1))
    paths = write_all(tmp_path, UTM, scores, legend=legend)
    with rasterio.open(paths["_mask.tif"]) as raster:
        labels = raster.read(1)
        assert json.loads(raster.tags()["thresholds"]) == [0.1, 0.1]
    expected = np.zeros((70, 90), dtype=np.uint8)
    expected[30:60, 5:25] = expected[40:50, 50:60] = 1
    np.testing.assert_array_equal(labels, expected)
    areas = [feature["properties"]["area_m2"] for feature in features(paths[".geojson"])]
    assert areas == pytest.approx([600 * 4, 100 * 4], rel=1e-3)
