"""Tiled score maps equal one tile over everything; a 2 x 2 mosaic equals the whole; missing data stays local."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from rsplatform.localize.scene import PatchEncoder, SceneReader, Tiling, score_strips, upsample_strips
from rsplatform.localize.smooth_attention import smooth_attention, upsample

PATCH = 4


@dataclass(frozen=True)
class Features:
    values_BHWD: torch.Tensor
    scores_BKHW: torch.Tensor | None


class PatchifyEncoder(torch.nn.Module):
    """A small real patch embedding: every patch is seen alone, so a tile's place cannot matter."""

    def __init__(self, learned_pooling: bool):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.patchify = torch.nn.Conv2d(3, 8, PATCH, stride=PATCH)
        self.score = torch.nn.Conv2d(3, 2, PATCH, stride=PATCH)
        for parameter in self.parameters():
            torch.nn.init.normal_(parameter, generator=generator)
        self.learned_pooling = learned_pooling

    def forward(self, images_BHWC: torch.Tensor) -> Features:
        images = images_BHWC.permute(0, 3, 1, 2).float() / 255 - 0.5
        scores = self.score(images) * 5 if self.learned_pooling else None
        return Features(torch.tanh(self.patchify(images)).permute(0, 2, 3, 1), scores)


@pytest.fixture(params=[False, True], ids=["mean", "learned"])
def encoder(request):
    with torch.no_grad():
        return PatchEncoder(torch.no_grad()(PatchifyEncoder(request.param)), torch.tanh, PATCH)


def picture(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def reader(image_HWC, valid_HW=None):
    def cut(array):
        def read(row, column, height, width):
            assert row + height <= array.shape[0] and column + width <= array.shape[1]
            return array[row : row + height, column : column + width]

        return read

    return SceneReader(
        image_HWC.shape[0], image_HWC.shape[1], cut(image_HWC), None if valid_HW is None else cut(valid_HW)
    )


def whole(strips):
    strips = list(strips)
    assert [strip.row for strip in strips] == list(np.cumsum([0, *(strip.maps_CHW.shape[1] for strip in strips[:-1])]))
    return torch.cat([strip.maps_CHW for strip in strips], dim=1)


def one_tile(encoder, image_HWC, texts, window):
    features = encoder.patch_features(torch.from_numpy(image_HWC)[None])
    return smooth_attention(
        features.values_BHWD, texts, head=encoder.head, scores_BHW=features.scores_BKHW, window=window
    )[0]


TEXTS = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("tiling", "size"),
    [
        (Tiling(tile_patches=8, overlap_patches=4, window=3), (21, 30)),
        (Tiling(tile_patches=9, overlap_patches=6, window=3, batch_tiles=1), (9, 23)),
        (Tiling(tile_patches=12, overlap_patches=9, window=5), (31, 12)),
        (Tiling(tile_patches=5, overlap_patches=0, window=1), (17, 13)),
        (Tiling(tile_patches=16, overlap_patches=4, window=3), (5, 40)),
        (Tiling(tile_patches=16, overlap_patches=4, window=3), (1, 1)),
    ],
)
def test_tiles_leave_no_seam(encoder, tiling, size):
    image = picture(size[0] * PATCH, size[1] * PATCH)
    tiled = whole(score_strips(reader(image), encoder, TEXTS, tiling))
    torch.testing.assert_close(tiled, one_tile(encoder, image, TEXTS, tiling.window), atol=1e-5, rtol=0)


def test_a_mosaic_equals_the_whole_away_from_its_cuts(encoder):
    tiling = Tiling(tile_patches=8, overlap_patches=5, window=3)
    image = picture(24 * PATCH, 28 * PATCH)
    expected = whole(score_strips(reader(image), encoder, TEXTS, tiling))
    reach = tiling.window - 1
    for row in (0, 12):
        for column in (0, 14):
            part = image[row * PATCH : (row + 12) * PATCH, column * PATCH : (column + 14) * PATCH]
            found = whole(score_strips(reader(part), encoder, TEXTS, tiling))
            rows = slice(reach if row else 0, 12 if row else 12 - reach)
            columns = slice(reach if column else 0, 14 if column else 14 - reach)
            matching = expected[:, row : row + 12, column : column + 14]
            torch.testing.assert_close(found[:, rows, columns], matching[:, rows, columns], atol=1e-5, rtol=0)


@pytest.mark.parametrize("first_px", [(0, 0), (5, 3), (1007, 26)])
@pytest.mark.parametrize("size", [(1, 1), (83, 61), (PATCH * 8, PATCH * 20)])
def test_a_grid_that_begins_before_the_scene_is_cut_to_it(encoder, first_px, size):
    """The first patches reach beyond the scene: reflected there, and every pixel gets a number."""
    tiling = Tiling(tile_patches=8, overlap_patches=4, window=3)
    image = picture(*size)
    scene = SceneReader(size[0], size[1], reader(image).read_window, first_px=first_px)
    before = tuple(first % PATCH for first in first_px)
    beyond = [(lead, -(lead + length) % PATCH) for lead, length in zip(before, size, strict=True)]
    framed = np.pad(image, (*beyond, (0, 0)), mode="reflect")
    patches = whole(score_strips(scene, encoder, TEXTS, tiling))
    assert tuple(patches.shape[1:]) == tuple(side // PATCH for side in framed.shape[:2])
    expected = one_tile(encoder, framed, TEXTS, 3)
    torch.testing.assert_close(patches, expected, atol=1e-5, rtol=0)
    pixels = whole(upsample_strips(score_strips(scene, encoder, TEXTS, tiling), scene, PATCH))
    stretched = upsample(expected[None], framed.shape[:2])[0]
    cut = stretched[:, before[0] : before[0] + size[0], before[1] : before[1] + size[1]]
    torch.testing.assert_close(pixels, cut, atol=1e-5, rtol=0)


@pytest.mark.parametrize("first_px", [(0, 0), (1007, 26)])
def test_rows_made_alone_are_those_of_the_whole_to_the_bit(encoder, first_px):
    tiling = Tiling(tile_patches=8, overlap_patches=5, window=3)
    image = picture(23 * PATCH + 1, 17 * PATCH)
    scene = SceneReader(image.shape[0], image.shape[1], reader(image).read_window, first_px=first_px)
    expected = whole(score_strips(scene, encoder, TEXTS, tiling))
    for first, end in ((0, 1), (0, 9), (9, 10), (10, 24), (3, 24)):
        strips = list(score_strips(scene, encoder, TEXTS, tiling, patch_rows=(first, end)))
        assert strips[0].row == first
        assert torch.equal(torch.cat([strip.maps_CHW for strip in strips], dim=1), expected[:, first:end])


@pytest.mark.parametrize("size", [(1, 1), (3, 50), (83, 61), (PATCH * 8, PATCH * 20)])
def test_pixels_of_any_size_equal_the_upsampled_whole(encoder, size):
    tiling = Tiling(tile_patches=8, overlap_patches=4, window=3)
    scene = reader(picture(*size))
    patches = whole(score_strips(scene, encoder, TEXTS, tiling))
    assert patches.shape[1:] == (-(-size[0] // PATCH), -(-size[1] // PATCH))
    pixels = whole(upsample_strips(score_strips(scene, encoder, TEXTS, tiling), scene, PATCH))
    expected = upsample(patches[None], (patches.shape[1] * PATCH, patches.shape[2] * PATCH))[0]
    torch.testing.assert_close(pixels, expected[:, : size[0], : size[1]], atol=1e-6, rtol=0)
    assert pixels.shape[1:] == size


def test_missing_pixels_are_missing_and_change_nothing_far_away(encoder):
    tiling = Tiling(tile_patches=8, overlap_patches=4, window=3)
    image, valid = picture(24 * PATCH, 24 * PATCH), np.ones((24 * PATCH, 24 * PATCH), dtype=bool)
    valid[: 10 * PATCH, : 10 * PATCH] = False
    black = np.where(valid[:, :, None], image, 0).astype(np.uint8)
    expected = whole(score_strips(reader(image), encoder, TEXTS, tiling))
    found = whole(score_strips(reader(black, valid), encoder, TEXTS, tiling))
    assert found[:, :10, :10].isnan().all()
    assert found[:, 10:].isfinite().all() and found[:, :, 10:].isfinite().all()
    torch.testing.assert_close(found[:, 12:], expected[:, 12:], atol=1e-5, rtol=0)
    # What lies under the mask cannot matter, not even beside it.
    other = np.where(valid[:, :, None], image, 255).astype(np.uint8)
    again = whole(score_strips(reader(other, valid), encoder, TEXTS, tiling))
    torch.testing.assert_close(found, again, equal_nan=True, atol=0, rtol=0)
    pixels = whole(
        upsample_strips(score_strips(reader(black, valid), encoder, TEXTS, tiling), reader(black, valid), PATCH)
    )
    assert torch.equal(pixels[0].isnan(), torch.from_numpy(~valid))


def test_a_scene_without_data_is_all_missing_and_never_encoded():
    def refuse(images):
        raise AssertionError("nothing to encode")

    image = picture(40, 40)
    scene = reader(image, np.zeros((40, 40), dtype=bool))
    encoder = PatchEncoder(refuse, torch.tanh, PATCH)
    assert whole(score_strips(scene, encoder, TEXTS, Tiling())).isnan().all()


def test_bad_input_is_named(encoder):
    with pytest.raises(ValueError, match="at least 2"):
        Tiling(tile_patches=16, overlap_patches=3, window=3)
    with pytest.raises(ValueError, match="below tile_patches"):
        Tiling(tile_patches=8, overlap_patches=8, window=3)
    with pytest.raises(ValueError, match="batch_tiles"):
        Tiling(batch_tiles=0)
    floats = SceneReader(8, 8, lambda row, column, height, width: np.zeros((height, width, 3)))
    with pytest.raises(ValueError, match="float64"):
        next(score_strips(floats, encoder, TEXTS, Tiling()))
