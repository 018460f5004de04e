"""The grid that maps lie on: of a place, not of a file, so that copies and parts of a scene share its pixels.

In: a scene's grid. Out: the grid of its maps, in the UTM zone of its centre or a CRS that the recipe names, with lines
at multiples of the pixel from that CRS's origin; and where a map's pixels lie in the scene's own. Reads no pixels.
A scene without CRS has no ground: its pixels are taken as they are, as if they were of the model's scale.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

import numpy as np
from affine import Affine
from pyproj import CRS, Transformer

from rsplatform.geo import CrsError, Grid

# Metres per unit of the maps' CRS are rounded to steps of 2 %: a model is blind to so little, and the true number
# differs between a scene and its crop (our default). In UTM it is 1 up to 8° from the meridian.
LADDER = 1.02
MAX_SCALE_ERROR = 0.1  # of a pixel between the ends of a scene (our default)
REMEDY = "cut the scene, or name a `maps_crs` that fits it"
CHECKED_POINTS = 5  # along each axis
EDGE_POINTS = 101  # of a scene's edges: so dense that what bends between them is far below a pixel
# Projections are exact at every so many pixels of the maps and linear between, the same for whoever asks for a pixel:
# within 0.02 of one at distances from 0.1 to 300 m.
NODE_PX = 32


@dataclass(frozen=True)
class TargetGrid:
    """The grid of a scene's maps; `first_px` (y, x) is its pixel (0, 0) counted from the CRS's origin."""

    grid: Grid
    first_px: tuple[int, int]


def local_crs(grid: Grid) -> str:
    """The UTM zone (WGS 84) of a scene's centre, beyond 84° N and 80° S polar stereographic; as EPSG:NUMBER.

    Whole zones of six degrees, without the exceptions at Norway and Svalbard (our default).
    """
    longitude, latitude = grid.lonlat(grid.height / 2, grid.width / 2)
    if latitude > 84 or latitude < -80:
        return "EPSG:32661" if latitude > 0 else "EPSG:32761"
    zone = int((longitude + 180) // 6) % 60 + 1
    return f"EPSG:{(32600 if latitude >= 0 else 32700) + zone}"


def target_grid(grid: Grid, ground_sample_distance_m: float, maps_crs: str | None = None) -> TargetGrid:
    """The grid of the maps of a scene, which covers it; `maps_crs` is by default that of `local_crs`.

    Raises:
        CrsError: the scene reaches where that CRS has no coordinates, or pixels of quite another size.
    """
    if not grid.crs:
        return TargetGrid(grid, (0, 0))
    crs = maps_crs or local_crs(grid)
    transformer = _transformer(grid.crs, crs)
    metres = _metres_per_unit(grid, crs, transformer)
    x, y = transformer.transform(*_outline(grid))
    step_y, step_x = (ground_sample_distance_m / LADDER ** round(math.log(size, LADDER)) for size in metres)
    first_x, end_x = _lines(x / step_x)
    first_y, end_y = _lines(-y / step_y)
    transform = (step_x, 0.0, first_x * step_x, 0.0, -step_y, -first_y * step_y)
    return TargetGrid(Grid(crs, transform, end_x - first_x, end_y - first_y), (first_y, first_x))


def positions(scene: Grid, target: TargetGrid, rows: np.ndarray, columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where places in pixels of the maps lie in the scene's: its rows and columns, each (rows, columns), float64."""
    node_y, share_y = _nodes(rows + target.first_px[0])
    node_x, share_x = _nodes(columns + target.first_px[1])
    step_x, step_y = target.grid.affine.a, target.grid.affine.e
    xs, ys = np.meshgrid(node_x * step_x, node_y * step_y)
    x, y = _transformer(target.grid.crs, scene.crs).transform(xs, ys)
    x, y = (np.where(np.isfinite(places), places, np.nan) for places in (x, y))
    # a node without coordinates there lies far off
    at_column, at_row = (np.nan_to_num(places, nan=-1e9) for places in _moved(~scene.affine, x, y))
    return share_y @ at_row @ share_x.T, share_y @ at_column @ share_x.T


def _outline(grid: Grid) -> tuple[np.ndarray, np.ndarray]:
    along = np.linspace(0, 1, EDGE_POINTS)
    begin, end = np.zeros_like(along), np.ones_like(along)
    columns, rows = np.concatenate([along, along, begin, end]), np.concatenate([begin, end, along, along])
    return _moved(grid.affine, columns * grid.width, rows * grid.height)


def _moved(affine: Affine, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return affine.a * x + affine.b * y + affine.c, affine.d * x + affine.e * y + affine.f


def _lines(places: np.ndarray) -> tuple[int, int]:
    """First and last line around places; one that a place misses by rounding alone counts as met."""
    first, end = math.floor(places.min() + 1e-4), math.ceil(places.max() - 1e-4)
    return first, max(end, first + 1)


def _nodes(places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Nodes around places along an axis, and the share of each in each place (places, nodes)."""
    first, last = math.floor(places.min() / NODE_PX), math.floor(places.max() / NODE_PX) + 1
    nodes = np.arange(first, last + 1)
    return nodes * NODE_PX, (1 - np.abs(places[:, None] / NODE_PX - nodes)).clip(min=0)


def _metres_per_unit(grid: Grid, crs: str, transformer: Transformer) -> tuple[float, float]:
    """(height, width) on the ground of a unit of the maps' CRS in the middle of a scene, about the same all over it."""
    unit = 1e-5 if CRS.from_user_input(crs).is_geographic else 1.0
    sizes = []
    for row, column in product(np.linspace(0, grid.height, CHECKED_POINTS), np.linspace(0, grid.width, CHECKED_POINTS)):
        x, y = transformer.transform(*(grid.affine @ (column, row)))
        if not math.isfinite(x + y):
            raise CrsError(f"the scene reaches beyond what {crs} covers; {REMEDY}")
        height_m, width_m = Grid(crs, (unit, 0.0, x, 0.0, -unit, y), 1, 1).pixel_size_m()
        sizes.append((height_m / unit, width_m / unit))
    height, width = sizes[len(sizes) // 2]
    if not np.allclose(sizes, (height, width), rtol=MAX_SCALE_ERROR):
        raise CrsError(f"pixels in {crs} differ by over {MAX_SCALE_ERROR:.0%} within the scene; {REMEDY}")
    return height, width


@lru_cache(maxsize=64)
def _transformer(source: str, target: str) -> Transformer:
    return Transformer.from_crs(CRS.from_user_input(source), CRS.from_user_input(target), always_xy=True)
