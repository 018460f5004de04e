"""The picture while it is painted: a pixel grid in local metres, which feature is where, and RGB so far.

Letters: H, W rows and columns; N chosen pixels; C channels. Painters change `rgb_NC` of a canvas in place: it is
their own working surface, never handed out.
"""

from dataclasses import dataclass, field

import numpy as np
import rasterio.features
from numpy.typing import NDArray
from rasterio.transform import Affine
from shapely.geometry.base import BaseGeometry

from rsplatform.world.land import Feature
from rsplatform.world.noise import Floats


@dataclass(frozen=True)
class Grid:
    """A north-up pixel grid in local metres: its upper left corner, ground sample distance and size."""

    left_m: float
    top_m: float
    ground_sample_distance_m: float
    width: int
    height: int

    @property
    def transform(self) -> Affine:
        """Pixel to local metres."""
        gsd = self.ground_sample_distance_m
        return Affine(gsd, 0, self.left_m, 0, -gsd, self.top_m)

    @property
    def x_W(self) -> Floats:
        """East coordinate of each column's centre."""
        return (self.left_m + (np.arange(self.width) + 0.5) * self.ground_sample_distance_m).astype(np.float32)

    @property
    def y_H(self) -> Floats:
        """North coordinate of each row's centre."""
        return (self.top_m - (np.arange(self.height) + 0.5) * self.ground_sample_distance_m).astype(np.float32)


@dataclass(frozen=True)
class Light:
    """Where the sun stands: a unit vector away from it on the ground, and shadow metres per metre of height."""

    away_xy: tuple[float, float]
    shadow_per_height: float


@dataclass
class Canvas:
    """`ids_HW` holds 1 + the index of the feature at each pixel, 0 where there is only the land's own ground."""

    grid: Grid
    features: list[Feature]
    light: Light
    ids_HW: NDArray[np.int32]
    rgb_NC: Floats
    class_N: NDArray[np.uint8] = field(init=False)

    def __post_init__(self) -> None:
        classes = np.array([0, *(feature.class_id for feature in self.features)], np.uint8)
        self.class_N = classes[self.ids_HW.ravel()]

    def pixels(self, class_id: int) -> NDArray[np.int64]:
        """Flat indices of a class's pixels."""
        return np.flatnonzero(self.class_N == class_id)

    def pixels_of(self, index: int) -> NDArray[np.int64]:
        """Flat indices of one feature's pixels."""
        return np.flatnonzero(self.ids_HW.ravel() == index + 1)

    def place(self, pixels_N: NDArray[np.int64]) -> tuple[Floats, Floats]:
        """Local metres (x, y) of flat indices."""
        row, column = np.divmod(pixels_N, self.grid.width)
        return self.grid.x_W[column], self.grid.y_H[row]

    def table(self, values: list[float], pixels_N: NDArray[np.int64]) -> Floats:
        """One value per feature, looked up for each pixel."""
        return np.array([0.0, *values], np.float32)[self.ids_HW.ravel()[pixels_N]]

    def shade(self, pixels_N: NDArray[np.int64], factor_N: Floats) -> None:
        """Makes pixels lighter or darker."""
        self.rgb_NC[pixels_N] *= factor_N[:, None]

    def cover(self, pixels_N: NDArray[np.int64], colour: tuple[float, float, float], opacity: float = 1.0) -> None:
        """Paints a colour over pixels."""
        self.rgb_NC[pixels_N] += opacity * (np.array(colour, np.float32) - self.rgb_NC[pixels_N])


def burn(shapes: list[tuple[BaseGeometry, int]], grid: Grid) -> NDArray[np.int32]:
    """(H, W) of the last shape's value at each pixel, 0 where there is none."""
    if not shapes:
        return np.zeros((grid.height, grid.width), np.int32)
    return rasterio.features.rasterize(
        shapes, out_shape=(grid.height, grid.width), transform=grid.transform, fill=0, dtype="int32"
    )


def start_canvas(features: list[Feature], grid: Grid, light: Light, ground: tuple[float, float, float]) -> Canvas:
    """Every feature in its flat colour on the ground's colour."""
    shapes = [(feature.footprint, number + 1) for number, feature in enumerate(features)]
    ids_HW = burn([(shape, value) for shape, value in shapes if not shape.is_empty], grid)
    colours = np.array([ground, *(feature.colour for feature in features)], np.float32)
    return Canvas(grid, features, light, ids_HW, colours[ids_HW.ravel()])
