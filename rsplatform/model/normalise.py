"""From pixels to what the model reads: uint8 batches in, floats of about unit scale out, on the images' own device.

Torch only, so that the training loop runs where no image library is. Decoding and cropping are preprocess.py's.
Shapes: B batch, H W pixels, C channels (red, green, blue).
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def normalise(images_BHWC: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """uint8 (B, H, W, 3) -> float32 (B, 3, H, W), (value / 255 - mean) / std, on the images' own device."""
    if images_BHWC.dtype != torch.uint8 or images_BHWC.ndim != 4 or images_BHWC.shape[3] != 3:
        raise ValueError(f"expected uint8 (B, H, W, 3), got {images_BHWC.dtype} {tuple(images_BHWC.shape)}")
    mean_C = torch.tensor(mean, dtype=torch.float32, device=images_BHWC.device)
    std_C = torch.tensor(std, dtype=torch.float32, device=images_BHWC.device)
    scaled_BHWC = torch.addcmul(-mean_C / std_C, images_BHWC.float(), 1 / (255 * std_C))
    return scaled_BHWC.permute(0, 3, 1, 2)
