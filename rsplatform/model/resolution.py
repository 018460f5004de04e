"""A model at another image size: the learned position grid resampled once instead of at every forward.

In: a Mammut. Out: one with the same weights but positions of another grid. Trains nothing.
"""

import dataclasses

import torch

from rsplatform.model.mammut import Mammut
from rsplatform.model.positions import interpolate_positions
from rsplatform.model.state import model_from_tensors


def with_image_size(model: Mammut, image_size: int) -> Mammut:
    """The model (in eval mode) whose own size is `image_size`; at that size its outputs are the given one's, bitwise.

    Raises:
        ValueError: the size is not a multiple of the patch.
    """
    vision = model.config.vision
    if image_size == vision.image_size:
        return model
    config = dataclasses.replace(model.config, vision=dataclasses.replace(vision, image_size=image_size))
    grid = image_size // vision.patch_size
    tensors = {name: value.detach() for name, value in model.state_dict().items()}
    with torch.no_grad():
        positions_HWD = interpolate_positions(
            tensors["vision.position_HWD"], (grid, grid), vision.position_interpolation
        )
    return model_from_tensors(config, tensors | {"vision.position_HWD": positions_HWD}, f"image_size {image_size}")
