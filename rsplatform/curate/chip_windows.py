"""Where chips lie in a scene and how their pixels are made: a grid and metres in, windows and JPEGs out.

A chip covers `size_px × ground_sample_distance_m` true metres in any CRS, so its window in the scene's pixels is
fractional and changes with latitude. Pixels are area-averaged over valid data only. Opens no files.
Shapes: H W pixels; windows are (row, column, height, width) in the scene's pixels.
"""

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image

from rsplatform.geo import Grid

JPEG_QUALITY = 92


@dataclass(frozen=True)
class ChipWindow:
    """One chip of a scene: its place in the chip grid, and its window in the scene's pixels."""

    chip_row: int
    chip_column: int
    row_px: float
    column_px: float
    height_px: float
    width_px: float

    @property
    def outer_px(self) -> tuple[int, int, int, int]:
        """Whole pixels that cover the window: top, left, bottom, right."""
        bottom, right = self.row_px + self.height_px, self.column_px + self.width_px
        # a window that ends on a pixel's edge within rounding needs no further pixel
        return (
            int(self.row_px + 1e-6),
            int(self.column_px + 1e-6),
            int(np.ceil(bottom - 1e-6)),
            int(np.ceil(right - 1e-6)),
        )


def pixel_size_m(grid: Grid, row: float, column: float) -> tuple[float, float]:
    """True (height, width) in metres of the pixel at a position: `Grid.pixel_size_m` of a grid that starts there."""
    a, b, _, d, e, _ = grid.transform
    x, y = grid.affine @ (column, row)
    return Grid(grid.crs, (a, b, x, d, e, y), 0, 0).pixel_size_m()


def lay_out_chips(grid: Grid, size_m: float, stride_m: float) -> list[ChipWindow]:
    """All chips of `size_m` metres that fit into the grid, each `stride_m` after the last, row by row.

    The scale is taken at the middle of each row of chips: exact in a Mercator or geographic grid, whose scale
    changes with latitude only.
    """
    windows = []
    row, chip_row = 0.0, 0
    while row < grid.height:
        pixel_height_m, _ = pixel_size_m(grid, row, grid.width / 2)
        pixel_height_m, pixel_width_m = pixel_size_m(grid, row + size_m / pixel_height_m / 2, grid.width / 2)
        height, width = size_m / pixel_height_m, size_m / pixel_width_m
        if row + height > grid.height + 1e-6:
            break
        num_columns = int((grid.width - width + 1e-6) / (stride_m / pixel_width_m)) + 1 if width <= grid.width else 0
        for chip_column in range(num_columns):
            column = chip_column * stride_m / pixel_width_m
            windows.append(ChipWindow(chip_row, chip_column, row, column, height, width))
        row, chip_row = row + stride_m / pixel_height_m, chip_row + 1
    return windows


def corners_lonlat(grid: Grid, window: ChipWindow) -> np.ndarray:
    """(4, 2) lon/lat of the corners: top left, top right, bottom right, bottom left."""
    top, left = window.row_px, window.column_px
    bottom, right = top + window.height_px, left + window.width_px
    return np.array(
        [grid.lonlat(row, column) for row, column in ((top, left), (top, right), (bottom, right), (bottom, left))]
    )


def resample(block_HW4: np.ndarray, box: tuple[float, float, float, float], size_px: int) -> tuple[np.ndarray, float]:
    """The part `box` (left, top, right, bottom) of a block → uint8 (size, size, 3), and the share without data.

    Area average when it shrinks (each source pixel counts by its overlap), bilinear when it grows. Invalid pixels do
    not darken their neighbours: colours are averaged with validity as weight.
    """
    left, top, right, bottom = box
    shrinks = (right - left) >= size_px and (bottom - top) >= size_px
    kernel = Image.Resampling.BOX if shrinks else Image.Resampling.BILINEAR
    if (block_HW4[:, :, 3] == 255).all():
        picture = Image.fromarray(block_HW4[:, :, :3]).resize((size_px, size_px), kernel, box=box)
        return np.asarray(picture), 0.0
    weight_HW = (block_HW4[:, :, 3] > 0).astype(np.float32)
    weight_SS = _resized(weight_HW, box, size_px, kernel)
    colours = [_resized(block_HW4[:, :, c] * weight_HW, box, size_px, kernel) for c in range(3)]
    filled = np.stack(colours, axis=2) / np.maximum(weight_SS, 1e-6)[:, :, None]
    picture_HWC = np.where(weight_SS[:, :, None] > 1e-3, np.round(filled), 0).clip(0, 255).astype(np.uint8)
    return picture_HWC, float(1 - weight_SS.mean())


def _resized(
    values_HW: np.ndarray, box: tuple[float, float, float, float], size_px: int, kernel: Image.Resampling
) -> np.ndarray:
    return np.asarray(Image.fromarray(values_HW.astype(np.float32)).resize((size_px, size_px), kernel, box=box))


def to_jpeg(image_HWC: np.ndarray) -> bytes:
    """JPEG without chroma subsampling at quality 92 (our default): 2–3 pixel wide things keep their colour."""
    buffer = io.BytesIO()
    Image.fromarray(image_HWC).save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return buffer.getvalue()
