"""Maps of one picture in memory: resampled to the model's scale, tiled at its own picture size, one map a text.

The whole-scene path (scene.py) does the work; this is the short way in for evaluation, serving and tests.
"""

import numpy as np
import torch
from PIL import Image

from rsplatform.localize.scene import PatchEncoder, SceneReader, Tiling, score_strips
from rsplatform.model.embedder import Embedder


def picture_maps(
    embedder: Embedder,
    image_HWC: np.ndarray,
    texts_CE: torch.Tensor,
    *,
    scale: float = 1.0,
    window: int = 3,
    edge_patches: int = 0,
) -> torch.Tensor:
    """maps_CHW on the patch grid of uint8 (H, W, 3) pixels resampled by `scale` (picture GSD / model GSD).

    Tiles have the side that the model was trained at, since a small ViT does not carry over to larger grids
    (our default); window 1 gives raw patch maps, to be compared with the same
    `edge_patches` only. Maps never cover less than the picture.
    """
    if scale != 1.0:
        height, width = (max(1, round(side * scale)) for side in image_HWC.shape[:2])
        resample = Image.Resampling.BOX if scale < 1 else Image.Resampling.BICUBIC
        image_HWC = np.asarray(Image.fromarray(image_HWC).resize((width, height), resample))

    def read_window(row: int, column: int, height: int, width: int) -> np.ndarray:
        return image_HWC[row : row + height, column : column + width]

    scene = SceneReader(image_HWC.shape[0], image_HWC.shape[1], read_window)
    strips = score_strips(scene, encoder(embedder), texts_CE, tiling(embedder, window, edge_patches))
    return torch.cat([strip.maps_CHW for strip in strips], dim=1)


def encoder(embedder: Embedder) -> PatchEncoder:
    """The embedder as the two functions that localization needs."""
    return PatchEncoder(embedder.patch_features, embedder.head, embedder.patch_size)


def tiling(embedder: Embedder, window: int, edge_patches: int = 0) -> Tiling:
    """Tiles of the model's own picture size, overlapping by half (and by what the window and the edge need)."""
    tile_patches = embedder.image_size // embedder.patch_size
    edge_patches = max(edge_patches, window - 1)
    overlap = min(tile_patches - 1, max(tile_patches // 2, 2 * edge_patches))
    return Tiling(tile_patches, overlap, window, batch_tiles=32, edge_patches=edge_patches)
