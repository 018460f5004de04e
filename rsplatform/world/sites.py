"""Places the large single things on a land: water, harbours, runways, stadiums. They claim their ground first.

Comes in: a `Draft`. Goes out: features and claims added to it. Sizes are true metres. Ours, from no source.
"""

import math

import numpy as np
import shapely
from numpy.typing import NDArray
from shapely.geometry.base import BaseGeometry

from rsplatform.world import palettes
from rsplatform.world.land import Draft, Feature, ellipse, rectangle

STADIUMS_PER_KM2 = 0.42
RUNWAYS_PER_KM2 = 0.3
HARBOURS_PER_KM_SHORE = 1.0
MOST_HARBOURS = 3
LAKES_PER_KM2 = 0.25
TRIES_PER_SITE = 30


def _count(draft: Draft, expected: float) -> int:
    """A whole number around `expected`: its fraction is the chance of one more."""
    return int(math.floor(expected) + (draft.rng.random() < expected % 1))


def _area_km2(draft: Draft) -> float:
    return (2 * draft.half_m / 1000) ** 2


def _water(draft: Draft, kind: str, polygon: BaseGeometry, colour: tuple[float, float, float]) -> Feature:
    return Feature(
        palettes.WATER,
        kind,
        polygon,
        colour,
        name=draft.name(kind),
        angle=draft.number(0, math.pi),
        texture=(draft.number(18, 36), draft.number(0.008, 0.02), 0.0),
        seed=draft.seed(),
    )


def _wavy_line(draft: Draft, offset_m: float) -> NDArray[np.float64]:
    """(points, 2): a shoreline along the first axis, waving by up to about 100 m."""
    along = np.arange(-2.2 * draft.half_m, 2.2 * draft.half_m, 15.0)
    across = np.full_like(along, offset_m)
    for period_m, height_m in ((1900, 60), (700, 25), (260, 8)):
        wave = 2 * math.pi * along / draft.number(0.8 * period_m, 1.2 * period_m)
        across += height_m * np.sin(wave + draft.number(0, 2 * math.pi))
    return np.stack([along, across], axis=1)


def _turn(points_P2: NDArray[np.float64], angle: float) -> NDArray[np.float64]:
    cosine, sine = math.cos(angle), math.sin(angle)
    return points_P2 @ np.array([[cosine, sine], [-sine, cosine]])


def place_large_water(draft: Draft) -> None:
    """A sea at one side or a river through the land, then harbours along its shore."""
    angle = draft.number(0, 2 * math.pi)
    if draft.rng.random() < 0.55:
        shore = _wavy_line(draft, draft.number(0.35, 0.62) * draft.half_m)
        far = np.array([[shore[-1, 0], 4 * draft.half_m], [shore[0, 0], 4 * draft.half_m]])
        outline, kind, dug = np.concatenate([shore, far]), "sea", 0.3
    else:
        shore = _wavy_line(draft, draft.number(-0.4, 0.4) * draft.half_m)
        other = shore + np.array([0, draft.number(110, 240)])
        outline, kind, dug = np.concatenate([shore, other[::-1]]), "river", 0.85
    polygon = shapely.Polygon(_turn(outline, angle)).buffer(0)
    window = shapely.box(-draft.half_m, -draft.half_m, draft.half_m, draft.half_m)
    polygon = polygon.intersection(window)
    colour = palettes.draw_class_colour(draft.rng, palettes.WATER)
    harbours = _harbours(draft, _turn(shore, angle), dug, colour)
    ground = shapely.union_all([harbour.geometry for harbour in harbours])
    for part in shapely.get_parts(polygon.difference(ground)):
        draft.features.append(_water(draft, kind, part, colour))
    draft.features.extend(harbours)
    draft.claims += [polygon.buffer(25), *(harbour.geometry.buffer(15) for harbour in harbours)]


def _harbours(
    draft: Draft, shore_P2: NDArray[np.float64], dug: float, water_colour: tuple[float, float, float]
) -> list[Feature]:
    """Harbours on a shore whose water lies to the left of the way along it; `dug` is the share behind the shore."""
    inside = np.abs(shore_P2).max(axis=1) < 0.97 * draft.half_m
    points = shore_P2[inside]
    harbours: list[Feature] = []
    if len(points) < 12:
        return harbours
    wanted = min(MOST_HARBOURS, max(1, round(len(points) * 15 / 1000 * HARBOURS_PER_KM_SHORE)))
    for _ in range(TRIES_PER_SITE):
        if len(harbours) >= wanted:
            break
        at = int(draft.rng.integers(5, len(points) - 5))
        step = points[at + 5] - points[at - 5]
        to_water = math.atan2(step[1], step[0]) + math.pi / 2
        depth, width = draft.number(220, 330), draft.number(240, 460)
        shift = depth * (0.5 - dug)
        centre = (points[at][0] + math.cos(to_water) * shift, points[at][1] + math.sin(to_water) * shift)
        shape = rectangle(centre, (depth, width), to_water)
        if any(shape.distance(other.geometry) < 80 for other in harbours):
            continue
        harbour = Feature(
            palettes.HARBOUR,
            "harbour",
            shape,
            palettes.draw_class_colour(draft.rng, palettes.HARBOUR),
            name=draft.name("harbour"),
            angle=to_water,
            centre_xy=centre,
            size_m=(depth, width),
            texture=(draft.number(38, 52), draft.number(7, 10), draft.number(0.2, 0.3)),
            second_colour=water_colour,
            seed=draft.seed(),
        )
        harbours.append(harbour)
    return harbours


def open_ground(draft: Draft, shape: BaseGeometry, bush_density: float) -> Feature:
    """Grass, scrub or bare ground: background, so it is painted but is no landmark."""
    colour = palettes.draw_class_colour(draft.rng, palettes.BACKGROUND)
    texture = (bush_density, 0.0, 0.0)
    return Feature(palettes.BACKGROUND, "open", shape, colour, texture=texture, seed=draft.seed())


def place_runways(draft: Draft) -> None:
    """Runways of 1200-2200 m, often cut by the scene's edge, each in a strip of mown grass."""
    for _ in range(max(1, _count(draft, RUNWAYS_PER_KM2 * _area_km2(draft)))):
        for _ in range(TRIES_PER_SITE):
            centre = (draft.number(-1, 1) * draft.half_m * 0.8, draft.number(-1, 1) * draft.half_m * 0.8)
            size, angle = (draft.number(1200, 2200), draft.number(42, 60)), draft.number(0, math.pi)
            strip = rectangle(centre, (size[0] + 160, size[1] + 150), angle)
            if draft.is_free(strip):
                draft.features.append(open_ground(draft, strip, 0.03))
                _add_runway(draft, centre, size, angle)
                draft.claims.append(strip)
                break


def _add_runway(draft: Draft, centre: tuple[float, float], size: tuple[float, float], angle: float) -> None:
    draft.features.append(
        Feature(
            palettes.RUNWAY,
            "runway",
            rectangle(centre, size, angle),
            palettes.draw_class_colour(draft.rng, palettes.RUNWAY),
            name=draft.name("runway"),
            angle=angle,
            centre_xy=centre,
            size_m=size,
            seed=draft.seed(),
        )
    )


def place_stadiums(draft: Draft) -> None:
    """Ovals of 180-260 m with their ring of stands."""
    for _ in range(max(1, _count(draft, STADIUMS_PER_KM2 * _area_km2(draft)))):
        for _ in range(TRIES_PER_SITE):
            centre = (draft.number(-1, 1) * draft.half_m * 0.9, draft.number(-1, 1) * draft.half_m * 0.9)
            length, angle = draft.number(190, 260), draft.number(0, math.pi)
            size = (length, length * draft.number(0.74, 0.86))
            shape = ellipse(centre, size, angle)
            if draft.is_free(shape.buffer(30)):
                _add_stadium(draft, shape, centre, size, angle)
                draft.claims.append(shape.buffer(25))
                break


def _add_stadium(
    draft: Draft, shape: BaseGeometry, centre: tuple[float, float], size: tuple[float, float], angle: float
) -> None:
    draft.features.append(
        Feature(
            palettes.STADIUM,
            "stadium",
            shape,
            palettes.draw_class_colour(draft.rng, palettes.STADIUM),
            name=draft.name("stadium"),
            angle=angle,
            centre_xy=centre,
            size_m=size,
            height_m=draft.number(18, 30),
            seed=draft.seed(),
        )
    )


def place_lakes(draft: Draft) -> None:
    """Lakes of 150-500 m with a wavy shore."""
    for _ in range(_count(draft, LAKES_PER_KM2 * _area_km2(draft))):
        for _ in range(TRIES_PER_SITE):
            centre = np.array([draft.number(-1, 1), draft.number(-1, 1)]) * draft.half_m * 0.9
            radius = draft.number(80, 240)
            turn = np.linspace(0, 2 * math.pi, 60, endpoint=False)
            reach = radius * (
                1 + 0.2 * np.sin(2 * turn + draft.number(0, 6)) + 0.1 * np.sin(5 * turn + draft.number(0, 6))
            )
            shape = shapely.Polygon(np.stack([np.cos(turn) * reach, np.sin(turn) * reach], 1) + centre)
            if draft.is_free(shape.buffer(20)):
                colour = palettes.draw_class_colour(draft.rng, palettes.WATER)
                draft.features.append(_water(draft, "lake", shape, colour))
                draft.claims.append(shape.buffer(12))
                break
