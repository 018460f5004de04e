"""Divides the rest of a land by roads into blocks of one use each: fields, towns, forests, open ground.

Comes in: a `Draft` whose large things have claimed their ground. Goes out: features added to it. Blocks are cut in
a frame that is turned and gently bent, so that no road runs along the pixels. Ours, from no source.
"""

import math

import numpy as np
import shapely
from numpy.typing import NDArray
from shapely.geometry.base import BaseGeometry

from rsplatform.world import palettes
from rsplatform.world.land import Draft, Feature, polygons_of
from rsplatform.world.sites import open_ground

Box = tuple[float, float, float, float]
LARGEST_BLOCK_M = 560.0
USE_SHARES = {"fields": 0.40, "town": 0.28, "forest": 0.20, "open": 0.12}


class Frame:
    """The turned and bent frame of a land's roads: `to_land` maps its coordinates to local metres."""

    def __init__(self, draft: Draft):
        self.angle = draft.number(0, math.pi / 2)
        self.waves = [(draft.number(900, 1700), draft.number(0, 6.28), draft.number(12, 30)) for _ in range(4)]

    def to_land(self, points_P2: NDArray[np.float64]) -> NDArray[np.float64]:
        """(P, 2) of this frame to (P, 2) local metres."""
        along, across = points_P2[:, 0], points_P2[:, 1]
        bent = np.array(points_P2, dtype=np.float64)
        for number, (period_m, phase, height_m) in enumerate(self.waves):
            source, target = (along, 1) if number % 2 else (across, 0)
            bent[:, target] += height_m * np.sin(2 * math.pi * source / period_m + phase)
        cosine, sine = math.cos(self.angle), math.sin(self.angle)
        return np.stack([bent[:, 0] * cosine - bent[:, 1] * sine, bent[:, 0] * sine + bent[:, 1] * cosine], axis=1)

    def shape(self, geometry: BaseGeometry) -> BaseGeometry:
        """A geometry of this frame, bent, in local metres."""
        return shapely.simplify(shapely.transform(shapely.segmentize(geometry, 40.0), self.to_land), 0.5)


def split_box(draft: Draft, box: Box, largest_m: float, cuts: list[tuple[float, float, float, float]]) -> list[Box]:
    """Halves a box, unevenly, until no side exceeds about `largest_m`; each cut (a segment) is added to `cuts`."""
    left, bottom, right, top = box
    width, height = right - left, top - bottom
    if max(width, height) <= largest_m * draft.number(0.75, 1.1):
        return [box]
    share = draft.number(0.36, 0.64)
    if width >= height:
        at = left + share * width
        cuts.append((at, bottom, at, top))
        halves = ((left, bottom, at, top), (at, bottom, right, top))
    else:
        at = bottom + share * height
        cuts.append((left, at, right, at))
        halves = ((left, bottom, right, at), (left, at, right, top))
    return [part for half in halves for part in split_box(draft, half, largest_m, cuts)]


def lay_blocks(draft: Draft) -> None:
    """Roads between blocks, then each block by its use."""
    frame, sites = Frame(draft), list(draft.features)
    draft.features.clear()
    reach = 1.5 * draft.half_m
    cuts: list[Box] = []
    boxes = split_box(draft, (-reach, -reach, reach, reach), LARGEST_BLOCK_M, cuts)
    claimed = draft.claimed()
    shapely.prepare(claimed)
    roads = [_road(draft, frame.shape(shapely.LineString([cut[:2], cut[2:]])), draft.number(9, 14)) for cut in cuts]
    uses = list(USE_SHARES)
    window = shapely.box(-draft.half_m, -draft.half_m, draft.half_m, draft.half_m)
    for box in boxes:
        use = uses[int(draft.rng.choice(len(uses), p=list(USE_SHARES.values())))]
        if frame.shape(shapely.box(*box)).intersects(window):
            _fill_block(draft, frame, box, use)
    draft.features[:] = sites + _outside(draft.features + roads, claimed, window)


def _outside(features: list[Feature], claimed: BaseGeometry, window: BaseGeometry) -> list[Feature]:
    """The features inside the window, less claimed ground; cut houses go altogether."""
    kept: list[Feature] = []
    for feature in features:
        if not feature.geometry.intersects(window):
            continue
        elif not claimed.intersects(feature.geometry):
            kept.append(feature)
        elif feature.class_id != palettes.BUILDING:
            rest = feature.geometry.difference(claimed)
            kept += [_with_geometry(feature, part) for part in shapely.get_parts(rest) if _is_large(part)]
    return kept


def _with_geometry(feature: Feature, geometry: BaseGeometry) -> Feature:
    return Feature(**{**feature.__dict__, "geometry": geometry})


def _is_large(part: BaseGeometry) -> bool:
    return part.area > 400 if part.geom_type == "Polygon" else part.length > 30


def _road(draft: Draft, line: BaseGeometry, width_m: float) -> Feature:
    colour = palettes.draw_class_colour(draft.rng, palettes.ROAD)
    name = draft.name("road", 0.7)
    return Feature(palettes.ROAD, "road", line, colour, name=name, width_m=width_m, seed=draft.seed())


def _fill_block(draft: Draft, frame: Frame, box: Box, use: str) -> None:
    left, bottom, right, top = box
    inner = (left + 9, bottom + 9, right - 9, top - 9)
    if use == "fields":
        _fields(draft, frame, inner)
    elif use == "town":
        _town(draft, frame, inner)
    elif use == "forest":
        _forest(draft, frame, inner)
    else:
        draft.features.append(open_ground(draft, frame.shape(shapely.box(*inner)), draft.number(0, 0.35)))


def _fields(draft: Draft, frame: Frame, box: Box) -> None:
    """Parcels of 80-300 m with rows along one of their sides."""
    for left, bottom, right, top in split_box(draft, box, draft.number(150, 300), []):
        margin = draft.number(2, 6)
        shape = frame.shape(shapely.box(left + margin, bottom + margin, right - margin, top - margin))
        turn = draft.number(-0.08, 0.08) + (math.pi / 2 if draft.rng.random() < 0.5 else 0.0)
        draft.features.append(
            Feature(
                palettes.FIELD,
                "farmland",
                shape,
                palettes.draw_class_colour(draft.rng, palettes.FIELD),
                name=draft.name("farmland", 0.1),
                angle=frame.angle + turn,
                texture=(draft.number(8.5, 14), draft.number(0.15, 0.3), float(draft.rng.random() < 0.15)),
                seed=draft.seed(),
            )
        )


def _forest(draft: Draft, frame: Frame, box: Box) -> None:
    """One wood with a rough edge; its crowns are one kind of tree."""
    shape = frame.shape(shapely.segmentize(shapely.box(*box).buffer(-8), 30.0))
    points = shapely.get_coordinates(shape)
    points += draft.rng.normal(0, 5, points.shape)
    ragged = shapely.Polygon(points).buffer(0)
    for part in polygons_of(ragged, 2000.0):
        draft.features.append(
            Feature(
                palettes.FOREST,
                "forest",
                part,
                palettes.draw_class_colour(draft.rng, palettes.FOREST),
                name=draft.name("forest", 0.6),
                height_m=draft.number(10, 20),
                texture=(draft.number(0.2, 0.45), draft.number(0.0, 1.0), 0.0),
                seed=draft.seed(),
            )
        )


def _town(draft: Draft, frame: Frame, box: Box) -> None:
    """Streets in a grid with buildings of one size in rows between them."""
    draft.features.append(open_ground(draft, frame.shape(shapely.box(*box)), draft.number(0, 0.25)))
    large = draft.rng.random() < 0.5
    length, depth = (
        (draft.number(36, 60), draft.number(24, 42)) if large else (draft.number(18, 30), draft.number(14, 20))
    )
    gap = draft.number(6, 10) if large else draft.number(3, 5)
    left, bottom, right, top = box
    street_step = 2 * (depth + gap) + 11
    palette_names = [palettes.draw_palette(draft.rng, palettes.BUILDING) for _ in range(3)]
    centres: list[tuple[float, float]] = []
    for row in range(int((top - bottom) // street_step)):
        low = bottom + row * street_step
        street = shapely.LineString([(left - 9, low), (right + 9, low)])
        draft.features.append(_road(draft, frame.shape(street), draft.number(7.5, 9.5)))
        first_line = low + 6 + gap / 2 + depth / 2
        for line in (first_line, first_line + depth + gap - 1.5):
            steps = range(int((right - left - gap) // (length + gap)))
            along = [left + gap + length / 2 + step * (length + gap) for step in steps]
            centres += [(at, line) for at in along if draft.rng.random() < 0.92]
    _buildings(draft, frame, np.array(centres).reshape(-1, 1, 2), (length, depth), palette_names)


def _buildings(
    draft: Draft, frame: Frame, centres_B12: NDArray[np.float64], size: tuple[float, float], palette_names: list[str]
) -> None:
    """Buildings at given centres, each a little smaller than `size`; all corners are bent at once, for speed."""
    sizes_B2 = np.array(size) * draft.rng.uniform(0.85, 1.0, (len(centres_B12), 2))
    corners_42 = np.array([[-0.5, -0.5], [0.5, -0.5], [0.5, 0.5], [-0.5, 0.5]])
    corners_B42 = centres_B12 + corners_42 * sizes_B2[:, None]
    corners_B42 = frame.to_land(corners_B42.reshape(-1, 2)).reshape(-1, 4, 2)
    large = size[0] > 30
    kind = "warehouse" if large else "house"
    polygons = np.asarray(shapely.polygons(corners_B42))
    for points_42, polygon, own_size in zip(corners_B42, polygons, sizes_B2.tolist(), strict=True):
        middle, edge = points_42.mean(axis=0), points_42[1] - points_42[0]
        draft.features.append(
            Feature(
                palettes.BUILDING,
                kind,
                polygon,
                palettes.draw_colour(draft.rng, palette_names[int(draft.rng.integers(3))]),
                name=draft.name(kind, 0.5 if large else 0.02),
                angle=math.atan2(edge[1], edge[0]),
                centre_xy=(float(middle[0]), float(middle[1])),
                size_m=(own_size[0], own_size[1]),
                height_m=draft.number(6, 14) if large else draft.number(4, 9),
                texture=(float(draft.rng.integers(3)), draft.number(0.12, 0.28), 0.0),
                seed=draft.seed(),
            )
        )
