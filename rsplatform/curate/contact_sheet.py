"""Contact sheets: encoded pictures with a line of text each in, one image for a person to look at out."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageOps

from rsplatform.model.preprocess import ImageError, decode_image
from rsplatform.tracking import Run

COLUMNS, TILE_PX, TEXT_PX = 8, 128, 28
MAX_TILES = 48

LabelledPicture = tuple[bytes | None, str]


def log_contact_sheets(run: Run, kept: Sequence[LabelledPicture], dropped: Sequence[LabelledPicture]) -> None:
    """Log `contact_sheets/kept.png` and `contact_sheets/dropped.png`, the latter with the reasons as labels."""
    for name, pictures in (("kept", kept), ("dropped", dropped)):
        if pictures:
            run.log_picture(contact_sheet(pictures), f"contact_sheets/{name}.png")


def contact_sheet(pictures: Sequence[LabelledPicture]) -> Image.Image:
    """At most MAX_TILES pictures in rows of eight; one that cannot be decoded is a grey tile."""
    pictures = pictures[:MAX_TILES]
    num_rows = -(-len(pictures) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * TILE_PX, num_rows * (TILE_PX + TEXT_PX)), "white")
    draw = ImageDraw.Draw(sheet)
    for index, (data, label) in enumerate(pictures):
        row, column = divmod(index, COLUMNS)
        left, top = column * TILE_PX, row * (TILE_PX + TEXT_PX)
        sheet.paste(_tile(data), (left, top))
        for line in range(2):
            draw.text((left + 2, top + TILE_PX + 13 * line), label[line * 20 : line * 20 + 20], fill="black")
    return sheet


def _tile(data: bytes | None) -> Image.Image:
    side = TILE_PX - 4
    try:
        return ImageOps.contain(Image.fromarray(decode_image(data or b"")), (side, side))
    except ImageError:
        return Image.new("RGB", (side, side), "grey")


def spread(num_items: int, num_wanted: int = MAX_TILES) -> list[int]:
    """At most `num_wanted` indices spread evenly over `num_items`."""
    return sorted(set(np.linspace(0, num_items - 1, min(num_wanted, num_items)).round().astype(int).tolist()))
