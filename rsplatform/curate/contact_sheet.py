"""Contact sheets: encoded pictures with a line of text each in, one image for a person to look at out.

Kept rows are in the table; of the dropped ones each shard sets a few pictures aside while it has them at hand.
"""

import io
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageDraw, ImageOps

from rsplatform import storage
from rsplatform.artifacts import Artifact
from rsplatform.model.preprocess import ImageError, decode_image
from rsplatform.tracking import Run

COLUMNS, TILE_PX, TEXT_PX = 8, 128, 28
MAX_TILES = 48

# Pictures of dropped rows that one shard sets aside (our default).
DROPPED_PER_SHARD = 12
DROPPED_FOLDER = "work/dropped"

LabelledPicture = tuple[bytes | None, str]


def keep_dropped_pictures(artifact: Artifact, part: str, dropped: pa.Table) -> None:
    """Set aside up to DROPPED_PER_SHARD of some dropped rows (columns image, drop_reason), for `dropped_pictures`.

    Rows without pictures leave nothing.
    """
    if "image" not in dropped.column_names:
        return
    chosen = pa.array(spread(dropped.num_rows, DROPPED_PER_SHARD), pa.int64())
    rows = dropped.select(["image", "drop_reason"]).take(chosen)
    uri = artifact.path(f"{DROPPED_FOLDER}/{part}.parquet")
    if rows.num_rows or storage.exists(uri):
        buffer = io.BytesIO()
        pq.write_table(rows, buffer)
        storage.write_bytes(uri, buffer.getvalue())


def dropped_pictures(artifact: Artifact) -> list[LabelledPicture]:
    """At most MAX_TILES of the pictures set aside, spread over the shards, each with its reason."""
    names = list(storage.list_files(artifact.path(DROPPED_FOLDER)))
    rows = [
        row
        for index in spread(len(names))
        for row in pq.read_table(
            io.BytesIO(storage.read_bytes(artifact.path(f"{DROPPED_FOLDER}/{names[index]}")))
        ).to_pylist()
    ]
    return [(rows[index]["image"], rows[index]["drop_reason"]) for index in spread(len(rows))]


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
    if num_items == 0:
        return []
    return sorted(set(np.linspace(0, num_items - 1, min(num_wanted, num_items)).round().astype(int).tolist()))
