"""The picture that a request is about: sent along, a chip of the index, or a box of a scene.

In: base64, tiles, hits. Out: encoded bytes with their scale and their place on Earth, and masks over them. Pictures
are decoded once here, few at a time, so that no replica meets a bad one and memory stays bounded.
Shapes: H W cells of a map.
"""

import asyncio
import base64
import io
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from PIL import Image

from rsplatform.model.preprocess import decode_image
from rsplatform.serve.api import MAX_IMAGE_PIXELS, Box, image_bytes
from rsplatform.serve.api_pictures import TextMask
from rsplatform.serve.catalogue import Place
from rsplatform.serve.localization import find_peak, mask_png
from rsplatform.serve.retrieval import spot
from rsplatform.serve.tiles import Tiles

# A decoded picture of MAX_IMAGE_PIXELS is 96 MB; further ones wait for these.
MAX_DECODES = 2
MAX_MASK_SIDE_PX = 1024
Result = TypeVar("Result")


@dataclass(frozen=True)
class Picture:
    """Encoded bytes, metres a pixel (NaN where unknown), and where its parts lie on Earth (None: unknown)."""

    data: bytes
    ground_sample_distance_m: float
    place: Place | None = None
    is_window: bool = False  # a box of a scene, seen at its own scale

    def mask_size_px(self) -> tuple[int, int]:
        """Height and width of a mask over it: its own, or less where a side is longer than MAX_MASK_SIDE_PX."""
        width, height = Image.open(io.BytesIO(self.data)).size  # reads the header alone
        factor = min(1, MAX_MASK_SIDE_PX / max(height, width))
        return max(1, round(height * factor)), max(1, round(width * factor))


class Decoding:
    """Threads of their own for decoding, so that uploads wait for each other and not in memory."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(MAX_DECODES, thread_name_prefix="decoding")

    async def run(self, work: Callable[[], Result]) -> Result:
        """The result of `work`, in one of the threads."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)


def sent_picture(image: str) -> Picture:
    """A picture of a request; ValueError if it is no acceptable one."""
    data = image_bytes(image)
    decode_image(data, max_pixels=MAX_IMAGE_PIXELS)
    return Picture(data, math.nan)


def scene_picture(tiles: Tiles, scene_id: str, bbox: Box, ground_sample_distance_m: float | None) -> Picture:
    """A box of a scene; raises as Tiles.window."""
    scene = tiles.catalogue.scenes[scene_id]
    distance_m = ground_sample_distance_m or scene.ground_sample_distance_m
    west, south, east, north = bbox

    def place(row_fraction: float, column_fraction: float) -> tuple[float, float]:
        return west + column_fraction * (east - west), north - row_fraction * (north - south)

    return Picture(tiles.window(scene_id, bbox, distance_m), distance_m, place, is_window=True)


def text_mask(text: str, scores_HW: np.ndarray, size_px: tuple[int, int], place: Place | None) -> TextMask:
    """The mask of one text over a picture of (height, width)."""
    data = base64.b64encode(mask_png(scores_HW, size_px)).decode()
    peak = spot(find_peak(scores_HW), place)
    return TextMask(text=text, mask=data, height_px=size_px[0], width_px=size_px[1], spot=peak)
