"""A baseline that knows no shape, texture or word: every pixel gets the class whose mean colour is the nearest.

In: pictures with masks to take the colours from, and pictures to label. Out: labels. It sees masks, which no model here
does, so what it reaches favours the colours. Shapes: C classes, N pixels, 3 = red, green, blue.
"""

from collections.abc import Iterable

import numpy as np

from rsplatform.config import ConfigError
from rsplatform.evaluate.benchmarks import MaskedPicture

_PIXELS_AT_ONCE = 2**18


class NearestColour:
    """Class ids by the mean colours of `num_classes` classes; a class that no mask shows is never chosen."""

    def __init__(self, pictures: Iterable[MaskedPicture], num_classes: int) -> None:
        sums_C3, numbers_C = np.zeros((num_classes, 3)), np.zeros(num_classes)
        for picture in pictures:
            counted = picture.mask_HW < num_classes
            ids_N, pixels_N3 = picture.mask_HW[counted], picture.image_HWC[counted]
            numbers_C += np.bincount(ids_N, minlength=num_classes)
            for channel in range(3):
                sums_C3[:, channel] += np.bincount(ids_N, weights=pixels_N3[:, channel], minlength=num_classes)
        self._ids = np.flatnonzero(numbers_C)
        if not self._ids.size:
            raise ConfigError(
                "masks: no pixel is of a class, so there is no colour to compare with; "
                f"give masks of ids below {num_classes}"
            )
        self._colours_C3 = sums_C3[self._ids] / numbers_C[self._ids, None]

    def labels(self, image_HWC: np.ndarray) -> np.ndarray:
        """uint8 class ids (H, W) of a picture; a tie goes to the lower class."""
        pixels_N3 = image_HWC.reshape(-1, 3)
        nearest = [
            self._nearest(pixels_N3[start : start + _PIXELS_AT_ONCE])
            for start in range(0, len(pixels_N3), _PIXELS_AT_ONCE)
        ]
        return np.concatenate(nearest).reshape(image_HWC.shape[:2])

    def _nearest(self, pixels_N3: np.ndarray) -> np.ndarray:
        colours_C3 = self._colours_C3
        # |p - c|² without |p|², which is the same for every class
        distances_NC = (colours_C3**2).sum(axis=1) - 2 * (pixels_N3 @ colours_C3.T)
        return self._ids[distances_NC.argmin(axis=1)].astype(np.uint8)
