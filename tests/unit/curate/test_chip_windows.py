"""Chips have their true size in metres in any CRS, and area averaging equals the slow obvious mean."""

import numpy as np
import pytest

from rsplatform.curate.chip_windows import corners_lonlat, lay_out_chips, resample
from rsplatform.geo import Grid, distance_m

GRIDS = [
    Grid("EPSG:32614", (2, 0, 500_000, 0, -2, 4_000_000), 500, 400),
    Grid("EPSG:3857", (1, 0, 3_600_000, 0, -1, 9_000_000), 3000, 2500),
    Grid("EPSG:4326", (2.5e-5, 0, 20.5, 0, -2.5e-5, -34.0), 400, 500),
]


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: grid.crs)
def test_chips_measure_what_they_should_and_lie_inside(grid: Grid) -> None:
    windows = lay_out_chips(grid, 200.0, 100.0)
    assert len({(window.chip_row, window.chip_column) for window in windows}) == len(windows) > 4
    for window in (windows[0], windows[-1]):
        top_left, top_right, _, bottom_left = [tuple(corner) for corner in corners_lonlat(grid, window)]
        assert distance_m(top_left, top_right) == pytest.approx(200, rel=2e-3)
        assert distance_m(top_left, bottom_left) == pytest.approx(200, rel=2e-3)
        assert window.row_px + window.height_px <= grid.height + 1e-3
        assert window.column_px + window.width_px <= grid.width + 1e-3


def test_shrinking_is_the_mean_over_valid_pixels() -> None:
    block = np.random.default_rng(0).integers(0, 255, (40, 40, 4)).astype(np.uint8)
    block[:, :, 3] = np.where(np.random.default_rng(1).random((40, 40)) < 0.7, 255, 0)
    picture, nodata_fraction = resample(block, (0, 0, 40, 40), 10)
    for row, column in ((0, 0), (3, 7), (9, 9)):
        cell = block[4 * row : 4 * row + 4, 4 * column : 4 * column + 4].reshape(-1, 4).astype(float)
        expected = cell[cell[:, 3] > 0, :3].mean(axis=0)
        assert np.abs(picture[row, column] - expected).max() <= 1
    assert nodata_fraction == pytest.approx((block[:, :, 3] == 0).mean(), abs=1e-4)
