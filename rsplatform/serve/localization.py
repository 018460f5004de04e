"""Where in a picture a query is: smooth attention over its patches, the spot of the peak, and a heatmap picture.

In: pictures (bytes) and their scale, unit query vectors. Out: score maps on the patch grid, spots as fractions of the
picture, PNG overlays, regions as GeoJSON. It reads no table and knows no scene; the caller gives the way from
fractions to Earth.
Shapes: B pictures, C queries, H W patch grid, E embedding.
"""

import io
import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from rasterio.features import shapes

from rsplatform.localize.picture import Scale, picture_maps
from rsplatform.localize.smooth_attention import smooth_attention, upsample
from rsplatform.model.embedder import Embedder
from rsplatform.model.preprocess import Square, decode_image, read_square, resized_ground_sample_distance_m
from rsplatform.serve.api import MAX_IMAGE_PIXELS

HEATMAP_SIZE_PX = 256
# Dark violet over orange to pale yellow: readable on green and grey ground, in both colour schemes.
GRADIENT = np.array(
    [[40, 11, 84], [120, 28, 109], [188, 55, 84], [237, 105, 37], [251, 180, 26], [252, 255, 164]], dtype=np.float32
)
MAX_OPACITY = 0.85


@dataclass(frozen=True)
class Peak:
    """The best cell of a map and the region around it, as fractions of the picture from its top left."""

    score: float
    row_fraction: float
    column_fraction: float
    box_fraction: tuple[float, float, float, float]  # top, left, bottom, right


@dataclass(frozen=True)
class Look:
    """A picture and what to look for in it: unit queries (C, E), and the metres of its pixels, NaN where unknown.

    `as_it_is` keeps the picture's scale, so that a larger one is tiled; else it is brought to the size that the model
    was trained at, which is what chips and pictures of unknown scale need.
    """

    image: bytes
    queries_CE: np.ndarray
    ground_sample_distance_m: float = math.nan
    as_it_is: bool = False


class Localization:
    """Smooth attention of one model at its own picture size."""

    def __init__(self, embedder: Embedder, window: int = 3) -> None:
        self.embedder = embedder
        self.window = window

    def maps(
        self,
        images: Sequence[bytes],
        queries_CE: np.ndarray,
        ground_sample_distances_m: Sequence[float] | None = None,
    ) -> list[np.ndarray]:
        """`look` at several pictures for the same queries.

        Raises:
            ImageError: bytes that are no acceptable picture.
            ValueError: another number of distances than of pictures.
        """
        distances_m = [math.nan] * len(images) if ground_sample_distances_m is None else ground_sample_distances_m
        return self.look([Look(image, queries_CE, each) for image, each in zip(images, distances_m, strict=True)])

    def look(self, looks: Sequence[Look]) -> list[np.ndarray]:
        """Cosine of each patch's surroundings with each query of the look, one float32 (C, H, W) per picture.

        Square pictures (chips) go through the model together, at the size it was trained at; others are tiled at
        that scale, so that no part of them is cropped away.

        Raises:
            ImageError: bytes that are no acceptable picture.
        """
        maps, squares, size = dict[int, np.ndarray](), dict[int, Square](), self.embedder.image_size
        for index, look in enumerate(looks):
            picture_HWC = decode_image(look.image, max_pixels=MAX_IMAGE_PIXELS)
            is_square = picture_HWC.shape[0] == picture_HWC.shape[1]
            if is_square and not look.as_it_is:
                distance_m = look.ground_sample_distance_m
                squares[index] = read_square(look.image, size, distance_m, max_pixels=MAX_IMAGE_PIXELS)
            else:
                maps[index] = self._tiled_maps(picture_HWC, look)
        for same in _same_queries(looks, list(squares)):
            found = self._square_maps([squares[index] for index in same], self._queries(looks[same[0]]))
            maps |= dict(zip(same, found, strict=True))
        return [maps[index] for index in range(len(looks))]

    def _queries(self, look: Look) -> torch.Tensor:
        return torch.from_numpy(np.array(look.queries_CE, dtype=np.float32)).to(self.embedder.device)

    def _tiled_maps(self, picture_HWC: np.ndarray, look: Look) -> np.ndarray:
        size, factor, distance_m = self.embedder.image_size, 1.0, look.ground_sample_distance_m
        if not look.as_it_is:
            factor = size / min(picture_HWC.shape[:2])
            distance_m = resized_ground_sample_distance_m(picture_HWC, size, distance_m)
        scale = Scale(factor, distance_m)
        maps_CHW = picture_maps(self.embedder, picture_HWC, self._queries(look), scale=scale, window=self.window)
        return maps_CHW.float().cpu().numpy()

    def _square_maps(self, squares: list[Square], texts_CE: torch.Tensor) -> list[np.ndarray]:
        images_BHWC = torch.from_numpy(np.stack([picture.pixels_HWC for picture in squares]))
        distances_m = [picture.ground_sample_distance_m for picture in squares]
        features = self.embedder.patch_features(images_BHWC, distances_m)
        with torch.no_grad():
            maps_BCHW = smooth_attention(
                features.values_BHWD,
                texts_CE,
                head=self.embedder.head,
                scores_BHW=features.scores_BKHW,
                window=self.window,
            )
        return list(maps_BCHW.float().cpu().numpy())


def _same_queries(looks: Sequence[Look], indices: Sequence[int]) -> list[list[int]]:
    """Indices of looks for the same queries, together: the hits of one search share a forward."""
    groups: dict[bytes, list[int]] = {}
    for index in indices:
        groups.setdefault(looks[index].queries_CE.tobytes(), []).append(index)
    return list(groups.values())


def threshold(scores_HW: np.ndarray) -> float:
    """Half-way from the map's median to its peak: what counts as the region of a text (our default)."""
    return float((np.median(scores_HW) + scores_HW.max()) / 2)


def find_peak(scores_HW: np.ndarray) -> Peak:
    """The highest cell and the box of the cells above `threshold` that are connected to it."""
    height, width = scores_HW.shape
    row, column = (int(i) for i in np.unravel_index(int(scores_HW.argmax()), scores_HW.shape))
    above_HW = scores_HW >= threshold(scores_HW)
    seen, queue = {(row, column)}, deque([(row, column)])
    while queue:
        r, c = queue.popleft()
        for cell in ((r + 1, c), (r - 1, c), (r, c + 1), (r, c - 1)):
            inside = 0 <= cell[0] < height and 0 <= cell[1] < width
            if inside and above_HW[cell] and cell not in seen:
                seen.add(cell)
                queue.append(cell)
    rows, columns = zip(*seen, strict=True)
    box = (min(rows) / height, min(columns) / width, (max(rows) + 1) / height, (max(columns) + 1) / width)
    return Peak(float(scores_HW.max()), (row + 0.5) / height, (column + 0.5) / width, box)


def heatmap_png(scores_HW: np.ndarray, size_px: int = HEATMAP_SIZE_PX) -> bytes:
    """The map as a transparent overlay: clear up to its median, opaque and bright at its peak.

    Its longer side has `size_px`, its form is that of the picture, over whose thumbnail it is laid.
    """
    height, width = (max(1, round(size_px * side / max(scores_HW.shape))) for side in scores_HW.shape)
    pixels_HW = upsample(torch.from_numpy(scores_HW)[None, None], (height, width))[0, 0].numpy()
    low, high = float(np.median(pixels_HW)), float(pixels_HW.max())
    strength_HW = np.clip((pixels_HW - low) / max(high - low, 1e-9), 0, 1)
    position_HW = strength_HW * (len(GRADIENT) - 1)
    lower_HW = np.minimum(position_HW.astype(int), len(GRADIENT) - 2)
    mix_HW1 = (position_HW - lower_HW)[..., None]
    colours_HWC = GRADIENT[lower_HW] * (1 - mix_HW1) + GRADIENT[lower_HW + 1] * mix_HW1
    alpha_HW1 = (255 * MAX_OPACITY * np.sqrt(strength_HW))[..., None]
    buffer = io.BytesIO()
    rgba_HWC = np.concatenate([colours_HWC, alpha_HW1], axis=2).round().astype(np.uint8)
    Image.fromarray(rgba_HWC).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def mask_png(scores_HW: np.ndarray, size_px: tuple[int, int]) -> bytes:
    """The pixels (height, width) above `threshold` of the map at that size: a grey PNG of 255 and 0."""
    pixels_HW = upsample(torch.from_numpy(scores_HW)[None, None], size_px)[0, 0].numpy()
    buffer = io.BytesIO()
    Image.fromarray(np.where(pixels_HW >= threshold(pixels_HW), 255, 0).astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def regions_geojson(
    maps_CHW: np.ndarray, texts: Sequence[str], place: Callable[[float, float], tuple[float, float]]
) -> dict[str, Any]:
    """Regions above `threshold` of each text as a GeoJSON FeatureCollection; `place` maps (row, column) fractions."""
    features = []
    for text, scores_HW in zip(texts, maps_CHW, strict=True):
        height, width = scores_HW.shape
        mask_HW = (scores_HW >= threshold(scores_HW)).astype(np.uint8)
        for polygon, value in shapes(mask_HW, mask=mask_HW.astype(bool)):
            rings = [[place(row / height, column / width) for column, row in ring] for ring in polygon["coordinates"]]
            geometry = {"type": "Polygon", "coordinates": rings}
            properties = {"text": text, "peak_score": float(scores_HW.max()), "class": int(value)}
            features.append({"type": "Feature", "geometry": geometry, "properties": properties})
    return {"type": "FeatureCollection", "features": features}
