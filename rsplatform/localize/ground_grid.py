"""A scene as the model sees it: uint8 windows at the model's scale, on a grid that the ground anchors.

The grid's lines are multiples of the pixel from the origin of the scene's CRS, not from the raster's corner, so a crop
or a neighbour of a scene has the same pixels, and with `SceneReader.first_px` the same patches and tiles.
A scene without CRS has no ground: its pixels are taken as they are, as if they were of the model's scale.
"""

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image

from rsplatform.geo import Grid
from rsplatform.localize.scene import SceneReader
from rsplatform.sources.scenes import Layer, Scene, open_pixels, read_window

# Metres per unit of the CRS are rounded to steps of 2 %, and pixels within 1 % of the model's are not resampled: a
# model is blind to so little, and the true number differs between a scene and its crop (our defaults).
LADDER = 1.02
SAME_SCALE = 0.01


@dataclass(frozen=True)
class TargetGrid:
    """The grid of the maps of a scene, and where it lies in the scene's own pixels.

    Pixel (row, column) begins at `offset + scale * (row, column)` of the scene; `first_px` is pixel (0, 0) counted from
    the CRS's origin. All pairs are (y, x).
    """

    grid: Grid
    first_px: tuple[int, int]
    scale: tuple[float, float]
    offset: tuple[float, float]


def target_grid(grid: Grid, ground_sample_distance_m: float) -> TargetGrid:
    """The ground-anchored grid of about this distance that covers a scene's; the scene's own if it has no CRS."""
    if not grid.crs:
        return TargetGrid(grid, (0, 0), (1.0, 1.0), (0.0, 0.0))
    affine, sizes_m = grid.affine, grid.pixel_size_m()
    lengths = (math.hypot(affine.b, affine.e), math.hypot(affine.a, affine.d))  # of a pixel, in units of the CRS
    scales = [_scale(*pair, ground_sample_distance_m) for pair in zip(lengths, sizes_m, strict=True)]
    lines = affine @ affine.scale(scales[1], scales[0])
    # Lines through the CRS's origin; a scene that is not resampled keeps its own, which its crops share.
    lattice = type(lines)(lines.a, lines.b, 0.0, lines.d, lines.e, 0.0)
    corner_x, corner_y = ~lattice @ (affine.c, affine.f)
    firsts, offsets, counts = [], [], []
    for corner, scale, length in ((corner_y, scales[0], grid.height), (corner_x, scales[1], grid.width)):
        first = math.floor(corner + 1e-6)
        offset = 0.0 if scale == 1 else min(0.0, (first - corner) * scale)
        firsts.append(first)
        offsets.append(offset)
        counts.append(max(1, math.ceil((length - offset) / scale - 1e-6)))
    moved = affine @ affine.translation(offsets[1], offsets[0]) @ affine.scale(scales[1], scales[0])
    transform = (moved.a, moved.b, moved.c, moved.d, moved.e, moved.f)
    target = Grid(grid.crs, transform, counts[1], counts[0])
    return TargetGrid(target, (firsts[0], firsts[1]), (scales[0], scales[1]), (offsets[0], offsets[1]))


def _scale(length: float, size_m: float, ground_sample_distance_m: float) -> float:
    """Scene pixels in one target pixel along an axis, the same for every crop of the scene."""
    metres_per_unit = LADDER ** round(math.log(size_m / length, LADDER))
    scale = ground_sample_distance_m / (length * metres_per_unit)
    return 1.0 if abs(scale - 1) <= SAME_SCALE else scale


def resampled(scene: Scene, ground_sample_distance_m: float) -> tuple[SceneReader, Grid]:
    """The scene as the model sees it, lazily: uint8 windows and validity at the model's scale, and their grid."""
    target = target_grid(scene.grid, ground_sample_distance_m)
    source = Source(open_pixels(scene), (scene.grid.height, scene.grid.width), target)
    kept: list[tuple[tuple[int, int, int, int], np.ndarray]] = []  # the last window: its validity is asked for next

    def read(*window: int) -> np.ndarray:
        row, column, rows, columns = window
        if not kept or kept[0][0] != window:
            kept[:] = [((row, column, rows, columns), _resample(source, (row, column, rows, columns)))]
        return kept[0][1]

    def read_colours(row: int, column: int, rows: int, columns: int) -> np.ndarray:
        return read(row, column, rows, columns)[..., :3]

    def read_valid(row: int, column: int, rows: int, columns: int) -> np.ndarray:
        return read(row, column, rows, columns)[..., 3] > 127

    grid = target.grid
    return SceneReader(grid.height, grid.width, read_colours, read_valid, target.first_px), grid


@dataclass(frozen=True)
class Source:
    """A scene's lazy rasters, its size in its own pixels (y, x), and the grid that they are resampled to."""

    layers: list[Layer]
    size_px: tuple[int, int]
    target: TargetGrid


def _resample(source: Source, window: tuple[int, int, int, int]) -> np.ndarray:
    """Window (row, column, height, width) of the scaled picture; reads a margin, so windows meet without seams."""
    row, column, rows, columns = window
    target = source.target
    if target.scale == (1.0, 1.0):
        return read_window(source.layers, row, column, rows, columns)
    down = _Span.of(target.offset[0] + row * target.scale[0], rows, target.scale[0], source.size_px[0])
    across = _Span.of(target.offset[1] + column * target.scale[1], columns, target.scale[1], source.size_px[1])
    pixels = read_window(source.layers, down.first, across.first, down.end - down.first, across.end - across.first)
    # The grid's outer pixels reach beyond the scene by less than one of them: its edge is repeated there.
    pixels = np.pad(pixels, ((down.before, down.after), (across.before, across.after), (0, 0)), mode="edge")
    box = (across.box[0], down.box[0], across.box[1], down.box[1])
    bands = [
        Image.fromarray(np.ascontiguousarray(pixels[..., band])).resize((columns, rows), Image.Resampling.BILINEAR, box)
        for band in range(pixels.shape[2])
    ]
    return np.stack([np.asarray(band) for band in bands], axis=-1)


@dataclass(frozen=True)
class _Span:
    """Pixels to read for an interval along an axis, how many to repeat on either side, and the interval inside."""

    first: int
    end: int
    before: int
    after: int
    box: tuple[float, float]

    @classmethod
    def of(cls, begin: float, length: int, scale: float, limit: int) -> "_Span":
        end = begin + length * scale
        margin = math.ceil(max(1.0, scale)) + 1  # of the resampling kernel
        wanted_first, wanted_end = math.floor(begin) - margin, math.ceil(end) + margin
        first, last = min(max(wanted_first, 0), limit - 1), max(min(wanted_end, limit), 1)
        before, after = max(first - wanted_first, 0), max(wanted_end - last, 0)
        return cls(first, last, before, after, (begin - wanted_first, end - wanted_first))
