"""Scenes: masks, stretches, dates and composites, and the files that are no scenes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from rasterio.enums import Resampling
from rasterio.transform import from_origin

from rsplatform.config import ConfigError, validate
from rsplatform.sources.scenes import (
    Scene,
    SceneError,
    SceneSource,
    compose,
    describe_scene,
    find_scene_files,
    open_pixels,
    read_window,
    scene_from_json,
)
from rsplatform.sources.visit import Visit, describe_visit


def write_tiff(path: Path, pixels_BHW: np.ndarray, **options: Any) -> Path:
    profile: dict[str, Any] = {"crs": "EPSG:32614", "transform": from_origin(500_000, 4_000_000, 2, 2)}
    profile |= {"count": len(pixels_BHW), "height": pixels_BHW.shape[1], "width": pixels_BHW.shape[2]}
    with rasterio.open(path, "w", driver="GTiff", dtype=pixels_BHW.dtype, **profile | options) as target:
        target.write(pixels_BHW)
    return path


def describe(path: Path) -> Scene:
    return describe_scene(path.name, str(path), SceneSource(path=str(path)))


@pytest.fixture
def noise_BHW() -> np.ndarray:
    return np.random.default_rng(0).integers(1, 255, (3, 300, 200)).astype(np.uint8)


def test_a_window_holds_the_files_pixels_and_validity(tmp_path: Path, noise_BHW: np.ndarray) -> None:
    noise_BHW[:, :10] = 0
    scene = describe(write_tiff(tmp_path / "a_20200102.tif", noise_BHW, nodata=0))
    window_HW4 = read_window(open_pixels(scene), 5, 20, 40, 30)
    np.testing.assert_array_equal(window_HW4[5:, :, :3], np.moveaxis(noise_BHW[:, 10:45, 20:50], 0, 2))
    assert (window_HW4[:5, :, 3] == 0).all() and (window_HW4[5:, :, 3] == 255).all()
    assert scene.datetime == "2020-01-02T00:00:00Z"
    assert scene.grid.ground_sample_distance_m() == pytest.approx(2, rel=1e-3)
    assert scene_from_json(json.loads(json.dumps(scene.to_json()))) == scene


def test_uint16_is_stretched_by_percentiles_of_the_scene(tmp_path: Path) -> None:
    ramp = np.linspace(1000, 3000, 100 * 100).reshape(1, 100, 100).astype(np.uint16).repeat(3, axis=0)
    scene = describe(write_tiff(tmp_path / "ramp.tif", ramp))
    colours = read_window(open_pixels(scene), 0, 0, 100, 100)
    expected = np.clip((ramp[0].astype(float) - 1040) / (2960 - 1040), 0, 1) * 255
    assert np.abs(colours[:, :, 0] - expected).max() < 2


def test_with_a_value_range_a_part_has_the_pixels_of_the_whole(tmp_path: Path) -> None:
    whole_BHW = slope(200)
    here, there = from_origin(500_000, 4_000_000, 2, 2), from_origin(500_060, 3_999_800, 2, 2)
    whole = write_tiff(tmp_path / "whole.tif", whole_BHW, transform=here)
    part = write_tiff(tmp_path / "part.tif", whole_BHW[:, 100:, 30:120], transform=there)
    per_band = [[1000, 8000], [0, 10_000], [500, 1500]]
    for value_range, pairs in ((None, None), ([0, 10_000], [[0, 10_000]] * 3), (per_band, per_band)):
        found = []
        for path in (whole, part):
            values = {"path": str(path), "value_range": value_range}
            scene = describe_scene(path.name, str(path), validate(SceneSource, values, "recipe.yaml"))
            assert scene_from_json(json.loads(json.dumps(scene.to_json()))) == scene
            found.append(read_window(open_pixels(scene), 0, 0, scene.grid.height, scene.grid.width)[..., :3])
        whole_HW3, part_HW3 = found[0][100:, 30:120].astype(int), found[1].astype(int)
        if pairs is None:
            assert np.abs(part_HW3 - whole_HW3).max() > 20, "red: each file's own percentiles"
            continue
        np.testing.assert_array_equal(part_HW3, whole_HW3)
        low_B, high_B = np.array(pairs).T[..., None, None]
        expected_BHW = 255 * ((whole_BHW[:, 100:, 30:120] - low_B) / (high_B - low_B)).clip(0, 1)
        assert np.abs(np.moveaxis(part_HW3, 2, 0) - expected_BHW).max() <= 0.51


def test_a_value_range_is_taken_unread_and_of_8_bit_files_too(tmp_path: Path) -> None:
    for name, dtype in (("deep", np.uint16), ("bytes", np.uint8)):
        path = write_tiff(tmp_path / f"{name}.tif", np.full((3, 40, 40), 50, dtype))
        with rasterio.open(path) as dataset:
            counting = CountingDataset(dataset)
            visit = describe_visit(counting, str(path), (1, 2, 3), ((0.0, 100.0),) * 3)
        assert (visit.stretch, counting.num_pixels) == (((0, 100),) * 3, 0)
        source = validate(SceneSource, {"path": str(path), "value_range": [0, 100]}, "recipe.yaml")
        scene = describe_scene(name, str(path), source)
        assert (read_window(open_pixels(scene), 0, 0, 40, 40)[..., :3] == 128).all()


@pytest.mark.parametrize(
    ("value_range", "words"),
    [
        ([5, 5], r"value_range\.0: .*\[5, 5\] does not rise; write \[low, high\] in the file's own values"),
        ([[0, 1], [2, 1], [0, 1]], r"value_range\.1: .*\[2, 1\] does not rise"),
        ([0, float("inf")], r"value_range\.0\.1: .*finite"),
        ([float("nan"), 1], r"value_range\.0\.0: .*finite"),
        ([[0, 1], [0, 1]], r"missing key 'value_range\.2'"),
    ],
)
def test_a_value_range_that_is_none_is_refused(value_range: list[Any], words: str) -> None:
    with pytest.raises(ConfigError, match=rf"recipe\.yaml: {words}"):
        validate(SceneSource, {"path": "a.tif", "value_range": value_range}, "recipe.yaml")


def test_the_median_of_dates_lies_on_the_first_grid_and_ignores_nodata(tmp_path: Path) -> None:
    members = []
    for number, (value, origin) in enumerate(((50, 500_000), (90, 500_020), (100, 500_020))):
        pixels = np.full((3, 60, 60), value, np.uint8)
        pixels[:, 30:40, 30:40] = 0 if number == 1 else value
        transform = from_origin(origin, 4_000_000, 2, 2)
        members.append(describe(write_tiff(tmp_path / f"v{number}.tif", pixels, nodata=0, transform=transform)))
    window = read_window(open_pixels(compose("place", members)), 0, 0, 60, 60)
    assert window[2, 2].tolist() == [50, 50, 50, 255], "only the first date covers the west"
    assert window[20, 30].tolist() == [90, 90, 90, 255]
    assert window[35, 45].tolist() == [75, 75, 75, 255], "the median of 50 and 100, as the second has no data"


def bad_files(folder: Path, noise_BHW: np.ndarray) -> dict[str, Path]:
    good = write_tiff(folder / "good.tif", noise_BHW, tiled=True, blockxsize=64, blockysize=64)
    vrt = folder / "disguise.tif"
    vrt.write_text(
        '<VRTDataset rasterXSize="200" rasterYSize="300"><SRS>EPSG:32614</SRS>'
        "<GeoTransform>0,1,0,0,0,-1</GeoTransform>"
        f'<VRTRasterBand dataType="Byte" band="1"><SimpleSource><SourceFilename>{good}</SourceFilename>'
        "</SimpleSource></VRTRasterBand></VRTDataset>"
    )
    with rasterio.open(vrt):
        pass  # red: without a named driver the disguise works
    (folder / "empty.tif").write_bytes(b"")
    (folder / "header_cut.tif").write_bytes(good.read_bytes()[:100])
    (folder / "text.tif").write_text("no picture")
    return {
        "disguise": vrt,
        "missing": folder / "absent.tif",
        "empty": folder / "empty.tif",
        "cut": folder / "header_cut.tif",
        "text": folder / "text.tif",
        "no_crs": write_tiff(folder / "no_crs.tif", noise_BHW, crs=None),
        "unusable_crs": write_tiff(folder / "site.tif", noise_BHW, crs='LOCAL_CS["site grid",UNIT["metre",1]]'),
        "too_few_bands": write_tiff(folder / "grey.tif", noise_BHW[:1]),
        "no_data": write_tiff(folder / "blank.tif", np.zeros(noise_BHW.shape, np.uint16), nodata=0),
    }


REASONS = {"no_crs", "unusable_crs", "too_few_bands", "no_data"}


def test_files_that_are_no_scenes_say_why(tmp_path: Path, noise_BHW: np.ndarray) -> None:
    for name, path in bad_files(tmp_path, noise_BHW).items():
        with pytest.raises(SceneError) as error:
            describe(path)
        assert error.value.reason == (name if name in REASONS else "unreadable")
        assert path.name in error.value.detail


@pytest.mark.parametrize("crs", ["EPSG:4326", "EPSG:32614"])
def test_coordinates_that_lie_nowhere_on_earth_are_no_scene(tmp_path: Path, noise_BHW: np.ndarray, crs: str) -> None:
    """Metres that are labelled as degrees, and metres beyond every zone."""
    path = write_tiff(tmp_path / "a.tif", noise_BHW, crs=crs, transform=from_origin(5e8, 4e8, 2, 2))
    with pytest.raises(SceneError, match=r"a\.tif: x .* lies nowhere on Earth in 'WGS 84.*gdal_edit") as error:
        describe(path)
    assert error.value.reason == "unusable_crs"


class CountingDataset:
    """A rasterio dataset that counts the pixels it is asked for, at the file's own resolution."""

    def __init__(self, dataset: Any):
        self.dataset, self.num_pixels = dataset, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.dataset, name)

    def read(self, **options: Any) -> np.ndarray:
        window = options.get("window")
        self.num_pixels += window.width * window.height if window else self.dataset.width * self.dataset.height
        return self.dataset.read(**options)


def slope(size: int) -> np.ndarray:
    """uint16 (3, size, size) whose values differ from place to place and from band to band."""
    rows_HW, columns_HW = np.mgrid[:size, :size] / size
    return np.stack([1000 + 9000 * rows_HW**2, 500 + 8000 * columns_HW, 3000 * rows_HW * columns_HW]).astype(np.uint16)


def described_pixels(path: Path) -> tuple[Visit, int]:
    with rasterio.open(path) as dataset:
        counting = CountingDataset(dataset)
        return describe_visit(counting, str(path), (1, 2, 3)), counting.num_pixels


def test_an_8_bit_scene_is_described_by_its_header_alone(tmp_path: Path, noise_BHW: np.ndarray) -> None:
    visit, num_pixels = described_pixels(write_tiff(tmp_path / "a.tif", noise_BHW, nodata=0))
    assert (visit.stretch, visit.nodata, num_pixels) == (None, 0, 0)
    blank = describe(write_tiff(tmp_path / "blank.tif", np.zeros_like(noise_BHW), nodata=0))
    assert not read_window(open_pixels(blank), 0, 0, 50, 50).any(), "its chips are dropped one by one, as nodata"


@pytest.mark.parametrize("layout", [{"tiled": True, "blockxsize": 128, "blockysize": 128}, {"blockysize": 4}])
def test_a_stretch_from_few_blocks_is_close_to_that_of_all_pixels(tmp_path: Path, layout: dict[str, Any]) -> None:
    pixels_BHW = slope(2304)
    pixels_BHW[:, :, :1152] = 0  # a half without data takes no part
    path = write_tiff(tmp_path / "large.tif", pixels_BHW, nodata=0, **layout)
    visit, num_pixels = described_pixels(path)
    assert visit.stretch and 0 < num_pixels <= 0.5 * 2304**2
    assert described_pixels(path)[0] == visit, "always the same blocks"
    expected_B2 = np.percentile(pixels_BHW[:, :, 1152:].reshape(3, -1), (2, 98), axis=1).T
    spans_B = np.ptp(expected_B2, axis=1)
    assert (np.abs(np.array(visit.stretch) - expected_B2) <= 0.08 * spans_B[:, None]).all(), "of a steep slope"


def test_a_close_overview_is_taken_instead(tmp_path: Path) -> None:
    pixels_BHW = slope(2304)
    path = write_tiff(tmp_path / "large.tif", pixels_BHW, tiled=True, blockxsize=128, blockysize=128)
    with rasterio.open(path, "r+") as target:
        target.build_overviews([2, 4], Resampling.nearest)
    visit, _ = described_pixels(path)
    expected_B2 = np.percentile(pixels_BHW.reshape(3, -1), (2, 98), axis=1).T
    assert visit.stretch and np.abs(np.array(visit.stretch) - expected_B2).max() <= 0.01 * 10_000


def test_the_only_block_with_data_is_found(tmp_path: Path) -> None:
    pixels_BHW = np.zeros((3, 2304, 2304), np.uint16)
    pixels_BHW[:, -128:, -128:] = slope(128) + 1
    path = write_tiff(tmp_path / "sparse.tif", pixels_BHW, nodata=0, tiled=True, blockxsize=128, blockysize=128)
    visit, _ = described_pixels(path)
    expected_B2 = np.percentile(pixels_BHW[:, -128:, -128:].reshape(3, -1), (2, 98), axis=1).T
    assert visit.stretch and np.abs(np.array(visit.stretch) - expected_B2).max() <= 100


def test_a_cut_file_opens_but_its_missing_blocks_are_errors(tmp_path: Path, noise_BHW: np.ndarray) -> None:
    whole = write_tiff(tmp_path / "whole.tif", noise_BHW, tiled=True, blockxsize=64, blockysize=64, compress="deflate")
    scene = describe(whole)
    whole.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    pixels = open_pixels(scene)
    assert read_window(pixels, 0, 0, 64, 64).shape == (64, 64, 4)
    with pytest.raises(SceneError, match="unreadable"):
        read_window(pixels, 250, 100, 40, 40)


def test_missing_places_and_patterns_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="absent does not exist"):
        find_scene_files(SceneSource(path=str(tmp_path / "absent")), str)
    (tmp_path / "a.txt").touch()
    with pytest.raises(ConfigError, match=r"matches '\*.tif'"):
        find_scene_files(SceneSource(path=str(tmp_path)), str)


def test_a_pattern_finds_both_endings_in_any_case_and_nothing_else(tmp_path: Path) -> None:
    names = ["a.tif", "b.TIF", "c.tiff", "d.Tiff", "sub/e.TIFF", "a.tif.aux.xml", "f.tfw", "tif"]
    (tmp_path / "sub").mkdir()
    for name in names:
        (tmp_path / name).touch()

    def found(**changes: str) -> list[str]:
        source = SceneSource.model_validate({"path": str(tmp_path)} | changes)
        return [place.removeprefix(f"{tmp_path}/") for _, place in find_scene_files(source, str)]

    assert found() == names[:5]
    assert found(pattern="*.TIFF") == names[:5]
    assert found(pattern="[ab].tif") == names[:2]
    assert found(path=str(tmp_path / "b.TIF"))[0].endswith("b.TIF"), "one file is no folder"


@pytest.mark.parametrize(
    ("name", "tag", "expected"),
    [
        ("a_20230231", "", ""),
        ("a_2023-02-28", "", "2023-02-28T00:00:00Z"),
        ("a", "2023:02:28 25:61:61", ""),
        ("a", "2023:02:28 23:59:59", "2023-02-28T23:59:59Z"),
        ("a_20200102", "2023:02:31 10:00:00", "2020-01-02T00:00:00Z"),
    ],
)
def test_a_date_that_is_none_is_unknown(
    tmp_path: Path, noise_BHW: np.ndarray, name: str, tag: str, expected: str
) -> None:
    path = write_tiff(tmp_path / f"{name}.tif", noise_BHW)
    with rasterio.open(path, "r+") as target:
        target.update_tags(TIFFTAG_DATETIME=tag)
    assert describe(path).datetime == expected


def test_dates_of_a_recipe_are_checked_when_it_is_loaded(tmp_path: Path, noise_BHW: np.ndarray) -> None:
    for wrong in ("2010", "2010-02-31", "last summer", ""):
        with pytest.raises(
            ConfigError, match=rf"test: dates: .*'a\*': '{wrong}' is no date; write one such as 2010-07"
        ):
            validate(SceneSource, {"path": "x", "dates": {"a*": wrong}}, "test")
    path = write_tiff(tmp_path / "a.tif", noise_BHW)
    for date, expected in (
        ("2010-07-01", "2010-07-01T00:00:00Z"),
        ("2010-07-01T02:00:00+02:00", "2010-07-01T00:00:00Z"),
    ):
        source = SceneSource(path=str(path), dates={"a*": date})
        assert describe_scene("a.tif", str(path), source).datetime == expected
