"""Lays out one land: a seed and an extent in, features in the order of painting out. No pixels, no CRS."""

import numpy as np

from rsplatform.world import palettes
from rsplatform.world.blocks import lay_blocks
from rsplatform.world.land import Draft, Feature
from rsplatform.world.sites import place_lakes, place_large_water, place_runways, place_stadiums

PAINT_ORDER = (
    palettes.BACKGROUND,
    palettes.FIELD,
    palettes.FOREST,
    palettes.WATER,
    palettes.ROAD,
    palettes.BUILDING,
    palettes.RUNWAY,
    palettes.HARBOUR,
    palettes.STADIUM,
)


def lay_out(seed: tuple[int, ...], half_m: float) -> list[Feature]:
    """A land of 2·half_m by 2·half_m metres around (0, 0), later features painted over earlier ones."""
    draft = Draft(np.random.default_rng(seed), half_m)
    place_large_water(draft)
    place_runways(draft)
    place_stadiums(draft)
    place_lakes(draft)
    lay_blocks(draft)
    return sorted(draft.features, key=lambda feature: PAINT_ORDER.index(feature.class_id))
