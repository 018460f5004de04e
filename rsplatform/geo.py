"""CRS, bounds, pixel ↔ lon/lat and ground sample distance; axis order is decided here, once.

Bounds are always (west, south, east, north), points always (x, y) or (lon, lat). Shapes are the caller's.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

from affine import Affine
from pyproj import CRS, Geod, Transformer
from pyproj.exceptions import ProjError

BoundsLonLat = tuple[float, float, float, float]
_WGS84 = Geod(ellps="WGS84")


class CrsError(ValueError):
    """Coordinates that cannot be told as longitude and latitude; the message says why."""


@dataclass(frozen=True)
class Grid:
    """A north-up or rotated raster grid: CRS (as WKT or EPSG string), affine transform, size in pixels."""

    crs: str
    transform: tuple[float, float, float, float, float, float]
    width: int
    height: int

    @property
    def affine(self) -> Affine:
        """Pixel (column, row) → CRS (x, y)."""
        return Affine(*self.transform)

    def bounds_lonlat(self, row: float, column: float, height: float, width: float) -> BoundsLonLat:
        """(west, south, east, north) in degrees of a pixel window; covers its corners and edge midpoints."""
        columns = [column + width * f for f in (0, 0.5, 1, 0, 1, 0, 0.5, 1)]
        rows = [row + height * f for f in (0, 0, 0, 0.5, 0.5, 1, 1, 1)]
        points = [self.affine @ (c, r) for c, r in zip(columns, rows, strict=True)]
        transformer = to_lonlat(self.crs)
        longitudes, latitudes = transformer.transform([x for x, _ in points], [y for _, y in points])
        return min(longitudes), min(latitudes), max(longitudes), max(latitudes)

    def lonlat(self, row: float, column: float) -> tuple[float, float]:
        """Longitude and latitude in degrees of a pixel position."""
        x, y = self.affine @ (column, row)
        return to_lonlat(self.crs).transform(x, y)

    def pixel(self, longitude: float, latitude: float) -> tuple[float, float]:
        """(row, column) of a point, fractional; outside the grid too."""
        x, y = to_lonlat(self.crs).transform(longitude, latitude, direction="INVERSE")
        column, row = ~self.affine @ (x, y)
        return row, column

    def pixel_size_m(self) -> tuple[float, float]:
        """True ground size (height, width) in metres of the centre pixel, whatever the CRS and its scale."""
        row, column = self.height / 2, self.width / 2
        here = self.lonlat(row, column)
        return distance_m(here, self.lonlat(row + 1, column)), distance_m(here, self.lonlat(row, column + 1))

    def check_on_earth(self) -> None:
        """CrsError unless the centre and the corners have a longitude and a latitude.

        A local grid has none, nor have metres that are labelled as degrees.
        """
        height, width = self.height, self.width
        for row, column in ((height / 2, width / 2), (0, 0), (0, width), (height, width), (height, 0)):
            longitude, latitude = self.lonlat(row, column)
            if not (abs(longitude) <= 360 and abs(latitude) <= 90 + 1e-6):  # nor is infinity
                x, y = self.affine @ (column, row)
                raise CrsError(f"x {x:g}, y {y:g} lies nowhere on Earth in {CRS.from_user_input(self.crs).name!r}")

    def ground_sample_distance_m(self) -> float:
        """Geometric mean of the centre pixel's height and width in metres."""
        height_m, width_m = self.pixel_size_m()
        return math.sqrt(height_m * width_m)


@lru_cache(maxsize=256)
def to_lonlat(crs: str) -> Transformer:
    """Transformer from `crs` to (lon, lat); kept, because making one costs milliseconds. Threads may share it.

    Raises:
        CrsError: a CRS that is bound to no place on Earth (a local or engineering grid), or none at all.
    """
    try:
        return Transformer.from_crs(CRS.from_user_input(crs), "OGC:CRS84", always_xy=True)
    except ProjError as error:
        raise CrsError(f"{crs[:80]!r} has no way to longitude and latitude ({error})") from error


def distance_m(a: tuple[float, float], b: tuple[float, float]) -> float:
    """Geodesic distance in metres between two (lon, lat) points."""
    return _WGS84.inv(*a, *b)[2]


def center(bounds_lonlat: BoundsLonLat) -> tuple[float, float]:
    """Centre (lon, lat) of bounds."""
    west, south, east, north = bounds_lonlat
    return (west + east) / 2, (south + north) / 2
