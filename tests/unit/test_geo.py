"""Grids: pixels and lon/lat are inverse, metres are true in every CRS."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rsplatform.geo import Grid, center, distance_m

UTM = Grid("EPSG:32735", (2.5, 0.0, 500_000.0, 0.0, -2.5, 7_000_000.0), 1000, 800)
MERCATOR = Grid("EPSG:3857", (0.0746, 0.0, 4_368_215.0, 0.0, -0.0746, -674_000.0), 8192, 4096)
DEGREES = Grid("EPSG:4326", (2e-5, 0.0, 20.44, 0.0, -2e-5, -34.0), 1098, 3039)


@pytest.mark.parametrize("grid", [UTM, MERCATOR, DEGREES])
@given(st.floats(-10, 5000), st.floats(-10, 5000))
def test_pixel_and_lonlat_are_inverse(grid: Grid, row: float, column: float) -> None:
    again = grid.pixel(*grid.lonlat(row, column))
    assert again == pytest.approx((row, column), abs=1e-3)


def test_ground_size_is_true_metres_in_every_crs() -> None:
    assert UTM.ground_sample_distance_m() == pytest.approx(2.5, rel=1e-3)
    assert MERCATOR.ground_sample_distance_m() == pytest.approx(0.0742, rel=5e-3)  # Mercator stretches by 1/cos(lat)
    height_m, width_m = DEGREES.pixel_size_m()
    assert height_m == pytest.approx(2.22, rel=1e-2)
    assert width_m == pytest.approx(1.84, rel=1e-2)  # a degree of longitude is shorter at 34° S


@pytest.mark.parametrize("grid", [UTM, MERCATOR, DEGREES])
def test_bounds_cover_every_pixel_of_the_window(grid: Grid) -> None:
    west, south, east, north = grid.bounds_lonlat(10, 20, 64, 96)
    for row in (10, 40, 74):
        for column in (20, 70, 116):
            longitude, latitude = grid.lonlat(row, column)
            assert west - 1e-9 <= longitude <= east + 1e-9
            assert south - 1e-9 <= latitude <= north + 1e-9
    assert center((0.0, 0.0, 2.0, 4.0)) == (1.0, 2.0)
    assert distance_m((0.0, 0.0), (0.0, 1.0)) == pytest.approx(110_574, rel=1e-3)
