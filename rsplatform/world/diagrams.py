"""Charts, maps and flow charts: what a filter must not take for a picture of land. A size in, RGB and words out."""

import math

import numpy as np
from PIL import Image, ImageDraw

from rsplatform.world.ground_pictures import Size, any_colour
from rsplatform.world.names import draw_name

INK = (40, 42, 46)


def draw_diagram(rng: np.random.Generator, size: Size) -> tuple[np.ndarray, str]:
    """RGB (H, W, 3) uint8 of a chart, a drawn map or a flow chart, and what it is."""
    painters = (_bars, _curves, _map, _map, _flow_chart)
    paper = (250, 250, 248) if rng.random() < 0.5 else any_colour(rng)
    picture = Image.new("RGB", size, paper)
    words = painters[int(rng.integers(len(painters)))](rng, ImageDraw.Draw(picture), size)
    pixels_HWC = np.asarray(picture, np.float32) + rng.normal(0, rng.uniform(0, 6), (size[1], size[0], 1))
    return np.clip(pixels_HWC, 0, 255).astype(np.uint8), words


def _bars(rng: np.random.Generator, draw: ImageDraw.ImageDraw, size: Size) -> str:
    width, height = size
    count = int(rng.integers(4, 12))
    step = (width - 24) / count
    for number in range(count):
        left, top = 16 + number * step, height - 14 - rng.uniform(0.1, 0.9) * (height - 34)
        draw.rectangle((left + 1, top, left + step * 0.7, height - 14), fill=any_colour(rng))
    draw.line([(14, 10), (14, height - 14), (width - 6, height - 14)], fill=INK, width=2)
    draw.text((20, 3), draw_name(rng, "farmland"), fill=INK)
    return "a bar chart of yields by year"


def _curves(rng: np.random.Generator, draw: ImageDraw.ImageDraw, size: Size) -> str:
    width, height = size
    for level in np.linspace(14, height - 14, 6):
        draw.line([(12, level), (width - 6, level)], fill=(190, 190, 192))
    for _ in range(int(rng.integers(1, 5))):
        steps = np.cumsum(rng.normal(0, 8, 24)) + height / 2
        points = [(14 + number * (width - 24) / 23, float(value)) for number, value in enumerate(steps)]
        draw.line(points, fill=any_colour(rng), width=3)
    return "a line graph of measurements over time"


def _map(rng: np.random.Generator, draw: ImageDraw.ImageDraw, size: Size) -> str:
    """Flat areas, thick outlined roads and names, as a printed map has."""
    width, height = size
    for _ in range(int(rng.integers(5, 14))):
        x, y, reach = rng.uniform(0, width), rng.uniform(0, height), rng.uniform(20, 90)
        turns = np.sort(rng.uniform(0, 2 * math.pi, 9))
        outline = [(x + reach * math.cos(turn), y + reach * math.sin(turn)) for turn in turns]
        draw.polygon(outline, fill=any_colour(rng), outline=INK)
    for _ in range(int(rng.integers(2, 7))):
        ends = [(float(rng.uniform(0, width)), float(rng.uniform(0, height))) for _ in range(3)]
        draw.line(ends, fill=INK, width=7)
        draw.line(ends, fill=any_colour(rng), width=5)
    for _ in range(int(rng.integers(2, 6))):
        draw.text((rng.uniform(0, width * 0.7), rng.uniform(0, height - 12)), draw_name(rng, "road"), fill=INK)
    return "a drawn map with roads and place names"


def _flow_chart(rng: np.random.Generator, draw: ImageDraw.ImageDraw, size: Size) -> str:
    width, height = size
    rows = max(2, height // 50)
    for number in range(rows):
        top = 8 + number * (height - 10) / rows
        left = width * rng.uniform(0.1, 0.3)
        draw.rectangle((left, top, left + width * 0.5, top + 24), fill=any_colour(rng), outline=INK, width=2)
        draw.text((left + 5, top + 6), draw_name(rng, "warehouse"), fill=INK)
        draw.line([(left + width * 0.25, top + 24), (left + width * 0.25, top + height / rows)], fill=INK, width=2)
    return "a flow chart with boxes and arrows"
