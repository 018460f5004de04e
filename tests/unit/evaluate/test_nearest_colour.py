"""The baseline equals the obvious loop over classes; it learns from masks alone, and ignores what no class names."""

import numpy as np
import pytest

from rsplatform.config import ConfigError
from rsplatform.evaluate import nearest_colour
from rsplatform.evaluate.benchmarks import MaskedPicture
from rsplatform.evaluate.nearest_colour import NearestColour


def masked_picture(seed: int, *, mask_HW: np.ndarray | None = None) -> MaskedPicture:
    rng = np.random.default_rng(seed)
    ids_HW = rng.choice([0, 1, 3, 255], (20, 30)).astype(np.uint8) if mask_HW is None else mask_HW
    return MaskedPicture(str(seed), rng.integers(0, 256, (20, 30, 3), dtype=np.uint8), ids_HW, 1.0)


def test_each_pixel_gets_the_class_of_the_nearest_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nearest_colour, "_PIXELS_AT_ONCE", 64)
    pictures = [masked_picture(seed) for seed in range(3)]
    pixels = np.concatenate([picture.image_HWC.reshape(-1, 3) for picture in pictures]).astype(float)
    ids = np.concatenate([picture.mask_HW.ravel() for picture in pictures])
    means = {label: pixels[ids == label].mean(axis=0) for label in (0, 1, 3)}
    image_HWC = masked_picture(9).image_HWC
    distances = {label: ((image_HWC - mean) ** 2).sum(axis=-1) for label, mean in means.items()}
    expected_HW = np.array(list(distances))[np.argmin(list(distances.values()), axis=0)]
    labels_HW = NearestColour(pictures, 4).labels(image_HWC)
    assert labels_HW.dtype == np.uint8
    np.testing.assert_array_equal(labels_HW, expected_HW)


def test_masks_without_a_class_are_refused() -> None:
    with pytest.raises(ConfigError, match="masks: no pixel is of a class, .*give masks of ids below"):
        NearestColour([masked_picture(0, mask_HW=np.full((20, 30), 255, np.uint8))], 4)
