"""Maps of one picture in memory: resampled to the model's scale and to whole patches, tiled, one map a text.

The whole-scene path (scene.py) does the work; this is the short way in for evaluation, serving and tests.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from PIL import Image

from rsplatform.localize.scales import Looks, MapScale, View, moved, score_scales, windows_by_resolution
from rsplatform.localize.scene import PatchEncoder, SceneReader, Tiling, score_strips
from rsplatform.model.embedder import Embedder

BATCH_TILES = 32  # of the model's own size


@dataclass(frozen=True)
class Scale:
    """How a picture is resampled (`factor`: picture GSD / model GSD), and the GSD of what comes out, NaN if unknown."""

    factor: float = 1.0
    ground_sample_distance_m: float = math.nan


AS_IT_IS = Scale()


def picture_maps(
    embedder: Embedder,
    image_HWC: np.ndarray,
    texts_CE: torch.Tensor,
    *,
    scale: Scale = AS_IT_IS,
    window: int = 3,
    narrower: Sequence[int] = (),
) -> torch.Tensor:
    """maps_CHW of uint8 (H, W, 3) pixels resampled by `scale`, on a grid of patches.

    Each side is resampled to the nearest whole number of patches, so that the grid covers exactly the picture and a
    cell's place in the map is its place in the picture. Tiles are `tiling`'s. Both are our defaults. The maps of
    `narrower` windows (1: raw patch maps) follow along C, comparable because they share patches and tiles.
    """
    scene = _whole_patches(image_HWC, scale.factor, embedder.patch_size)
    patches = encoder(embedder, scale.ground_sample_distance_m)
    strips = score_strips(scene, patches, texts_CE, tiling(embedder, window), narrower)
    return torch.cat([strip.maps_CHW for strip in strips], dim=1)


def multi_scale_maps(
    embedder: Embedder,
    image_HWC: np.ndarray,
    texts_CE: torch.Tensor,
    *,
    scale: Scale = AS_IT_IS,
    window: int = 3,
    scales: Sequence[MapScale],
) -> torch.Tensor:
    """maps_CHW like `picture_maps` on the same grid, averaged with those of further `scales`."""
    return averaged_maps(embedder, image_HWC, texts_CE, Looks(window, tuple(scales)), scale)


def averaged_maps(
    embedder: Embedder, image_HWC: np.ndarray, texts_CE: torch.Tensor, looks: Looks, scale: Scale = AS_IT_IS
) -> torch.Tensor:
    """maps_CHW like `picture_maps` on the same grid, the mean of several looks."""
    views: list[View] = []
    for resolution, windows in windows_by_resolution(looks.window, looks.scales).items():
        scene = _whole_patches(image_HWC, scale.factor * resolution, embedder.patch_size)
        cell = (embedder.patch_size / scene.height_px, embedder.patch_size / scene.width_px)  # shares of the picture
        patches = encoder(embedder, scale.ground_sample_distance_m / resolution)
        view = View(scene, patches, tiling(embedder, windows[0]), windows[1:], (0.0, 0.0), cell)
        views += moved(view, looks.phases)
    return torch.cat([strip.maps_CHW for strip in score_scales(views, texts_CE)], dim=1)


def _whole_patches(image_HWC: np.ndarray, factor: float, patch: int) -> SceneReader:
    height, width = (max(1, round(side * factor / patch)) * patch for side in image_HWC.shape[:2])
    if (height, width) != image_HWC.shape[:2]:
        resample = Image.Resampling.BOX if factor < 1 else Image.Resampling.BICUBIC
        image_HWC = np.asarray(Image.fromarray(image_HWC).resize((width, height), resample))

    def read_window(row: int, column: int, height: int, width: int) -> np.ndarray:
        return image_HWC[row : row + height, column : column + width]

    return SceneReader(height, width, read_window)


def encoder(embedder: Embedder, ground_sample_distance_m: float = math.nan) -> PatchEncoder:
    """The embedder as the two functions that localization needs, for pixels of one ground sample distance."""
    features = partial(embedder.patch_features, ground_sample_distance_m=ground_sample_distance_m)
    return PatchEncoder(features, embedder.head, embedder.patch_size)


def tiling(embedder: Embedder, window: int) -> Tiling:
    """Tiles of the model's own picture size, overlapping by half, and larger only where the window needs it.

    A small ViT does not carry over well to larger grids, so a tile grows (positions are interpolated) only if less
    than half of the model's own side would be left of it between the dropped edges. Our default.
    """
    native_patches = embedder.image_size // embedder.patch_size
    dropped_patches = window - 1
    tile_patches = max(native_patches, 2 * dropped_patches + max(1, native_patches // 2))
    overlap_patches = max(tile_patches // 2, 2 * dropped_patches)
    batch_tiles = max(1, BATCH_TILES * native_patches**2 // tile_patches**2)  # larger tiles need no more memory
    return Tiling(tile_patches, overlap_patches, window, batch_tiles)
