"""Maps do not depend on where a raster was cut or on its CRS: patches and tiles lie on the ground's own grid."""

from pathlib import Path

import bright_embedder
import numpy as np
import pytest
import rasterio
import tiny_service
import torch
from rasterio.enums import ColorInterp
from rasterio.transform import Affine
from rasterio.warp import Resampling, calculate_default_transform, reproject

from rsplatform.geo import CrsError, Grid
from rsplatform.localize import ground_pixels
from rsplatform.localize.decide import NO_DATA, label_pixels
from rsplatform.localize.ground_grid import TargetGrid, positions, target_grid
from rsplatform.localize.ground_pixels import resampled
from rsplatform.localize.picture import encoder, tiling
from rsplatform.localize.scene import score_strips, upsample_strips
from rsplatform.model.embedder import Embedder
from rsplatform.sources.scenes import Layer, SceneSource, describe_scene, read_window

SIDE_PX = 256
UTM = Affine(2.0, 0.0, 500_003.0, 0.0, -2.0, 5_500_001.0)  # not on the lines of any grid used here
ON_LINES = Affine(2.0, 0.0, 500_004.0, 0.0, -2.0, 5_500_002.0)


def write_scene(path: Path, image_HWC: np.ndarray, transform: Affine = UTM, crs: str = "EPSG:32632") -> Path:
    profile = {"driver": "GTiff", "width": image_HWC.shape[1], "height": image_HWC.shape[0], "dtype": "uint8"}
    with rasterio.open(path, "w", crs=crs, transform=transform, count=image_HWC.shape[2], **profile) as raster:
        if image_HWC.shape[2] == 4:
            raster.colorinterp = [*raster.colorinterp[:3], ColorInterp.alpha]
        raster.write(np.moveaxis(image_HWC, 2, 0))
    return path


def blobs(height: int, width: int) -> np.ndarray:
    """Bright and dark land of some 30 px, grey, with a little noise."""
    generator = np.random.default_rng(3)
    coarse = torch.from_numpy(generator.random((1, 1, height // 24, width // 24)))
    smooth_HW = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic")[0, 0].numpy()
    grey_HW = np.where(smooth_HW > 0.5, 200, 60) + generator.normal(0, 10, (height, width))
    return np.repeat(grey_HW.clip(0, 255).astype(np.uint8)[..., None], 3, axis=2)


def pixel_maps(path: Path, embedder: Embedder, texts_CE: torch.Tensor, distance_m: float) -> tuple[Grid, np.ndarray]:
    scene = describe_scene(path.name, str(path), SceneSource(path=str(path)))
    reader, grid = resampled(scene, distance_m)
    strips = score_strips(reader, encoder(embedder, distance_m), texts_CE, tiling(embedder, 3))
    pixels = upsample_strips(strips, reader, embedder.patch_size)
    return grid, torch.cat([strip.maps_CHW for strip in pixels], dim=1).numpy()


@pytest.fixture(scope="module")
def looking_around(tmp_path_factory: pytest.TempPathFactory) -> Embedder:
    """A random model, whose patches see all of their tile: where tiles lie matters to it."""
    root = tmp_path_factory.mktemp("root")
    tiny_service.make_model(str(root))
    return Embedder.load(root / tiny_service.MODEL / "model")


@pytest.mark.parametrize("distance_m", [2.0, 2.7])
def test_crops_and_a_mosaic_of_four_agree_with_the_whole(
    tmp_path: Path, looking_around: Embedder, distance_m: float
) -> None:
    """Cut at any pixel, with and without resampling; away from the cut by one tile, which is 64 px."""
    image = np.random.default_rng(0).integers(0, 255, (SIDE_PX, SIDE_PX + 40, 3), dtype=np.uint8)
    texts_CE = torch.from_numpy(looking_around.embed_texts(["a stadium", "harbour and water"]))
    grid, whole = pixel_maps(write_scene(tmp_path / "whole.tif", image), looking_around, texts_CE, distance_m)
    half = SIDE_PX // 2
    parts = [(0, half + 30, 0, half + 41), (0, half + 30, half - 35, None), (half - 33, None, 0, half + 41)]
    parts += [(half - 33, None, half - 35, None), (37, 219, 51, 240)]
    compared = 0
    for number, (top, bottom, left, right) in enumerate(parts):
        crop = image[top:bottom, left:right]
        path = write_scene(tmp_path / f"{number}.tif", crop, UTM @ Affine.translation(left, top))
        part_grid, part = pixel_maps(path, looking_around, texts_CE, distance_m)
        column, row = ~grid.affine @ (part_grid.affine.c, part_grid.affine.f)
        assert (column, row) == pytest.approx((round(column), round(row)), abs=1e-6)
        there = whole[:, round(row) :, round(column) :][:, : part.shape[1], : part.shape[2]]
        assert there.shape[1:] == (part_grid.height, part_grid.width)
        # where the crop ends with the whole, it agrees to the border
        edges = [0 if top == 0 else 72, 0 if left == 0 else 72, 0 if bottom is None else 72, 0 if right is None else 72]
        rows, columns = slice(edges[0], part.shape[1] - edges[2]), slice(edges[1], part.shape[2] - edges[3])
        np.testing.assert_allclose(part[:, rows, columns], there[:, rows, columns], atol=1e-3)
        compared += part[0, rows, columns].size
    assert compared > 0.25 * whole[0].size


def test_without_resampling_crops_are_equal_to_the_bit(tmp_path: Path, looking_around: Embedder) -> None:
    image = np.random.default_rng(1).integers(0, 255, (SIDE_PX, SIDE_PX, 3), dtype=np.uint8)
    texts_CE = torch.from_numpy(looking_around.embed_texts(["a stadium"]))
    path = write_scene(tmp_path / "crop.tif", image[13:], ON_LINES @ Affine.translation(0, 13))
    scene = describe_scene("crop.tif", str(path), SceneSource(path=str(path)))
    reader, grid = resampled(scene, 2.0)
    np.testing.assert_array_equal(reader.read_window(0, 0, 30, 40), image[13:43, :40])
    assert grid.transform == pytest.approx(tuple(ON_LINES @ Affine.translation(0, 13))[:6])
    _, part = pixel_maps(path, looking_around, texts_CE, 2.0)
    _, whole = pixel_maps(write_scene(tmp_path / "whole.tif", image, ON_LINES), looking_around, texts_CE, 2.0)
    np.testing.assert_allclose(part[:, 72:], whole[:, 85:], atol=1e-6)


def reprojected(path: Path, image: np.ndarray, crs: str, kernel: Resampling) -> Path:
    """A copy of a scene at UTM in another CRS, as gdalwarp makes it: its own pixel size, alpha where it has none."""
    height, width = image.shape[:2]
    bounds = (UTM.c, UTM.f - 2 * height, UTM.c + 2 * width, UTM.f)
    transform, copy_width, copy_height = calculate_default_transform("EPSG:32632", crs, width, height, *bounds)
    assert copy_width and copy_height
    copy_4HW = np.zeros((4, copy_height, copy_width), dtype=np.uint8)
    source_4HW = np.concatenate([np.moveaxis(image, 2, 0), np.full((1, height, width), 255, np.uint8)])
    places = {"src_transform": UTM, "src_crs": "EPSG:32632", "dst_transform": transform, "dst_crs": crs}
    reproject(source_4HW, copy_4HW, resampling=kernel, **places)
    return write_scene(path, np.moveaxis(copy_4HW, 0, 2), transform, crs)


def iou_of_copy(whole: tuple[Grid, np.ndarray], copy: tuple[Grid, np.ndarray], away_px: int) -> float:
    """Of the masks of class 1, pixel by pixel: both maps lie on the same lines of the same CRS."""
    assert copy[0].crs == whole[0].crs
    column, row = ~whole[0].affine @ (copy[0].affine.c, copy[0].affine.f)
    assert (column, row) == pytest.approx((round(column), round(row)), abs=1e-6)
    masks = np.full((2, 600, 600), NO_DATA, dtype=np.uint8)
    for mask, (_, maps), (top, left) in zip(masks, (whole, copy), ((0, 0), (round(row), round(column))), strict=True):
        labels = label_pixels(maps, [0, 1])
        mask[50 + top : 50 + top + labels.shape[0], 50 + left : 50 + left + labels.shape[1]] = labels
    inside = np.zeros(masks.shape[1:], dtype=bool)
    inside[50 + away_px : 50 + whole[0].height - away_px, 50 + away_px : 50 + whole[0].width - away_px] = True
    assert (masks[:, inside] != NO_DATA).all()
    expected, found = masks[:, inside] == 1
    assert 0.2 < expected.mean() < 0.8
    return (found & expected).sum() / (found | expected).sum()


@pytest.mark.parametrize("crs", ["EPSG:4326", "EPSG:3857", "EPSG:32633"])
@pytest.mark.parametrize("kernel", [Resampling.nearest, Resampling.bilinear, Resampling.cubic])
def test_a_reprojected_copy_gives_the_same_mask(tmp_path: Path, crs: str, kernel: Resampling) -> None:
    embedder, texts_CE = bright_embedder.bright_embedder(), bright_embedder.bright_and_dark_texts()
    image = blobs(480, 480)
    maps = [
        pixel_maps(path, embedder, texts_CE, 2.0)
        for path in (write_scene(tmp_path / "utm.tif", image), reprojected(tmp_path / "copy.tif", image, crs, kernel))
    ]
    assert iou_of_copy(*maps, away_px=24) >= 0.97


def test_also_a_model_that_sees_its_whole_tile_gives_a_copy_nearly_the_same_mask(
    tmp_path: Path, looking_around: Embedder
) -> None:
    """Of a picture without detail finer than its pixels; of what resampling takes away no grid can know."""
    coarse = torch.from_numpy(np.random.default_rng(5).random((1, 3, 60, 60)))
    fine = torch.nn.functional.interpolate(coarse, (480, 480), mode="bicubic")[0].permute(1, 2, 0).numpy()
    image = (fine * 255).clip(0, 255).astype(np.uint8)
    whole = write_scene(tmp_path / "utm.tif", image)
    copy = reprojected(tmp_path / "copy.tif", image, "EPSG:4326", Resampling.cubic)
    values = [looking_around.embed_texts(["a stadium"])[0], looking_around.embed_texts(["harbour and water"])[0]]
    texts_CE = torch.from_numpy(np.stack(values))
    maps = [pixel_maps(path, looking_around, texts_CE, 2.0) for path in (whole, copy)]
    offsets = np.median(maps[0][1].reshape(2, -1), axis=1)[:, None, None]  # so that each text wins in about a half
    assert iou_of_copy(*[(grid, values - offsets) for grid, values in maps], away_px=72) >= 0.9


def test_the_grid_covers_the_scene_and_lies_on_the_lines_of_the_crs() -> None:
    for angle in (0.0, 30.0):  # north-up and turned
        transform = Affine.translation(500_003, 5_500_001) @ Affine.rotation(angle) @ Affine.scale(0.7, -0.7)
        a, b, c, d, e, f = tuple(transform)[:6]
        grid = Grid("EPSG:32632", (a, b, c, d, e, f), 301, 203)
        target = target_grid(grid, 2.0)
        lines = Affine(*target.grid.transform)
        assert (lines.a, lines.b, lines.d, lines.e) == (2.0, 0.0, 0.0, -2.0)
        origin_column, origin_row = ~lines @ (0.0, 0.0)
        assert (-origin_row, -origin_column) == pytest.approx(target.first_px, abs=1e-5)
        corners = [~lines @ (transform @ corner) for corner in ((0, 0), (301, 0), (0, 203), (301, 203))]
        for x, y in corners:
            assert -1e-6 <= x <= target.grid.width + 1e-6 and -1e-6 <= y <= target.grid.height + 1e-6
        for size, along in zip((target.grid.width, target.grid.height), zip(*corners, strict=True), strict=True):
            assert size <= max(along) - min(along) + 2


@pytest.mark.parametrize(
    ("crs", "x", "y", "expected"),
    [
        ("EPSG:4326", 20.2, 40.0, "EPSG:32634"),
        ("EPSG:4326", 20.2, -40.0, "EPSG:32734"),
        ("EPSG:4326", -179.99, 10.0, "EPSG:32601"),
        ("EPSG:4326", 179.95, 10.0, "EPSG:32660"),
        ("EPSG:4326", 20.0, 85.0, "EPSG:32661"),
        ("EPSG:3857", 2_244_800.0, 4_865_000.0, "EPSG:32634"),
        ("EPSG:32633", 1_000_000.0, 4_430_000.0, "EPSG:32634"),  # of a scene that was kept in the neighbouring zone
    ],
)
def test_maps_lie_in_the_zone_of_the_place_whatever_the_scene_is_in(
    crs: str, x: float, y: float, expected: str
) -> None:
    pixel = 1e-5 if crs == "EPSG:4326" else 1.0
    grid = Grid(crs, (pixel, 0.0, x, 0.0, -pixel, y), 400, 300)
    target = target_grid(grid, 2.0)
    assert target.grid.crs == expected
    assert target.grid.ground_sample_distance_m() == pytest.approx(2.0, rel=0.02)
    assert target_grid(grid, 2.0, "EPSG:3857").grid.ground_sample_distance_m() == pytest.approx(2.0, rel=0.02)


def test_a_scene_that_its_zone_cannot_hold_is_refused_with_a_remedy() -> None:
    world = Grid("EPSG:4326", (1.0, 0.0, -180.0, 0.0, -1.0, 90.0), 360, 180)
    with pytest.raises(CrsError, match="cut the scene, or name a `maps_crs` that fits it"):
        target_grid(world, 1000.0)


@pytest.mark.parametrize(("ground_sample_distance_m", "latitude"), [(0.1, 60.0), (2.5, -70.0), (300.0, 45.0)])
def test_places_between_the_exact_ones_are_right(ground_sample_distance_m: float, latitude: float) -> None:
    pixel = ground_sample_distance_m / 50_000
    scene = Grid("EPSG:4326", (pixel, 0.0, 14.0, 0.0, -pixel, latitude), 200, 200)
    target = target_grid(scene, ground_sample_distance_m)
    rows, columns = np.arange(target.grid.height) + 0.5, np.arange(target.grid.width) + 0.5
    at_row, at_column = positions(scene, target, rows, columns)
    for row, column in ((0, 0), (17, 90), (101, 33), (150, 77)):
        exact = scene.pixel(*target.grid.lonlat(rows[row], columns[column]))
        assert (at_row[row, column], at_column[row, column]) == pytest.approx(exact, abs=0.02)


@pytest.mark.parametrize("ground_sample_distance_m", [1.5, 2.0, 4.7])
def test_windows_of_a_resampled_scene_meet_without_seams(tmp_path: Path, ground_sample_distance_m: float) -> None:
    path = write_scene(tmp_path / "a.tif", blobs(480, 480))
    reader, grid = resampled(describe_scene("a", str(path), SceneSource(path=str(path))), ground_sample_distance_m)
    assert isinstance(grid, Grid)
    whole = reader.read_window(0, 0, reader.height_px, reader.width_px).astype(int)
    part = reader.read_window(11, 23, 40, 50).astype(int)
    assert np.abs(part - whole[11:51, 23:73]).max() <= 1  # rounding of the box's corner to float32
    assert grid.ground_sample_distance_m() == pytest.approx(ground_sample_distance_m, rel=0.02)
    assert reader.read_valid is not None and reader.read_valid(0, 0, reader.height_px, reader.width_px).all()


def test_only_what_is_needed_is_read_where_the_crs_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mollweide ends at 180 degrees, so along this scene's eastern edge there are nodes without coordinates."""
    pixel, rows, columns = 5e-4, 3000, 120
    image = np.empty((rows, columns, 3), np.uint8)
    image[:] = (1 + np.arange(rows)[:, None, None] * 250 // rows).astype(np.uint8)
    place = Affine(pixel, 0.0, 179.995 - columns * pixel, 0.0, -pixel, rows * pixel / 2)
    path = write_scene(tmp_path / "a.tif", image, place, "EPSG:4326")
    num_rows = []

    def counted(layers: list[Layer], row: int, column: int, height: int, width: int) -> np.ndarray:
        num_rows.append(height)
        return read_window(layers, row, column, height, width)

    monkeypatch.setattr(ground_pixels, "read_window", counted)
    scene = describe_scene("a", str(path), SceneSource(path=str(path)))
    reader, grid = resampled(scene, 60.0, "ESRI:54009")
    assert reader.read_valid is not None
    first, height = reader.height_px * 9 // 10, 40
    at_row, _ = positions(scene.grid, TargetGrid(grid, reader.first_px), np.arange(first, first + height) + 0.5,
                          np.arange(reader.width_px) + 0.5)  # fmt: skip
    valid = reader.read_valid(first, 0, height, reader.width_px)
    assert at_row.min() < -1e6 and valid[:, 40:60].all() and not valid.all()
    assert num_rows and max(num_rows) < 1.5 * height * 60 / (pixel * 110_574) + 20
    seen = reader.read_window(first, 0, height, reader.width_px)[..., 0]
    expected = 1 + at_row * 250 / rows
    assert np.abs(seen.astype(float) - expected)[valid].max() < 2


def test_one_pixel_is_a_scene(tmp_path: Path) -> None:
    embedder, texts_CE = bright_embedder.bright_embedder(), bright_embedder.bright_and_dark_texts()
    path = write_scene(tmp_path / "a.tif", np.full((1, 1, 3), 200, np.uint8))
    for distance_m in (0.5, 2.0, 50.0):
        _, maps = pixel_maps(path, embedder, texts_CE, distance_m)
        assert np.isfinite(maps).all() and (label_pixels(maps, [0, 1]) == 1).all()
