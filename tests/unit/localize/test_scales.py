"""Maps of several scales meet on one grid: in the right place, whatever the tiles, and missing data stays local."""

import bright_embedder
import numpy as np
import pytest
import torch
from pydantic import ValidationError

from rsplatform.geo import Grid
from rsplatform.localize.picture import multi_scale_maps, picture_maps
from rsplatform.localize.scales import MapScale, View, placed, score_scales, windows_by_resolution
from rsplatform.localize.scene import PatchEncoder, SceneReader, Tiling, score_strips
from rsplatform.localize.smooth_attention import upsample
from tests.unit.localize.test_scene import PATCH, Features, PatchifyEncoder, reader, whole

TEXTS = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def patches():
    return PatchEncoder(torch.no_grad()(PatchifyEncoder(True)), torch.tanh, PATCH)


def picture(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def coarse(image_HWC):
    """Pixels twice as large, each the mean of four."""
    height, width = image_HWC.shape[0] // 2, image_HWC.shape[1] // 2
    return image_HWC.reshape(height, 2, width, 2, 3).mean(axis=(1, 3)).round().astype(np.uint8)


def view(scene: SceneReader, patches, tiling: Tiling, *, narrower=(), pixel=1.0) -> View:
    """In the frame of the fine scene's pixels."""
    return View(scene, patches, tiling, narrower, (0.0, 0.0), (PATCH * pixel, PATCH * pixel))


def test_one_view_is_the_mean_over_its_windows(patches):
    scene, tiling = reader(picture(90, 70)), Tiling(12, 8, 5)
    maps_CHW = whole(score_strips(scene, patches, TEXTS, tiling, [3, 1])).unflatten(0, (3, 3))
    found = whole(score_scales([view(scene, patches, tiling, narrower=(3, 1))], TEXTS))
    torch.testing.assert_close(found, maps_CHW.mean(dim=0))


@pytest.mark.parametrize("patch_rows", [None, (0, 5), (4, 17)])
def test_a_coarser_view_is_stretched_to_the_grid_and_counts_by_its_windows(patches, patch_rows):
    image = picture(20 * PATCH, 14 * PATCH)
    fine, far = reader(image), reader(coarse(image))
    views = [
        view(fine, patches, Tiling(6, 4, 3)),
        view(far, patches, Tiling(7, 5, 3), narrower=(1,), pixel=2.0),
    ]
    near_CHW = whole(score_strips(fine, patches, TEXTS, Tiling(6, 4, 3)))
    far_CHW = whole(score_strips(far, patches, TEXTS, Tiling(7, 5, 3), [1])).unflatten(0, (2, 3)).sum(dim=0)
    expected = (near_CHW + upsample(far_CHW[None], (20, 14))[0]) / 3
    strips = list(score_scales(views, TEXTS, patch_rows))
    first, end = patch_rows or (0, 20)
    assert strips[0].row == first and len(strips) > 1
    found = torch.cat([strip.maps_CHW for strip in strips], dim=1)
    torch.testing.assert_close(found, expected[:, first:end], atol=1e-5, rtol=0)


def test_the_tiles_and_the_strips_of_a_view_do_not_matter(patches):
    image = picture(61, 47)
    finer = np.repeat(np.repeat(image, 2, axis=0), 2, axis=1)
    results = []
    for small, large in ((Tiling(6, 4, 3), Tiling(9, 4, 3)), (Tiling(64, 4, 3), Tiling(64, 4, 3))):
        views = [view(reader(image), patches, small), view(reader(finer), patches, large, pixel=0.5)]
        results.append(whole(score_scales(views, TEXTS)))
    assert results[0].shape[1:] == (16, 12)
    torch.testing.assert_close(results[0], results[1], atol=1e-5, rtol=0)


def test_patches_lie_where_the_frame_says(patches):
    """A view whose grid begins half a patch earlier, as on the ground, meets the same places."""
    brightness = np.arange(64 * PATCH, dtype=np.uint8)
    image = np.repeat(np.broadcast_to(brightness, (40, len(brightness)))[..., None], 3, axis=2)

    def brightness_as_angle(images_BHWC):
        cut_BHhWw = images_BHWC.float().mean(-1).unflatten(1, (-1, PATCH)).unflatten(3, (-1, PATCH))
        angle_BHW = cut_BHhWw.mean((2, 4)) / 255
        return Features(torch.stack([angle_BHW.cos(), angle_BHW.sin()], -1), None)

    plain = PatchEncoder(brightness_as_angle, torch.nn.Identity(), PATCH)
    shifted = SceneReader(40, len(brightness), reader(image).read_window, None, (PATCH // 2, PATCH // 2))
    base = view(reader(image), plain, Tiling(64, 0, 1))
    other = View(shifted, plain, Tiling(128, 0, 1), (), (-PATCH / 2, -PATCH / 2), (PATCH, PATCH))
    texts = torch.tensor([[1.0, 0.0]])
    alone, both = (whole(score_scales(views, texts)) for views in ([base], [base, other]))
    torch.testing.assert_close(both[..., 1:-1], alone[..., 1:-1], atol=1e-4, rtol=0)


def test_patches_are_placed_by_the_grids_of_their_scenes():
    """A grid of pixels twice as large that begins 3 m west and 5 m north of the other, on patches from its origin."""
    fine = Grid("EPSG:32636", (2.0, 0.0, 500.0, 0.0, -2.0, 900.0), 60, 40)
    far = Grid("EPSG:32636", (4.0, 0.0, 497.0, 0.0, -4.0, 905.0), 31, 22)
    scene = SceneReader(22, 31, reader(picture(22, 31)).read_window, None, (PATCH + 1, 2))
    origin, cell = placed(scene, far, fine, PATCH)
    assert cell == pytest.approx((2 * PATCH, 2 * PATCH))
    assert origin == pytest.approx((-5 / 2 - 2, -3 / 2 - 4))
    assert placed(reader(picture(40, 60)), fine, fine, PATCH) == ((0, 0), (PATCH, PATCH))
    with pytest.raises(ValueError, match="turned"):
        placed(scene, Grid("EPSG:32636", (0.0, 4.0, 497.0, 4.0, 0.0, 905.0), 31, 22), fine, PATCH)


def test_missing_patches_stay_where_the_first_view_has_none(patches):
    image, valid = picture(64, 64), np.ones((64, 64), dtype=bool)
    valid[:, 32:] = False
    holed, gap = reader(image, valid), reader(coarse(image), valid[::2, ::2])
    tiling = Tiling(8, 4, 3)
    near_CHW = whole(score_strips(holed, patches, TEXTS, tiling))
    found = whole(score_scales([view(holed, patches, tiling), view(gap, patches, tiling, pixel=2.0)], TEXTS))
    assert torch.equal(found.isnan(), near_CHW.isnan()) and found.isnan().any()
    nothing = reader(coarse(image), np.zeros((32, 32), dtype=bool))
    alone = whole(score_scales([view(reader(image), patches, tiling)], TEXTS))
    beside = whole(
        score_scales([view(reader(image), patches, tiling), view(nothing, patches, tiling, pixel=2.0)], TEXTS)
    )
    torch.testing.assert_close(beside, alone)


@pytest.mark.parametrize("size", [(97, 201), (8, 8), (1, 300), (131, 77)])
def test_a_picture_of_any_size_keeps_its_grid_and_bright_places(size):
    """A disc in a corner is as bright at every scale, so the averaged map is highest where a single one is."""
    embedder, texts = bright_embedder.bright_embedder(), bright_embedder.bright_and_dark_texts()
    image = np.zeros((*size, 3), dtype=np.uint8)
    image[-16:, -24:] = 255
    scales = [MapScale(relative_resolution=0.5), MapScale(relative_resolution=2.0), MapScale(window=5)]
    single, many = picture_maps(embedder, image, texts), multi_scale_maps(embedder, image, texts, scales=scales)
    assert many.shape == single.shape and many.isfinite().all()
    best = [np.unravel_index(int(maps[1].argmax()), maps[1].shape) for maps in (single, many)]
    assert max(abs(a - b) for a, b in zip(*best, strict=True)) <= 1
    torch.testing.assert_close(multi_scale_maps(embedder, image, texts, scales=[]), single)


def test_windows_of_one_resolution_share_a_pass_and_absurd_scales_are_refused():
    scales = [MapScale(window=7), MapScale(relative_resolution=0.5), MapScale(window=1)]
    assert windows_by_resolution(3, scales) == {1.0: (7, 3, 1), 0.5: (3,)}
    for wrong in ({"relative_resolution": 0.0}, {"relative_resolution": 3.0}, {"window": 4}):
        with pytest.raises(ValidationError):
            MapScale.model_validate(wrong)
    with pytest.raises(ValueError, match="at least one view"):
        list(score_scales([], TEXTS))
