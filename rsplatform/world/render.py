"""Draws a land as seen from above: features and a grid in, RGB and class ids out.

The look of a picture (sun, haze, colour cast, gain) is drawn from its own seed, so the same land on two dates
looks different. Clouds and nodata are added by scenes.py.
"""

import math
from dataclasses import dataclass

import numpy as np
import shapely
from numpy.typing import NDArray
from shapely import affinity

from rsplatform.world import palettes, textures
from rsplatform.world.canvas import Canvas, Grid, Light, burn, start_canvas
from rsplatform.world.land import Feature
from rsplatform.world.noise import Floats
from rsplatform.world.structures import paint_structures

Bytes = NDArray[np.uint8]
HAZE_RGB = (186, 192, 200)
SHADOW = 0.52


@dataclass(frozen=True)
class Look:
    """How one picture was taken: the sun, and what air and sensor did to the colours."""

    light: Light
    gain_rgb: tuple[float, float, float]
    haze: float
    saturation: float


def draw_look(rng: np.random.Generator) -> Look:
    """A random look. The sun is 30-60 degrees high, anywhere but in a fixed direction."""
    azimuth, height = rng.uniform(0, 2 * math.pi), math.radians(rng.uniform(32, 60))
    light = Light((math.cos(azimuth), math.sin(azimuth)), 1 / math.tan(height))
    gain = rng.uniform(0.8, 1.2)
    cast = rng.normal(0, 0.035, 3)
    red, green, blue = (float(gain * (1 + value)) for value in cast)
    return Look(light, (red, green, blue), float(rng.uniform(0, 0.22)), float(rng.uniform(0.55, 1.05)))


def render(features: list[Feature], grid: Grid, look: Look, seed: int) -> tuple[Floats, Bytes]:
    """RGB (H, W, 3) float 0-255 and class ids (H, W) of a land on a grid; `seed` is the land's, for its texture."""
    rng = np.random.default_rng(seed)
    ground = palettes.draw_class_colour(rng, palettes.BACKGROUND)
    canvas = start_canvas(features, grid, look.light, ground)
    textures.paint_ground(canvas, seed + 11)
    textures.paint_fields(canvas, seed + 22)
    textures.paint_forests(canvas, seed + 33)
    textures.paint_water(canvas, seed + 44)
    textures.paint_roads(canvas, seed + 55)
    textures.paint_roofs(canvas, seed + 66)
    paint_structures(canvas)
    _cast_shadows(canvas)
    rgb_HWC = canvas.rgb_NC.reshape(grid.height, grid.width, 3)
    return _through_air(_blur(rgb_HWC), look), canvas.class_N.reshape(grid.height, grid.width)


def _cast_shadows(canvas: Canvas) -> None:
    """Buildings, stadiums and woods darken the ground behind them, never their own kind."""
    length = canvas.light.shadow_per_height
    away_x, away_y = canvas.light.away_xy
    for class_id in (palettes.FOREST, palettes.BUILDING, palettes.STADIUM):
        shapes = []
        for feature in canvas.features:
            if feature.class_id == class_id:
                reach = feature.height_m * length
                moved = affinity.translate(feature.geometry, away_x * reach, away_y * reach)
                swept = moved if class_id == palettes.FOREST else feature.geometry.union(moved).convex_hull
                shapes.append((swept, 1))
        shadowed = np.flatnonzero((burn(shapes, canvas.grid).ravel() > 0) & (canvas.class_N != class_id))
        canvas.shade(shadowed, np.full(len(shadowed), SHADOW, np.float32))


def _blur(rgb_HWC: Floats) -> Floats:
    """The optics: a small 3x3 blur, which also softens the stairs of rasterized edges."""
    rows = np.float32(0.68) * rgb_HWC
    rows[1:-1] += np.float32(0.16) * (rgb_HWC[:-2] + rgb_HWC[2:])
    rows[[0, -1]] += np.float32(0.16) * (rgb_HWC[[0, -1]] + rgb_HWC[[1, -2]])
    both = np.float32(0.68) * rows
    both[:, 1:-1] += np.float32(0.16) * (rows[:, :-2] + rows[:, 2:])
    both[:, [0, -1]] += np.float32(0.16) * (rows[:, [0, -1]] + rows[:, [1, -2]])
    return both


def _through_air(rgb_HWC: Floats, look: Look) -> Floats:
    """Less saturated, tinted, and veiled by haze. Changes its argument, which is nobody else's."""
    grey_HW1 = (rgb_HWC[..., 0] + rgb_HWC[..., 1] + rgb_HWC[..., 2])[..., None] / np.float32(3)
    gain = np.array(look.gain_rgb, np.float32) * np.float32(1 - look.haze)
    rgb_HWC *= np.float32(look.saturation)
    rgb_HWC += np.float32(1 - look.saturation) * grey_HW1
    rgb_HWC *= gain
    rgb_HWC += np.float32(look.haze) * np.array(HAZE_RGB, np.float32)
    return rgb_HWC


def to_bytes(rgb_HWC: Floats) -> Bytes:
    """uint8 in steps of 4, as from a 6-bit sensor: the files are a third smaller and no eye sees it."""
    return (np.clip(np.round(rgb_HWC / 4), 1, 63) * 4).astype(np.uint8)


def visible_features(features: list[Feature], grid: Grid) -> list[Feature]:
    """The features that a grid shows at least a part of."""
    gsd = grid.ground_sample_distance_m
    window = shapely.box(grid.left_m, grid.top_m - grid.height * gsd, grid.left_m + grid.width * gsd, grid.top_m)
    return [feature for feature in features if feature.geometry.intersects(window)]
