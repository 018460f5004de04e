"""Sharpened strips equal the filter of the whole map, and boundaries move to the picture's edges."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from rsplatform.localize.decide import label_pixels
from rsplatform.localize.guided_filter import guided_filter
from rsplatform.localize.scene import SceneReader, Strip
from rsplatform.localize.sharpen import GuidedFilter, sharpen_strips
from rsplatform.localize.smooth_attention import upsample


def reader(image_HWC: np.ndarray) -> SceneReader:
    def read(row: int, column: int, height: int, width: int) -> np.ndarray:
        return image_HWC[row : row + height, column : column + width]

    return SceneReader(image_HWC.shape[0], image_HWC.shape[1], read)


def strips(maps_CHW: torch.Tensor, rows: int) -> Iterator[Strip]:
    for row in range(0, maps_CHW.shape[1], rows):
        yield Strip(row, maps_CHW[:, row : row + rows])


@pytest.mark.parametrize("rows", [1, 7, 40, 90])
def test_strips_equal_the_whole(rows: int) -> None:
    generator = np.random.default_rng(0)
    image = generator.integers(0, 256, (90, 50, 3), dtype=np.uint8)
    maps_CHW = torch.from_numpy(generator.random((2, 90, 50), dtype=np.float32))
    maps_CHW[:, 30:44, :20] = torch.nan
    settings = GuidedFilter(radius_px=5, epsilon=1e-3)
    guide = torch.from_numpy(image).permute(2, 0, 1)[None].double() / 255
    expected = guided_filter(maps_CHW[None], guide, 5, 1e-3)[0]
    found = list(sharpen_strips(strips(maps_CHW, rows), reader(image), settings))
    assert [strip.row for strip in found] == np.cumsum([0, *(s.maps_CHW.shape[1] for s in found[:-1])]).tolist()
    whole = torch.cat([strip.maps_CHW for strip in found], dim=1)
    torch.testing.assert_close(whole, expected, atol=1e-5, rtol=0, equal_nan=True)


def test_boundaries_move_to_the_edges_of_the_picture() -> None:
    """A bright disc under maps of patches: after the filter more of its pixels, and fewer others, are found."""
    rows, columns = np.mgrid[:128, :128] + 0.5
    disc = (rows - 61) ** 2 + (columns - 70) ** 2 <= 30**2
    noise = np.random.default_rng(0).normal(0, 6, (128, 128, 3))
    image = (np.where(disc, 190, 70)[..., None] + noise).clip(0, 255).astype(np.uint8)
    share = torch.from_numpy(disc.reshape(16, 8, 16, 8).mean(axis=(1, 3), dtype=np.float32))
    maps_CHW = upsample(torch.stack([0.5 - 0.1 * share, 0.45 + 0.1 * share])[None], (128, 128))[0]
    (sharp,) = sharpen_strips([Strip(0, maps_CHW)], reader(image), GuidedFilter())

    def overlap(maps: torch.Tensor) -> float:
        found = label_pixels(maps.numpy(), [0, 1]) == 1
        return (found & disc).sum() / (found | disc).sum()

    assert overlap(sharp.maps_CHW) > 0.97 > overlap(maps_CHW) + 0.02
