"""Pictures not taken from above, as a web crawl is full of: a random generator and a size in, RGB and words out.

Their colours come from the land's own palettes (and a sky), so that colour does not give them away either.
Letters: H, W rows and columns, C channels.
"""

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw

from rsplatform.world.noise import Floats, fractal_noise, nearest_crowns
from rsplatform.world.palettes import PALETTE_RGB, draw_colour

Rgb = tuple[int, int, int]
Size = tuple[int, int]  # width, height
Painter = Callable[[np.random.Generator, Size], tuple[Image.Image, str]]


def any_colour(rng: np.random.Generator) -> Rgb:
    """A colour of any palette of the land."""
    names = list(PALETTE_RGB)
    red, green, blue = draw_colour(rng, names[int(rng.integers(len(names)))])
    return int(red), int(green), int(blue)


def draw_ground_picture(rng: np.random.Generator, size: Size) -> tuple[np.ndarray, str]:
    """RGB (H, W, 3) uint8 of a street, a landscape to the horizon, a tree, a surface or an object, and what it is."""
    painters: tuple[Painter, ...] = (
        _horizon,
        _horizon,
        _facades,
        _facades,
        _tree,
        _surface,
        _surface,
        _still_life,
    )
    picture, words = painters[int(rng.integers(len(painters)))](rng, size)
    pixels_HWC = np.asarray(picture, np.float32)
    scale = _mottle(rng, size, {40: 0.06, 9: 0.05, 2.5: 0.06})
    lit = pixels_HWC * (1 + scale[..., None]) * rng.uniform(0.8, 1.15) + rng.normal(0, 3, pixels_HWC.shape)
    return np.clip(lit, 0, 255).astype(np.uint8), words


def _mottle(rng: np.random.Generator, size: Size, weights_by_period_px: dict[float, float]) -> Floats:
    columns, rows = (np.arange(side, dtype=np.float32) for side in size)
    return fractal_noise(columns, rows, weights_by_period_px, int(rng.integers(1 << 30)))


def _sky(rng: np.random.Generator, size: Size) -> tuple[Floats, str]:
    _, height = size
    top, low, word = (
        ((96, 140, 200), (190, 208, 226), "a blue sky"),
        ((150, 156, 164), (196, 198, 200), "an overcast sky"),
        ((90, 90, 130), (236, 170, 120), "a sunset"),
    )[int(rng.integers(3))]
    share = np.linspace(0, 1, height, dtype=np.float32)[:, None, None]
    sky = np.array(top, np.float32) * (1 - share) + np.array(low, np.float32) * share
    cloud = _mottle(rng, size, {70: 0.7, 25: 0.4})
    return sky + (np.clip(cloud, 0, 1) * 70)[..., None], word


def _picture(pixels_HWC: Floats) -> Image.Image:
    return Image.fromarray(np.clip(pixels_HWC, 0, 255).astype(np.uint8))


def _horizon(rng: np.random.Generator, size: Size) -> tuple[Image.Image, str]:
    """Land in perspective: rows or a road run together at the horizon; trees and houses stand on it."""
    width, height = size
    pixels, sky_word = _sky(rng, size)
    horizon = int(height * rng.uniform(0.25, 0.55))
    depth = 60.0 / (np.arange(height - horizon, dtype=np.float32)[:, None] + 1.5)
    side = (np.arange(width, dtype=np.float32)[None] - width * rng.uniform(0.3, 0.7)) * depth / 40
    colour, second = np.array(any_colour(rng), np.float32), np.array(any_colour(rng), np.float32)
    rows = rng.random() < 0.5
    texture = np.sin(side * 6) if rows else np.sin(side * 3 + 5 * np.sin(depth * 9)) * np.cos(depth * 40)
    pixels[horizon:] = colour * (1 + 0.2 * texture)[..., None]
    if rng.random() < 0.5:
        pixels[horizon:][np.abs(side) < 1.2] = second
    picture = _picture(pixels)
    draw = ImageDraw.Draw(picture)
    for _ in range(int(rng.integers(3, 12))):
        _stand(rng, draw, width, horizon)
    thing = "crop rows" if rows else "a meadow"
    return picture, f"{thing} under {sky_word}, seen from the ground"


def _stand(rng: np.random.Generator, draw: ImageDraw.ImageDraw, width: int, horizon: int) -> None:
    """One tree or house on the horizon."""
    left, size = rng.uniform(0, width), rng.uniform(8, 34)
    if rng.random() < 0.65:
        draw.rectangle((left - 1.5, horizon - size * 0.5, left + 1.5, horizon + 4), fill=(70, 54, 40))
        draw.ellipse(
            (left - size / 2, horizon - size * 1.3, left + size / 2, horizon - size * 0.3),
            fill=any_colour(rng),
        )
    else:
        draw.rectangle((left, horizon - size * 0.6, left + size, horizon + 5), fill=any_colour(rng))
        roof = [
            (left - 3, horizon - size * 0.6),
            (left + size + 3, horizon - size * 0.6),
            (left + size / 2, horizon - size),
        ]
        draw.polygon(roof, fill=any_colour(rng))


def _facades(rng: np.random.Generator, size: Size) -> tuple[Image.Image, str]:
    """House fronts with windows side by side, pavement and cars below."""
    width, height = size
    pixels, sky_word = _sky(rng, size)
    picture = _picture(pixels)
    draw = ImageDraw.Draw(picture)
    street, left = int(height * rng.uniform(0.72, 0.9)), 0.0
    while left < width:
        front, top = rng.uniform(40, 110), height * rng.uniform(0.02, 0.4)
        draw.rectangle((left, top, left + front, street), fill=any_colour(rng))
        step, pane = rng.uniform(13, 26), any_colour(rng)
        for x in np.arange(left + 5, left + front - 8, step):
            for y in np.arange(top + 6, street - 12, step * 1.2):
                draw.rectangle((x, y, x + step * 0.5, y + step * 0.7), fill=pane, outline=(210, 206, 198))
        left += front
    draw.rectangle((0, street, width, height), fill=any_colour(rng))
    for _ in range(int(rng.integers(0, 5))):
        x, long = rng.uniform(0, width), rng.uniform(18, 36)
        draw.rounded_rectangle((x, street - 4, x + long, street + 8), 4, fill=any_colour(rng))
        draw.ellipse((x + 3, street + 4, x + 10, street + 11), fill=(24, 24, 26))
    return picture, f"a street of old house fronts under {sky_word}"


def _tree(rng: np.random.Generator, size: Size) -> tuple[Image.Image, str]:
    """One tree, its trunk and its leaves."""
    width, height = size
    pixels, _ = _sky(rng, size)
    pixels[int(height * 0.8) :] = any_colour(rng)
    row, column = np.mgrid[:height, :width].astype(np.float32)
    middle = width * rng.uniform(0.35, 0.65)
    pixels[(np.abs(column - middle) < width * 0.04) & (row > height * 0.4) & (row < height * 0.9)] = (
        84,
        64,
        48,
    )
    inside = np.hypot((column - middle) / (width * 0.36), (row - height * 0.38) / (height * 0.33)) < 1
    to_x, to_y, value = nearest_crowns(
        column[inside], row[inside], float(rng.uniform(6, 13)), int(rng.integers(1 << 30))
    )
    leaves = np.array(any_colour(rng), np.float32) * (1.2 - 0.09 * np.hypot(to_x, to_y) + 0.3 * value)[:, None]
    pixels[inside] = leaves
    return _picture(pixels), "a single large tree in a park"


def _surface(rng: np.random.Generator, size: Size) -> tuple[Image.Image, str]:
    """A close look at bricks, gravel or cloth: texture without any scale to judge by."""
    width, height = size
    row, column = np.mgrid[:height, :width].astype(np.float32)
    base = np.array(any_colour(rng), np.float32)
    choice = int(rng.integers(3))
    if choice == 0:
        course = np.floor(row / 14)
        joint = (np.mod(row, 14) < 2) | (np.mod(column + 16 * np.mod(course, 2), 32) < 2)
        shade, words = np.where(joint, 1.35, 1.0), "a close-up of a brick wall"
    elif choice == 1:
        to_x, to_y, value = nearest_crowns(
            column.ravel(), row.ravel(), float(rng.uniform(8, 26)), int(rng.integers(1 << 30))
        )
        shade = (1.15 - 0.03 * np.hypot(to_x, to_y) + 0.5 * (value - 0.5)).reshape(height, width)
        words = "pebbles and gravel close up"
    else:
        step = rng.uniform(4, 9)
        shade = 1 + 0.15 * np.sin(6.28 * (row + column) / step) + 0.15 * np.sin(6.28 * (row - column) / step)
        words = "woven cloth in detail"
    fall = 1 - rng.uniform(0, 0.4) * row / height
    return _picture(base * (shade * fall)[..., None]), words


def _still_life(rng: np.random.Generator, size: Size) -> tuple[Image.Image, str]:
    """Cups and fruit on a table."""
    width, height = size
    picture = Image.new("RGB", size, any_colour(rng))
    draw = ImageDraw.Draw(picture)
    table = int(height * rng.uniform(0.5, 0.7))
    draw.rectangle((0, table, width, height), fill=any_colour(rng))
    for _ in range(int(rng.integers(2, 6))):
        x, y, across = rng.uniform(0, width), table + rng.uniform(-10, 40), rng.uniform(20, 60)
        draw.ellipse((x - across * 0.6, y - 4, x + across * 0.8, y + 8), fill=(40, 38, 36))
        draw.ellipse((x - across / 2, y - across, x + across / 2, y), fill=any_colour(rng))
        draw.ellipse((x - across / 4, y - across * 0.85, x, y - across * 0.6), fill=(232, 230, 224))
    return picture, "cups and fruit on a table"
