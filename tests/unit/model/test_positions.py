"""Position grids: interpolation, and crops against upsample-then-sample written out."""

import torch
import torch.nn.functional as F

from rsplatform.model.draws import sample_keys
from rsplatform.model.positions import crop_positions, interpolate_positions, random_crop_boxes


def test_crops_equal_upsampling_then_sampling():
    position_hwD = torch.randn(5, 7, 3)
    boxes_B4 = random_crop_boxes(sample_keys(0, 0, torch.arange(6)))
    fast_BHWD = crop_positions(position_hwD, boxes_B4, (4, 6), upsampled=20)
    whole = F.interpolate(position_hwD.permute(2, 0, 1)[None], size=(20, 20), mode="bilinear", align_corners=False)
    for box, fast_HWD in zip(boxes_B4, fast_BHWD, strict=True):
        top, bottom, left, right = box.tolist()
        rows = top + (bottom - top) * (torch.arange(4) + 0.5) / 4
        columns = left + (right - left) * (torch.arange(6) + 0.5) / 6
        grid = torch.stack(torch.meshgrid(2 * rows - 1, 2 * columns - 1, indexing="ij")[::-1], -1)[None]
        slow = F.grid_sample(whole, grid, mode="bilinear", padding_mode="border", align_corners=False)
        torch.testing.assert_close(fast_HWD, slow[0].permute(1, 2, 0), atol=1e-5, rtol=1e-5)


def test_the_whole_box_at_the_learned_size_is_the_grid_itself():
    position_hwD = torch.randn(4, 4, 3, dtype=torch.float64)
    whole_14 = torch.tensor([[0.0, 1.0, 0.0, 1.0]])
    torch.testing.assert_close(crop_positions(position_hwD, whole_14, (4, 4), upsampled=4)[0], position_hwD)


def test_boxes_have_the_published_areas_and_aspects_and_lie_inside():
    boxes_B4 = random_crop_boxes(sample_keys(0, 0, torch.arange(5000)))
    height, width = boxes_B4[:, 1] - boxes_B4[:, 0], boxes_B4[:, 3] - boxes_B4[:, 2]
    area, aspect = height * width, width / height
    assert boxes_B4.min() >= 0 and boxes_B4.max() <= 1 + 1e-6
    assert area.min() >= 0.1 - 1e-4 and area.max() <= 1 + 1e-6 and area.max() > 0.9
    assert 0.5 - 1e-4 <= aspect.min() < 0.55 and 1.9 < aspect.max() <= 2 + 1e-4


def test_interpolation_is_the_identity_at_the_same_size_and_keeps_means_when_shrinking():
    position_hwD = torch.randn(8, 8, 2)
    assert interpolate_positions(position_hwD, (8, 8)) is position_hwD
    halved = interpolate_positions(position_hwD, (4, 4), "bilinear")
    assert halved.shape == (4, 4, 2)
    constant = interpolate_positions(torch.full((8, 8, 2), 3.0), (5, 11))
    torch.testing.assert_close(constant, torch.full((5, 11, 2), 3.0))
