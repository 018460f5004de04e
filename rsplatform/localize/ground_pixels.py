"""A scene as the model sees it: lazy uint8 windows on the grid of its maps, resampled one way whatever the scene's CRS.

Every pixel is taken from the scene at the place that its ground has there (ground_grid.py), so windows meet without
seams and a crop has the pixels of the whole. Where the grids are the same one, pixels are read as they are.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from rsplatform.geo import Grid
from rsplatform.localize.ground_grid import TargetGrid, positions, target_grid
from rsplatform.localize.scene import SceneReader
from rsplatform.sources.scenes import Layer, Scene, open_pixels, read_window

BLOCK_SAMPLES = 1024  # along each axis, taken at a time: bounds the memory, also where scene and maps are turned
KERNEL_PX = 3  # beyond the outermost samples: what the bicubic kernel reaches, and rounding
# Pixels up to so much larger than the scene's are not averaged: samples of a scene of the model's own scale would be
# so in one copy, and not in another whose scale is a little off.
SAME_SCALE = 0.1


@dataclass(frozen=True)
class Source:
    """A scene's lazy rasters and grid, and the grid of its maps: its pixel is `scale` (y, x) of the scene's."""

    layers: list[Layer]
    grid: Grid
    target: TargetGrid
    scale: tuple[float, float]
    is_same: bool  # the two grids' pixels coincide

    @property
    def samples(self) -> tuple[int, int]:
        """How many (y, x) are averaged in a pixel of the maps."""
        down, across = (max(1, math.ceil(scale - SAME_SCALE)) for scale in self.scale)
        return down, across


def resampled(scene: Scene, ground_sample_distance_m: float, maps_crs: str | None = None) -> tuple[SceneReader, Grid]:
    """The scene as the model sees it, lazily: uint8 windows and validity on the grid of its maps, and that grid.

    Bicubic; where the scene's pixels are smaller, the mean of as many samples in each, about the box filter with which
    chips are cut. A pixel that reaches beyond the scene repeats its edge, further off there is no data.
    """
    target = target_grid(scene.grid, ground_sample_distance_m, maps_crs)
    height_m, width_m = scene.grid.pixel_size_m() if scene.grid.crs else (ground_sample_distance_m,) * 2
    scale = (ground_sample_distance_m / height_m, ground_sample_distance_m / width_m)
    source = Source(open_pixels(scene), scene.grid, target, scale, _is_same(scene.grid, target))
    kept: list[tuple[tuple[int, int, int, int], np.ndarray]] = []  # the last window: its validity is asked for next

    def read(*window: int) -> np.ndarray:
        row, column, rows, columns = window
        if not kept or kept[0][0] != window:
            kept[:] = [((row, column, rows, columns), _read(source, row, column, rows, columns))]
        return kept[0][1]

    def read_colours(row: int, column: int, rows: int, columns: int) -> np.ndarray:
        return read(row, column, rows, columns)[..., :3]

    def read_valid(row: int, column: int, rows: int, columns: int) -> np.ndarray:
        return read(row, column, rows, columns)[..., 3] > 127

    grid = target.grid
    return SceneReader(grid.height, grid.width, read_colours, read_valid, target.first_px), grid


def _is_same(grid: Grid, target: TargetGrid) -> bool:
    if not grid.crs:
        return True
    if (grid.width, grid.height) != (target.grid.width, target.grid.height):
        return False
    rows, columns = np.array([0.0, grid.height]), np.array([0.0, grid.width])
    at_row, at_column = positions(grid, target, rows, columns)
    return bool(np.allclose(at_row, rows[:, None], atol=1e-3) and np.allclose(at_column, columns, atol=1e-3))


def _read(source: Source, row: int, column: int, rows: int, columns: int) -> np.ndarray:
    """A window of the maps' grid, uint8 (rows, columns, 4)."""
    if source.is_same:
        return read_window(source.layers, row, column, rows, columns)
    pixels_HW4 = np.empty((rows, columns, 4), np.uint8)
    down, across = (max(1, BLOCK_SAMPLES // samples) for samples in source.samples)
    for top in range(0, rows, down):
        for left in range(0, columns, across):
            block_HW4 = pixels_HW4[top : top + down, left : left + across]
            block_HW4[:] = _resampled_block(source, row + top, column + left, block_HW4.shape[:2])
    return pixels_HW4


def _resampled_block(source: Source, row: int, column: int, size_px: tuple[int, int]) -> np.ndarray:
    down, across = source.samples
    rows = row + (np.arange(size_px[0] * down) + 0.5) / down
    columns = column + (np.arange(size_px[1] * across) + 0.5) / across
    at_row, at_column = positions(source.grid, source.target, rows, columns)
    inside_HW = _is_inside(at_row, source.grid.height, source.scale[0])
    inside_HW &= _is_inside(at_column, source.grid.width, source.scale[1])
    if not inside_HW.any():
        return np.zeros((*size_px, 4), np.uint8)
    first_row, end_row = _reach(at_row[inside_HW], source.grid.height, source.scale[0])
    first_column, end_column = _reach(at_column[inside_HW], source.grid.width, source.scale[1])
    height, width = end_row - first_row, end_column - first_column
    pixels_HW4 = read_window(source.layers, first_row, first_column, height, width)
    pixels_4HW = torch.from_numpy(pixels_HW4).permute(2, 0, 1).float()
    # missing pixels lend no colour to their neighbours
    pixels_4HW = torch.cat([pixels_4HW[:3] * (pixels_4HW[3:] / 255), pixels_4HW[3:]])
    places = [2 * (at_column - first_column) / width - 1, 2 * (at_row - first_row) / height - 1]
    places_1HW2 = torch.from_numpy(np.stack(places, axis=-1)[None]).float()
    sampled_4HW = F.grid_sample(pixels_4HW[None], places_1HW2, "bicubic", "border", align_corners=False)[0]
    sampled_4HW *= torch.from_numpy(inside_HW)
    mean_4HW = F.avg_pool2d(sampled_4HW, (down, across))
    colours_3HW = mean_4HW[:3] * (255 / mean_4HW[3:].clamp(min=1.0))
    mean_4HW = torch.cat([colours_3HW, mean_4HW[3:]]).round().clamp(0, 255)
    return mean_4HW.permute(1, 2, 0).to(torch.uint8).numpy()


def _reach(places: np.ndarray, length: int, scale: float) -> tuple[int, int]:
    """First and end of the scene's pixels that samples at these places along an axis need, all of them inside.

    Of those inside only: one without coordinates lies far off, and would have everything between read.
    """
    margin = KERNEL_PX + math.ceil(scale)
    return max(math.floor(places.min()) - margin, 0), min(math.ceil(places.max()) + margin, length)


def _is_inside(places: np.ndarray, length: int, scale: float) -> np.ndarray:
    """Inside the scene, or beyond it by up to a pixel of the maps, which is `scale` of the scene's."""
    return (places >= -scale) & (places <= length + scale)
