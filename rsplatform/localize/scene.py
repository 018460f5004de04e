"""Score maps of a whole scene of any size, without seams, from overlapping tiles.

In: a scene as two reading functions, an encoder as two functions, unit texts. Out: strips of rows in order,
so memory holds one row of tiles whatever the scene's height. It opens no files and starts no workers.
Shapes: B batch, HxW pixels or patches (a patch is a cell of the score map), C texts, D width, E embedding.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from rsplatform.localize.smooth_attention import Head, smooth_attention, upsample

# Below any real pooling score by so much that its softmax weight is exactly 0 in float32; finite, so that a
# window of nothing but missing patches gives a number (which nobody reads) and no NaN.
MISSING_SCORE = -1e4


class PatchFeatures(Protocol):
    """What an encoder gives for each patch: the values, and scores of learned pooling heads if any."""

    @property
    def values_BHWD(self) -> torch.Tensor:
        """Values of the final patches."""
        ...

    @property
    def scores_BKHW(self) -> torch.Tensor | None:
        """Pooling scores of K heads; None for average-pooled encoders."""
        ...


@dataclass(frozen=True)
class PatchEncoder:
    """An image encoder as functions: `patch_features(images_BHWC uint8)`, `head` (..., D) -> (..., E)."""

    patch_features: Callable[[torch.Tensor], PatchFeatures]
    head: Head
    patch_size_px: int


@dataclass(frozen=True)
class SceneReader:
    """A scene as functions of (row, column, height, width) in pixels, asked only for windows inside it.

    `read_window` returns uint8 (height, width, 3); `read_valid` bool (height, width), None if all pixels are
    data. `first_px` is the row and column of the scene's first pixel on the ground grid that patches and tiles are laid
    on: two scenes that overlap on it share the patches and tiles that lie in both, so their maps agree there.
    """

    height_px: int
    width_px: int
    read_window: Callable[[int, int, int, int], np.ndarray]
    read_valid: Callable[[int, int, int, int], np.ndarray] | None = None
    first_px: tuple[int, int] = (0, 0)


def patches_along(first_px: int, length_px: int, patch_size_px: int) -> int:
    """Patches of the ground grid that cover an axis of a scene whose first pixel is `first_px` of that grid."""
    return -(-(first_px % patch_size_px + length_px) // patch_size_px)


@dataclass(frozen=True)
class Tiling:
    """Tiles of `tile_patches` squared sharing `overlap_patches` with each neighbour; window 1 gives raw maps.

    A patch's smooth score depends on patches up to window - 1 cells away, so that many cells along a tile's
    inner edges are dropped, and tiles are blended linearly over what is left of the overlap.
    """

    tile_patches: int = 16
    overlap_patches: int = 6
    window: int = 3
    batch_tiles: int = 4

    @property
    def dropped_patches(self) -> int:
        """Cells along each inner edge of a tile that are not used."""
        return self.window - 1

    def __post_init__(self) -> None:
        """Raises ValueError if tiles leave gaps between the cells they keep."""
        if not 2 * self.dropped_patches <= self.overlap_patches < self.tile_patches:
            raise ValueError(
                f"overlap_patches must be at least 2 * (window - 1) = {2 * self.dropped_patches} and below "
                f"tile_patches = {self.tile_patches}, got {self.overlap_patches}"
            )
        if self.batch_tiles < 1:
            raise ValueError(f"batch_tiles must be at least 1, got {self.batch_tiles}")


@dataclass(frozen=True)
class Strip:
    """Rows of a map from `row` on, maps_CHW float32; NaN where the scene has no data."""

    row: int
    maps_CHW: torch.Tensor


def score_strips(
    scene: SceneReader,
    encoder: PatchEncoder,
    texts_CE: torch.Tensor,
    tiling: Tiling,
    narrower: Sequence[int] = (),
    patch_rows: tuple[int, int] | None = None,
) -> Iterator[Strip]:
    """Smooth attention over the scene, one score per patch of the grid that `SceneReader.first_px` anchors.

    The maps of `narrower` windows follow along C. Patches, tiles and blending are shared, so windows are comparable.
    `patch_rows` (first, end) gives those rows only, from all tiles that reach them: the same numbers as in the whole.

    Where the scene ends inside a tile or a patch, its reflection completes the picture that the encoder sees,
    but takes no part in the pooling. The same holds for missing patches (under half of the pixels valid),
    which get NaN. With an encoder whose patches do not look beyond themselves, the result is that of one tile
    over everything.
    """
    patch, sizes_px = encoder.patch_size_px, (scene.height_px, scene.width_px)
    if min(*sizes_px, patch) < 1:
        raise ValueError(f"a scene needs pixels, got {sizes_px} in patches of {patch}")
    windows = _windows(tiling, narrower)
    rows, columns = (patches_along(*axis, patch) for axis in zip(scene.first_px, sizes_px, strict=True))
    column_starts = _tile_starts(columns, tiling, scene.first_px[1] // patch)
    weights_HW = torch.zeros(min(tiling.tile_patches, rows), columns)
    sums_CHW = torch.zeros(len(windows) * len(texts_CE), *weights_HW.shape)
    wanted = patch_rows or (0, rows)
    for row, done in _needed_rows(rows, scene.first_px[0] // patch, tiling, wanted):
        for first in range(0, len(column_starts), tiling.batch_tiles):
            starts = column_starts[first : first + tiling.batch_tiles]
            tiles = list(_read_tiles(scene, row, starts, tiling, patch))
            maps_BCHW, valid_BHW = _score_tiles(tiles, encoder, texts_CE, windows)
            for column, maps_CHW, valid_HW in zip(starts, maps_BCHW, valid_BHW, strict=True):
                tile_HW = torch.outer(_ramp(row, rows, tiling), _ramp(column, columns, tiling)) * valid_HW
                inside = slice(column, column + tile_HW.shape[1])
                sums_CHW[:, :, inside] += maps_CHW * tile_HW
                weights_HW[:, inside] += tile_HW
        if row + done > wanted[0]:
            yield _blended(row, sums_CHW[:, :done], weights_HW[:done], wanted)
        sums_CHW, weights_HW = (_moved_up(rows_of, done) for rows_of in (sums_CHW, weights_HW))


def _needed_rows(rows: int, first_patch: int, tiling: Tiling, wanted: tuple[int, int]) -> Iterator[tuple[int, int]]:
    """Rows of tiles that reach the wanted rows of patches, and how many rows no later tile reaches."""
    every_start = _tile_starts(rows, tiling, first_patch)
    starts = [row for row in every_start if row < wanted[1] and row + tiling.tile_patches > wanted[0]]
    ends = [*starts[1:], min(rows, starts[-1] + tiling.tile_patches)]
    return ((row, end - row) for row, end in zip(starts, ends, strict=True))


def _moved_up(rows_of: torch.Tensor, done: int) -> torch.Tensor:
    """The rows below the `done` first ones (on the last axis but one), and as many of zeros."""
    return torch.cat([rows_of[..., done:, :], torch.zeros_like(rows_of[..., :done, :])], dim=-2)


def _blended(row: int, sums_CHW: torch.Tensor, weights_HW: torch.Tensor, wanted: tuple[int, int]) -> Strip:
    """The mean of the tiles, NaN where none had data; the wanted rows of it."""
    missing_HW = weights_HW == 0
    strip_CHW = (sums_CHW / weights_HW.masked_fill(missing_HW, 1.0)).masked_fill(missing_HW, torch.nan)
    first = max(wanted[0] - row, 0)
    return Strip(row + first, strip_CHW[:, first : wanted[1] - row])


def _windows(tiling: Tiling, narrower: Sequence[int]) -> tuple[int, ...]:
    if any(window > tiling.window for window in narrower):
        raise ValueError(f"windows {list(narrower)} must not be wider than the tiling's {tiling.window}")
    return (tiling.window, *narrower)


def upsample_strips(strips: Iterable[Strip], scene: SceneReader, patch_size_px: int) -> Iterator[Strip]:
    """Stretch strips of patches to strips of pixels: equal to `upsample` of the whole map, cut to the scene.

    Missing patches lend nothing to their neighbours; pixels without data are NaN. Holds two strips at a time.
    """
    above: torch.Tensor | None = None
    held: Strip | None = None
    for strip in strips:
        if held is not None:
            yield _stretch(held, above, strip.maps_CHW[:, :1], scene, patch_size_px)
            above = held.maps_CHW[:, -1:]
        held = strip
    if held is not None:
        yield _stretch(held, above, None, scene, patch_size_px)


def _tile_starts(length: int, tiling: Tiling, first_patch: int) -> list[int]:
    """First cells of the tiles along an axis whose first cell is patch `first_patch` of the ground grid.

    Tiles lie where the ground grid says; one more begins and one more ends with the scene, so that its borders are
    seen in whole tiles too.
    """
    last, step = max(0, length - tiling.tile_patches), tiling.tile_patches - tiling.overlap_patches
    return sorted({0, *range(-first_patch % step, last, step), last})


def _ramp(start: int, length: int, tiling: Tiling) -> torch.Tensor:
    """Weights of a tile's cells along an axis: zero in the dropped edge, rising, 1 at scene ends."""
    size, dropped = tiling.tile_patches, tiling.dropped_patches
    cells = torch.arange(size, dtype=torch.float32)
    rise = tiling.overlap_patches - 2 * dropped + 1
    ramp = torch.ones(size)
    if start > 0:
        ramp = ramp * ((cells - dropped + 1) / rise).clamp(0, 1)
    if start + size < length:
        ramp = ramp * ((size - cells - dropped) / rise).clamp(0, 1)
    return ramp[:length]


def _score_tiles(
    tiles: list[tuple[np.ndarray, np.ndarray]], encoder: PatchEncoder, texts_CE: torch.Tensor, windows: tuple[int, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Maps (B, windows x C, H, W) and valid patches (B, H, W) of the tiles' part of the scene, on the CPU."""
    valid_BHW = torch.from_numpy(np.stack([valid for _, valid in tiles]))
    if not valid_BHW.any():
        return torch.zeros(len(tiles), len(windows) * len(texts_CE), *valid_BHW.shape[1:]), valid_BHW
    features = encoder.patch_features(torch.from_numpy(np.stack([image for image, _ in tiles])))
    grid = (len(tiles), *(side // encoder.patch_size_px for side in tiles[0][0].shape[:2]))
    if features.values_BHWD.shape[:3] != grid:
        raise ValueError(f"encoder gave values {tuple(features.values_BHWD.shape)} for patches {grid}")
    # Patches of the reflection are cut off, so that no window is centred beyond the scene either.
    height, width = valid_BHW.shape[1:]
    values_BHWD, scores_BKHW = features.values_BHWD[:, :height, :width], features.scores_BKHW
    if scores_BKHW is None:
        scores_BKHW = torch.zeros(grid, device=values_BHWD.device).unsqueeze(1)
    missing_B1HW = ~valid_BHW.unsqueeze(1).to(values_BHWD.device)
    masked_BKHW = scores_BKHW[:, :, :height, :width].float().masked_fill(missing_B1HW, MISSING_SCORE)
    texts_CE = texts_CE.to(values_BHWD.device)
    maps = [
        smooth_attention(values_BHWD, texts_CE, head=encoder.head, scores_BHW=masked_BKHW, window=window)
        for window in windows
    ]
    return torch.cat(maps, dim=1).detach().float().cpu(), valid_BHW


def _read_tiles(
    scene: SceneReader, row: int, columns: Sequence[int], tiling: Tiling, patch: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Whole tiles (pixels, valid patches) of a row, read at one go: overlapping reads of a file cost more than a model.

    Memory holds the pixels of `columns` only, so `tiling.batch_tiles` bounds it, whatever the scene's width.
    """
    size = tiling.tile_patches * patch
    tile_top = row * patch - scene.first_px[0] % patch
    tile_lefts = [column * patch - scene.first_px[1] % patch for column in columns]
    top, left = max(tile_top, 0), max(tile_lefts[0], 0)
    height, width = min(tile_top + size, scene.height_px) - top, min(tile_lefts[-1] + size, scene.width_px) - left
    image_HWC = scene.read_window(top, left, height, width)
    if image_HWC.shape != (height, width, 3) or image_HWC.dtype != np.uint8:
        raise ValueError(f"scene gave {image_HWC.dtype} {image_HWC.shape} for uint8 ({height}, {width}, 3)")
    valid_HW = np.ones((height, width), dtype=bool)
    if scene.read_valid is not None:
        valid_HW = scene.read_valid(top, left, height, width)
    for tile_left in tile_lefts:
        tile, before = slice(max(tile_left, 0) - left, tile_left + size - left), (top - tile_top, max(-tile_left, 0))
        yield _complete_tile(image_HWC[:, tile], valid_HW[:, tile], before, tiling.tile_patches, patch)


def _complete_tile(
    image_HWC: np.ndarray, valid_HW: np.ndarray, before_px: tuple[int, int], size: int, patch: int
) -> tuple[np.ndarray, np.ndarray]:
    """A tile of `size` patches squared, reflected beyond the scene; missing pixels get the mean colour.

    `before_px` rows and columns of its first patches lie before the scene.
    """
    if valid_HW.any() and not valid_HW.all():
        mean_colour = image_HWC[valid_HW].mean(axis=0).round().astype(np.uint8)
        image_HWC = np.where(valid_HW[:, :, None], image_HWC, mean_colour)
    seen = [before + length for before, length in zip(before_px, valid_HW.shape, strict=True)]
    beyond = [(before, size * patch - end) for before, end in zip(before_px, seen, strict=True)]
    image_HWC = np.pad(image_HWC, (*beyond, (0, 0)), mode="reflect")
    valid_share_HW = np.pad(valid_HW, beyond, mode="reflect").reshape(size, patch, size, patch).mean(axis=(1, 3))
    return image_HWC, valid_share_HW[: -(-seen[0] // patch), : -(-seen[1] // patch)] >= 0.5


def _stretch(
    strip: Strip, above: torch.Tensor | None, below: torch.Tensor | None, scene: SceneReader, patch: int
) -> Strip:
    """Upsample with one row of context on either side, weighting by presence, then cut the context off."""
    parts = [part for part in (above, strip.maps_CHW, below) if part is not None]
    maps_CHW = torch.cat(parts, dim=1)
    present_1HW = maps_CHW[:1].isfinite().float()
    size = (maps_CHW.shape[1] * patch, maps_CHW.shape[2] * patch)
    weighted = upsample(torch.cat([maps_CHW.nan_to_num(0.0) * present_1HW, present_1HW])[None], size)[0]
    pixels_CHW = torch.where(weighted[-1:] > 0, weighted[:-1] / weighted[-1:], torch.nan)
    before_y, before_x = (first % patch for first in scene.first_px)
    frame_top, first = strip.row * patch - before_y, patch if above is not None else 0
    top = max(frame_top, 0)
    height = min(frame_top + strip.maps_CHW.shape[1] * patch, scene.height_px) - top
    first += top - frame_top
    pixels_CHW = pixels_CHW[:, first : first + height, before_x : before_x + scene.width_px]
    if scene.read_valid is not None:
        missing_HW = ~torch.from_numpy(scene.read_valid(top, 0, height, scene.width_px))
        pixels_CHW = pixels_CHW.masked_fill(missing_HW, torch.nan)
    return Strip(top, pixels_CHW)
