"""Paints the textures of what covers ground: open land, fields, forests, water, roads, roofs.

Comes in: a canvas in flat colours. Goes out: the same canvas, textured. Periods are true metres and survive at
2.5 m pixels: rows 8-14 m, crowns 8-11 m. Large single things are in structures.py.
"""

import math

import numpy as np

from rsplatform.world import palettes
from rsplatform.world.canvas import Canvas
from rsplatform.world.noise import Floats, cell_values, fractal_noise, nearest_crowns, value_noise

CROWN_SPACING_M = 9.5
BUSH_SPACING_M = 17.0


def paint_ground(canvas: Canvas, seed: int) -> None:
    """Background: mottled at every scale, without direction, and here and there a bush with its shadow."""
    pixels = canvas.pixels(palettes.BACKGROUND)
    grid = canvas.grid
    mottle = fractal_noise(grid.x_W, grid.y_H, {140: 0.10, 45: 0.10, 16: 0.09, 6: 0.08}, seed)
    canvas.shade(pixels, 1 + mottle.ravel()[pixels])
    x_N, y_N = canvas.place(pixels)
    offset_x, offset_y, value = nearest_crowns(x_N, y_N, BUSH_SPACING_M, seed + 1)
    density = np.maximum(canvas.table([feature.texture[0] for feature in canvas.features], pixels), 0.06)
    radius = 2.5 + 6 * value / np.maximum(density, 0.01) * 0.35
    distance = np.hypot(offset_x, offset_y)
    away_x, away_y = canvas.light.away_xy
    in_shadow = np.hypot(offset_x - 4 * away_x, offset_y - 4 * away_y) < radius
    present = value < density
    canvas.shade(
        pixels[present & in_shadow & (distance >= radius)],
        _constant(0.62, present & in_shadow & (distance >= radius)),
    )
    lit = present & (distance < radius)
    canvas.shade(pixels[lit], (0.80 - 0.035 * (offset_x * away_x + offset_y * away_y)[lit]).astype(np.float32))


def _constant(value: float, chosen: np.ndarray) -> Floats:
    return np.full(int(chosen.sum()), value, np.float32)


def paint_fields(canvas: Canvas, seed: int) -> None:
    """Rows in one direction a field, some as separate trees of an orchard; soft patches of growth."""
    pixels = canvas.pixels(palettes.FIELD)
    features, grid = canvas.features, canvas.grid
    x_N, y_N = canvas.place(pixels)
    cosine = canvas.table([math.cos(feature.angle) for feature in features], pixels)
    sine = canvas.table([math.sin(feature.angle) for feature in features], pixels)
    period = canvas.table([feature.texture[0] or 1.0 for feature in features], pixels)
    depth = canvas.table([feature.texture[1] for feature in features], pixels)
    orchard = canvas.table([feature.texture[2] for feature in features], pixels)
    across = np.sin(2 * math.pi * (y_N * cosine - x_N * sine) / period)
    along = np.sin(2 * math.pi * (x_N * cosine + y_N * sine) / period)
    rows = np.where(orchard > 0, 0.5 * across + 0.5 * along, across)
    patches = fractal_noise(grid.x_W, grid.y_H, {120: 0.06, 40: 0.05}, seed).ravel()[pixels]
    canvas.shade(pixels, (1 + patches) * (1 + depth * rows))


def paint_forests(canvas: Canvas, seed: int) -> None:
    """Round crowns lit from the sun's side with dark gaps between, each crown a little lighter or darker."""
    pixels = canvas.pixels(palettes.FOREST)
    x_N, y_N = canvas.place(pixels)
    offset_x, offset_y, value = nearest_crowns(x_N, y_N, CROWN_SPACING_M, seed)
    away_x, away_y = canvas.light.away_xy
    slope = -(offset_x * away_x + offset_y * away_y) / (0.5 * CROWN_SPACING_M)
    distance = np.hypot(offset_x, offset_y) / CROWN_SPACING_M
    gap = np.clip((distance - 0.42) * 5, 0, 1)
    spread = canvas.table([feature.texture[0] for feature in canvas.features], pixels)
    factor = (1 + 0.30 * slope) * (1 + spread * (value - 0.5)) * (1.12 - 0.62 * gap)
    canvas.shade(pixels, np.clip(factor, 0.3, 1.7))


def paint_water(canvas: Canvas, seed: int) -> None:
    """Smooth: broad gradients and a faint ripple only."""
    pixels = canvas.pixels(palettes.WATER)
    grid = canvas.grid
    broad = value_noise(grid.x_W, grid.y_H, 420, seed).ravel()[pixels]
    bent = value_noise(grid.x_W, grid.y_H, 60, seed + 1).ravel()[pixels]
    x_N, y_N = canvas.place(pixels)
    cosine = canvas.table([math.cos(feature.angle) for feature in canvas.features], pixels)
    sine = canvas.table([math.sin(feature.angle) for feature in canvas.features], pixels)
    period = canvas.table([feature.texture[0] or 1.0 for feature in canvas.features], pixels)
    depth = canvas.table([feature.texture[1] for feature in canvas.features], pixels)
    ripple = np.sin(2 * math.pi * (x_N * cosine + y_N * sine + 6 * bent) / period)
    canvas.shade(pixels, 1 + 0.07 * broad + depth * ripple)


def paint_roads(canvas: Canvas, seed: int) -> None:
    """Nearly even, worn in patches, with cars: single light or dark pixels."""
    pixels = canvas.pixels(palettes.ROAD)
    grid = canvas.grid
    wear = fractal_noise(grid.x_W, grid.y_H, {60: 0.04, 9: 0.03}, seed).ravel()[pixels]
    canvas.shade(pixels, 1 + wear)
    x_N, y_N = canvas.place(pixels)
    cars = cell_values(np.floor(x_N / 5).astype(np.int64), np.floor(y_N / 5).astype(np.int64), seed + 5)
    canvas.cover(pixels[cars < 0.012], (222, 222, 220), 0.8)
    canvas.cover(pixels[cars > 0.988], (40, 42, 48), 0.8)


def paint_roofs(canvas: Canvas, seed: int) -> None:
    """Gables with a lit and a dark side, hipped roofs, and flat roofs with a parapet and plant on them."""
    pixels = canvas.pixels(palettes.BUILDING)
    features = canvas.features
    x_N, y_N = canvas.place(pixels)
    x_N = x_N - canvas.table([feature.centre_xy[0] for feature in features], pixels)
    y_N = y_N - canvas.table([feature.centre_xy[1] for feature in features], pixels)
    cosine = canvas.table([math.cos(feature.angle) for feature in features], pixels)
    sine = canvas.table([math.sin(feature.angle) for feature in features], pixels)
    along, across = x_N * cosine + y_N * sine, y_N * cosine - x_N * sine
    half_length = canvas.table([feature.size_m[0] / 2 for feature in features], pixels)
    half_depth = canvas.table([feature.size_m[1] / 2 for feature in features], pixels)
    style = canvas.table([feature.texture[0] for feature in features], pixels)
    pitch = canvas.table([feature.texture[1] for feature in features], pixels)
    away_x, away_y = canvas.light.away_xy
    side = np.sign(across) * (away_y * cosine - away_x * sine)
    end = np.sign(along) * (away_x * cosine + away_y * sine)
    on_hip = (style == 1) & (half_length - np.abs(along) < half_depth - np.abs(across))
    sloped = 1 - pitch * np.where(on_hip, end, side)
    edge = np.minimum(half_length - np.abs(along), half_depth - np.abs(across))
    plant = cell_values(np.floor(along / 6).astype(np.int64), np.floor(across / 6).astype(np.int64), seed)
    flat = np.where(edge < 2.2, 1.22, np.where((plant > 0.86) & (edge > 4), 0.72, 1.0))
    canvas.shade(pixels, np.where(style == 2, flat, sloped).astype(np.float32))
