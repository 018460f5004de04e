"""Paints the large single things, one at a time in their own frames: runways, stadiums, harbours.

Comes in: a canvas in flat colours. Goes out: the same canvas with markings, stands, piers and boats.
`along` and `across` are metres from a thing's centre, along its `angle` and to the left of it.
"""

import math

import numpy as np
from numpy.typing import NDArray

from rsplatform.world import palettes
from rsplatform.world.canvas import Canvas
from rsplatform.world.land import Feature
from rsplatform.world.noise import Floats, cell_values

WHITE = (226, 226, 220)
Pixels = NDArray[np.int64]


def paint_structures(canvas: Canvas) -> None:
    """Every runway, stadium and harbour on the canvas."""
    painters = {palettes.RUNWAY: _runway, palettes.STADIUM: _stadium, palettes.HARBOUR: _harbour}
    for index, feature in enumerate(canvas.features):
        painter = painters.get(feature.class_id)
        if painter is None:
            continue
        pixels = canvas.pixels_of(index)
        if len(pixels):
            along, across = _own_frame(canvas, pixels, feature)
            painter(canvas, pixels, (along, across), feature)


def _own_frame(canvas: Canvas, pixels: Pixels, feature: Feature) -> tuple[Floats, Floats]:
    x_N, y_N = canvas.place(pixels)
    x_N, y_N = x_N - np.float32(feature.centre_xy[0]), y_N - np.float32(feature.centre_xy[1])
    cosine, sine = np.float32(math.cos(feature.angle)), np.float32(math.sin(feature.angle))
    return x_N * cosine + y_N * sine, y_N * cosine - x_N * sine


def _cells(values_m: Floats, step_m: float) -> NDArray[np.int64]:
    return np.floor(values_m / step_m).astype(np.int64)


def _runway(canvas: Canvas, pixels: Pixels, frame: tuple[Floats, Floats], feature: Feature) -> None:
    """Slabs, tyre marks, edge lines, a dashed centre line, piano keys and touch-down bars."""
    along, across = frame
    length, width = feature.size_m
    slabs = cell_values(_cells(along, 30), _cells(across, 15), feature.seed)
    from_end = length / 2 - np.abs(along)
    tyres = 0.16 * np.exp(-((across / 9) ** 2)) * np.exp(-(((from_end - 320) / 160) ** 2))
    canvas.shade(pixels, (0.97 + 0.06 * slabs) * (1 - tyres))
    side = np.abs(across)
    lines = (np.abs(side - width / 2 + 3) < 1.3) | ((side < 1.5) & (np.mod(along, 50) < 30))
    keys = (from_end > 8) & (from_end < 44) & (np.mod(side, 6) < 3.2) & (side > 2) & (side < width / 2 - 4)
    bars = (np.abs(from_end - 300) < 28) & (np.abs(side - 0.22 * width) < 3.5)
    tint = np.array(WHITE) if np.mean(feature.colour) < 165 else np.array((70, 70, 72))
    white = (float(tint[0]), float(tint[1]), float(tint[2]))
    canvas.cover(pixels[lines], white, 0.6)
    canvas.cover(pixels[keys | bars], white, 0.75)


def _stadium(canvas: Canvas, pixels: Pixels, frame: tuple[Floats, Floats], feature: Feature) -> None:
    """A ring of stands in tiers cut by aisles around a striped pitch; the sun-side stands shade the inside."""
    along, across = frame
    half_length, half_width = feature.size_m[0] / 2, feature.size_m[1] / 2
    radius = np.hypot(along / half_length, across / half_width)
    turn = np.arctan2(across / half_width, along / half_length)
    rng = np.random.default_rng(feature.seed)
    stands = palettes.draw_colour(rng, ("concrete", "asphalt", "pale", "brown", "tan")[int(rng.integers(5))])
    on_stands = radius > 0.60
    canvas.cover(pixels[on_stands], stands)
    tiers = 0.16 * np.sin(2 * math.pi * (radius - 0.6) * half_width / 11)
    aisles = np.where(np.abs(np.mod(turn, math.pi / 14) - math.pi / 28) < 0.02, -0.2, 0.0)
    cosine, sine = math.cos(feature.angle), math.sin(feature.angle)
    away_x, away_y = canvas.light.away_xy
    facing = np.cos(turn) * (away_x * cosine + away_y * sine) + np.sin(turn) * (away_y * cosine - away_x * sine)
    shade = 1 + tiers + aisles + 0.22 * facing
    canvas.shade(pixels[on_stands], np.clip(shade, 0.5, 1.5)[on_stands].astype(np.float32))
    canvas.shade(pixels[radius > 0.95], np.full(int((radius > 0.95).sum()), 1.2, np.float32))
    on_pitch = ~on_stands
    stripes = 0.12 * np.sign(np.sin(2 * math.pi * along / 14))
    deep_shade = np.where((radius > 0.47) & (facing < -0.3), 0.7, 1.0)
    canvas.shade(pixels[on_pitch], ((1 + stripes) * deep_shade)[on_pitch].astype(np.float32))
    lines = _pitch_lines(along, across, (half_length * 0.46, half_width * 0.40))
    canvas.cover(pixels[on_pitch & lines], WHITE, 0.6)
    canvas.cover(pixels[(radius > 0.565) & on_pitch], (120, 78, 62), 0.6)


def _pitch_lines(along: Floats, across: Floats, half_size_m: tuple[float, float]) -> NDArray[np.bool_]:
    length, width = half_size_m
    inside = (np.abs(along) < length + 1) & (np.abs(across) < width + 1)
    border = (np.abs(np.abs(along) - length) < 1.2) | (np.abs(np.abs(across) - width) < 1.2)
    circle = np.abs(np.hypot(along, across) - 10) < 1.2
    return inside & (border | (np.abs(along) < 1.2) | circle)


def _harbour(canvas: Canvas, pixels: Pixels, frame: tuple[Floats, Floats], feature: Feature) -> None:
    """A quay with sheds and stacked boxes on the land side, then a basin with piers and boats along them."""
    along, across = frame
    depth, _ = feature.size_m
    spacing, pier_width, quay_share = feature.texture
    from_land = along + depth / 2
    quay = depth * quay_share
    on_pier = (np.mod(across, spacing) < pier_width) & (from_land < depth * 0.9)
    basin = (from_land > quay) & ~on_pier
    canvas.cover(pixels[basin], feature.second_colour)
    canvas.shade(pixels, np.where(basin, 1.0, 0.95 + 0.1 * cell_values(_cells(along, 12), _cells(across, 12), 3)))
    shadow = basin & (np.mod(across, spacing) < pier_width + 2.5)
    canvas.shade(pixels[shadow], np.full(int(shadow.sum()), 0.6, np.float32))
    _boats(canvas, pixels, (from_land - quay, np.mod(across, spacing) - pier_width, across), feature)
    _quay_cargo(canvas, pixels[from_land < quay - 8], (along, across, from_land < quay - 8), feature.seed)


def _boats(canvas: Canvas, pixels: Pixels, frame: tuple[Floats, Floats, Floats], feature: Feature) -> None:
    """Boats of 12-17 m by 5 m moored at right angles to both sides of the piers."""
    out, beside, across = frame
    spacing, pier_width, _ = feature.texture
    water_width = spacing - pier_width
    pitch = 7.5
    from_pier = np.minimum(beside, water_width - beside)
    side = (beside > water_width / 2).astype(np.int64)
    berth = 2 * _cells(across, spacing) + side
    chance = cell_values(_cells(out, pitch), berth, feature.seed)
    hull = (np.mod(out, pitch) < 4.6) & (from_pier > 1) & (from_pier < 9 + 7 * chance) & (beside > 0)
    reach = feature.size_m[0] * (0.9 - feature.texture[2])
    moored = hull & (out > 8) & (out < reach - 8) & (chance < 0.8)
    canvas.cover(pixels[moored & (chance < 0.6)], WHITE, 0.85)
    canvas.cover(pixels[moored & (chance >= 0.6)], (104, 84, 70), 0.85)


def _quay_cargo(canvas: Canvas, pixels: Pixels, frame: tuple[Floats, Floats, NDArray[np.bool_]], seed: int) -> None:
    """Rows of containers, each of its own colour from the shared palettes."""
    along, across, chosen = frame
    along, across = along[chosen], across[chosen]
    value = cell_values(_cells(along, 6.5), _cells(across, 14), seed + 1)
    stacked = (np.mod(along, 6.5) < 4.8) & (np.mod(across, 14) < 12) & (value > 0.35)
    colours = np.array(list(palettes.PALETTE_RGB.values()), np.float32)
    choice = (value * 1000).astype(np.int64) % len(colours)
    canvas.rgb_NC[pixels[stacked]] = colours[choice[stacked]]
