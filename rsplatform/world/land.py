"""The things on the land: `Feature` (one mapped thing) and `Draft` (the land while it is laid out).

Coordinates are local metres around the place's centre, x east, y north, so that one land can be seen by several
scenes. No pixels here.
"""

from dataclasses import dataclass, field

import numpy as np
import shapely
from shapely import affinity
from shapely.geometry.base import BaseGeometry

from rsplatform.world.names import draw_name


@dataclass(frozen=True)
class Feature:
    """One thing on the land. `geometry` is a polygon, or a line with `width_m` for roads."""

    class_id: int
    kind: str
    geometry: BaseGeometry
    colour: tuple[float, float, float]
    name: str = ""
    angle: float = 0.0  # radians from east, of its long axis, its rows or the way from land to water
    centre_xy: tuple[float, float] = (0.0, 0.0)
    size_m: tuple[float, float] = (0.0, 0.0)  # along `angle`, across it
    height_m: float = 0.0
    width_m: float = 0.0
    texture: tuple[float, float, float] = (0.0, 0.0, 0.0)  # meaning depends on the class, see textures.py
    second_colour: tuple[float, float, float] = (0.0, 0.0, 0.0)  # a harbour's water
    seed: int = 0

    @property
    def footprint(self) -> BaseGeometry:
        """The ground that it covers: lines are widened."""
        return self.geometry.buffer(self.width_m / 2, cap_style="flat") if self.width_m else self.geometry


@dataclass
class Draft:
    """A land in the making: features in the order of painting, and the ground that later things must leave alone."""

    rng: np.random.Generator
    half_m: float
    features: list[Feature] = field(default_factory=list)
    claims: list[BaseGeometry] = field(default_factory=list)

    def number(self, low: float, high: float) -> float:
        """A uniform random number."""
        return float(self.rng.uniform(low, high))

    def name(self, kind: str, chance: float = 1.0) -> str:
        """An invented name, or none: most fields and houses have none."""
        return draw_name(self.rng, kind) if self.rng.random() < chance else ""

    def seed(self) -> int:
        """A seed for one feature's own texture."""
        return int(self.rng.integers(1, 1 << 30))

    def is_free(self, polygon: BaseGeometry) -> bool:
        """True if no claimed ground is touched."""
        return not any(polygon.intersects(claim) for claim in self.claims)

    def claimed(self) -> BaseGeometry:
        """All claimed ground as one geometry."""
        return shapely.union_all(self.claims)


def rectangle(centre_xy: tuple[float, float], size_m: tuple[float, float], angle: float) -> BaseGeometry:
    """A rectangle, `size_m` along and across `angle`."""
    length, width = size_m
    box = shapely.box(-length / 2, -width / 2, length / 2, width / 2)
    return affinity.translate(affinity.rotate(box, angle, origin=(0, 0), use_radians=True), *centre_xy)


def ellipse(centre_xy: tuple[float, float], size_m: tuple[float, float], angle: float) -> BaseGeometry:
    """An ellipse, `size_m` its two diameters, the first along `angle`."""
    circle = affinity.scale(shapely.Point(0, 0).buffer(0.5, quad_segs=16), *size_m, origin=(0, 0))
    return affinity.translate(affinity.rotate(circle, angle, origin=(0, 0), use_radians=True), *centre_xy)


def polygons_of(geometry: BaseGeometry, minimum_area_m2: float) -> list[BaseGeometry]:
    """The polygons of a geometry that are not slivers."""
    parts = shapely.get_parts(geometry)
    return [part for part in parts if part.geom_type == "Polygon" and part.area >= minimum_area_m2]
