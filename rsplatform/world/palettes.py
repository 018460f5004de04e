"""Which colours land can take: class names in, colours drawn per instance out; no texture, no shape.

Colour must not tell the classes apart, because a nearest-colour rule would then pass for a vision-language
model. So there are eight palettes and every class draws each of its instances from several of them; each
palette is shared by at least three classes. What tells classes apart is texture, shape and size.
"""

import numpy as np

CLASS_NAMES = ("background", "field", "water", "road", "building", "runway", "stadium", "harbour", "forest")
BACKGROUND, FIELD, WATER, ROAD, BUILDING, RUNWAY, STADIUM, HARBOUR, FOREST = range(9)

PALETTE_RGB = {
    "asphalt": (104, 105, 107),
    "concrete": (158, 155, 149),
    "pale": (188, 180, 164),
    "tan": (164, 142, 108),
    "brown": (122, 96, 74),
    "green": (100, 122, 72),
    "dark_green": (62, 82, 56),
    "dark_wet": (56, 66, 66),
}

# A palette named twice is twice as likely: woods are more often green than tan.
CLASS_PALETTES = {
    BACKGROUND: ("green", "green", "tan", "brown", "asphalt", "dark_green", "pale", "dark_wet", "concrete"),
    FIELD: ("green", "green", "tan", "tan", "brown", "dark_green", "pale", "dark_wet", "asphalt"),
    WATER: ("dark_wet", "dark_wet", "dark_green", "dark_green", "brown", "asphalt", "green", "tan"),
    ROAD: ("asphalt", "asphalt", "concrete", "tan", "brown", "pale", "dark_wet"),
    BUILDING: ("asphalt", "concrete", "brown", "brown", "tan", "pale", "dark_wet", "green"),
    RUNWAY: ("asphalt", "asphalt", "concrete", "dark_wet", "tan", "brown", "green"),
    STADIUM: ("green", "green", "tan", "brown", "dark_green", "asphalt"),
    HARBOUR: ("concrete", "asphalt", "tan", "brown", "pale", "dark_wet"),
    FOREST: ("dark_green", "dark_green", "green", "green", "brown", "dark_wet", "tan", "asphalt"),
}


def draw_palette(rng: np.random.Generator, class_id: int) -> str:
    """The name of one of the palettes of a class, all equally likely."""
    choices = CLASS_PALETTES[class_id]
    return choices[int(rng.integers(len(choices)))]


def draw_colour(rng: np.random.Generator, palette: str) -> tuple[float, float, float]:
    """One instance's RGB (0-255): the palette's colour, lighter or darker, with a slight own hue."""
    shift = rng.normal(0, (9, 3, 3, 3))
    red, green, blue = np.clip(np.array(PALETTE_RGB[palette]) + shift[0] + shift[1:], 20, 235).tolist()
    return red, green, blue


def draw_class_colour(rng: np.random.Generator, class_id: int) -> tuple[float, float, float]:
    """One instance's RGB (0-255) for a class."""
    return draw_colour(rng, draw_palette(rng, class_id))
