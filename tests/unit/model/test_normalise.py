"""Normalising: its formula, and what it refuses."""

import pytest
import torch

from rsplatform.model.normalise import normalise


def test_normalise_is_its_formula():
    images_BHWC = torch.randint(0, 256, (2, 4, 5, 3), dtype=torch.uint8)
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    result_BCHW = normalise(images_BHWC, mean, std)
    for channel in range(3):
        expected = (images_BHWC[..., channel].double() / 255 - mean[channel]) / std[channel]
        torch.testing.assert_close(result_BCHW[:, channel].double(), expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="uint8"):
        normalise(images_BHWC.float(), mean, std)
