"""Learned 2-D position grids: brought to another size, or cropped at random while training.

In: a learned grid (h, w, D). Out: one position per patch, (H, W, D) for all pictures or (B, H, W, D) for each.
Bilinear resampling is separable, so a crop is two small matrices per picture: no (B, D, 64, 64) map is ever built.
Shapes: h w learned grid, H W wanted grid, U upsampled grid, B batch, D width.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from rsplatform.model.draws import POSITION_CROP, random_fractions

CROP_AREA = (0.1, 1.0)
CROP_ASPECT = (0.5, 2.0)


def interpolate_positions(position_hwD: Tensor, grid: tuple[int, int], mode: str = "bicubic") -> Tensor:
    """The learned grid at another size (H, W, D), antialiased; itself where the size is the same."""
    if position_hwD.shape[:2] == grid:
        return position_hwD
    resized = F.interpolate(
        _full_precision(position_hwD).permute(2, 0, 1).unsqueeze(0),
        size=grid,
        mode=mode,
        align_corners=False,
        antialias=True,
    )
    return resized[0].permute(1, 2, 0).to(position_hwD.dtype)


def cropped_positions(position_hwD: Tensor, keys_B: Tensor, grid: tuple[int, int], upsampled: int = 64) -> Tensor:
    """Cropped positional embeddings (B, H, W, D) for training [F, RECIPE.md], of samples with these keys (draws.py).

    Each picture gets the grid upsampled bilinearly to `upsampled`, a random crop of it (area 0.1 to 1, aspect
    0.5 to 2), and the crop resized back to its own patches. A crop per picture is our default [D].
    """
    return crop_positions(position_hwD, random_crop_boxes(keys_B), grid, upsampled)


def crop_positions(position_hwD: Tensor, boxes_B4: Tensor, grid: tuple[int, int], upsampled: int) -> Tensor:
    """The part of the upsampled grid inside each box (top, bottom, left, right as fractions), as (B, H, W, D)."""
    boxes_B4 = boxes_B4.to(_full_precision(position_hwD).dtype)
    rows_BHh = _resampling_matrix(boxes_B4[:, 0:2], grid[0], upsampled, position_hwD.shape[0])
    columns_BWw = _resampling_matrix(boxes_B4[:, 2:4], grid[1], upsampled, position_hwD.shape[1])
    positions = _full_precision(position_hwD)
    by_rows_BHwD = (rows_BHh @ positions.flatten(1)).unflatten(2, positions.shape[1:])
    return (columns_BWw.unsqueeze(1) @ by_rows_BHwD).to(position_hwD.dtype)


def random_crop_boxes(keys_B: Tensor) -> Tensor:
    """Random boxes (B, 4): top, bottom, left, right as fractions; area and log-aspect uniform, cut to the whole."""
    area_B, log_aspect_B, down_B, right_B = random_fractions(keys_B, POSITION_CROP, 4).unbind(1)
    area_B = CROP_AREA[0] + (CROP_AREA[1] - CROP_AREA[0]) * area_B
    lowest, highest = (math.log(value) for value in CROP_ASPECT)
    aspect_B = (lowest + (highest - lowest) * log_aspect_B).exp()
    height_B = (area_B / aspect_B).sqrt().clamp(max=1.0)
    width_B = (area_B * aspect_B).sqrt().clamp(max=1.0)
    top_B, left_B = down_B * (1 - height_B), right_B * (1 - width_B)
    return torch.stack([top_B, top_B + height_B, left_B, left_B + width_B], dim=1)


def _resampling_matrix(span_B2: Tensor, size: int, upsampled: int, learned: int) -> Tensor:
    """(B, size, learned): sample `size` cell centres of a span of the grid that was upsampled from `learned`."""
    centres_S = (torch.arange(size, device=span_B2.device, dtype=span_B2.dtype) + 0.5) / size
    start_B1, end_B1 = span_B2[:, :1], span_B2[:, 1:]
    sampled_BSU = _bilinear_weights((start_B1 + (end_B1 - start_B1) * centres_S) * upsampled, upsampled)
    upsampled_U = (torch.arange(upsampled, device=span_B2.device, dtype=span_B2.dtype) + 0.5) / upsampled
    return sampled_BSU @ _bilinear_weights(upsampled_U * learned, learned)


def _bilinear_weights(places: Tensor, length: int) -> Tensor:
    """Weights (..., length) of linear interpolation at places in cell units (0 to length), clamped at the border."""
    index = (places - 0.5).clamp(0, length - 1).unsqueeze(-1)
    cells = torch.arange(length, device=places.device, dtype=places.dtype)
    return (1 - (index - cells).abs()).clamp(min=0)


def _full_precision(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
